#!/usr/bin/env bash
# run.sh with a small random student with experts, a dense Llama, and the data of ../task_reward.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../flags.sh"
export PYTHON=${PYTHON:-python3}

usage() {
  cat <<'HELP'
usage: tiny.sh [flags] [hydra.key=value ...]
  --output_dir DIR     models, data and runs (default: outputs/moe_gspo_tiny)
  --shape tiny|slice   sizes of the models (default: tiny); slice has the width and the experts of Qwen3-30B-A3B
  --layers N           layers of each model (default: 2)
  --device cpu|gpu     gpu with --shape slice: see slice.sh (default: cpu)
  --skip-doctor        do not run `gad doctor` before each stage
Hydra overrides go to both stages.
HELP
}

OUTPUT_DIR=outputs/moe_gspo_tiny SHAPE=tiny LAYERS=2 DEVICE=cpu SKIP_DOCTOR=""
read_flags "output_dir shape layers device" skip_doctor "$@"
case "$OUTPUT_DIR" in /*) out=$OUTPUT_DIR ;; *) out="$PWD/$OUTPUT_DIR" ;; esac
"$PYTHON" "$here/../task_reward/problem.py" data --output_dir "$out/data"
"$PYTHON" "$here/tiny.py" "$out/data/model" "$out/data/student" "$out/data/discriminator" \
  --shape "$SHAPE" --layers "$LAYERS"

stoppable bash "$here/run.sh" --device "$DEVICE" ${SKIP_DOCTOR:+--skip-doctor} --output_dir "$out" \
  --model "$out/data/student" --reward_model "$out/data/discriminator" --reward "$here/../task_reward/json_form.py" \
  --train_files "$out/data/train.parquet" --val_files "$out/data/val.parquet" \
  data.train_batch_size=16 data.max_prompt_length=16 data.max_response_length=16 \
  actor_rollout_ref.actor.ppo_mini_batch_size=8 critic.ppo_mini_batch_size=8 \
  actor_rollout_ref.rollout.n=4 actor_rollout_ref.rollout.max_model_len=32 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 trainer.n_gpus_per_node=1 \
  actor_rollout_ref.rollout.temperature=1 actor_rollout_ref.rollout.val_kwargs.temperature=1 \
  actor_rollout_ref.actor.optim.lr=1e-3 critic.optim.lr=1e-3 \
  trainer.total_training_steps=60 trainer.save_freq=60 trainer.test_freq=60 \
  ${REST[@]+"${REST[@]}"}
