#!/usr/bin/env bash
# GAD with a reward for the answer's form beside the discriminator, against the discriminator alone; on a CPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../flags.sh"
export PYTHON=${PYTHON:-python3}

usage() {
  cat <<'HELP'
usage: run.sh [--output_dir DIR] [--seed N] [hydra.key=value ...]
  --output_dir DIR  data and runs (default: outputs/task_reward)
  --seed N          seed of the data, the student and the samples (default 0)
Hydra overrides go to every stage.
HELP
}

OUTPUT_DIR=outputs/task_reward SEED=0
read_flags "output_dir seed" "" "$@"
set -- ${REST[@]+"${REST[@]}"}
case "$OUTPUT_DIR" in /*) out=$OUTPUT_DIR ;; *) out="$PWD/$OUTPUT_DIR" ;; esac
"$PYTHON" "$here/problem.py" data --output_dir "$out/data" --seed "$SEED"

run() { # run STAGE NAME STEPS ARGUMENT...
  local stage=$1 name=$2 steps=$3; shift 3
  stoppable bash "$here/../run_$stage.sh" --device cpu --skip-doctor --output_dir "$out/$name" \
    --train_files "$out/data/train.parquet" --val_files "$out/data/val.parquet" "$@" \
    data.train_batch_size=16 data.max_prompt_length=16 data.max_response_length=16 data.seed="$SEED" \
    actor_rollout_ref.rollout.seed="$SEED" critic.fsdp.seed="$SEED" \
    actor_rollout_ref.rollout.n=4 actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0 actor_rollout_ref.rollout.val_kwargs.n=8 \
    trainer.total_training_steps="$steps" trainer.save_freq="$steps" trainer.test_freq="$steps" trainer.total_epochs=10 \
    "trainer.logger=[file]" ${overrides[@]+"${overrides[@]}"}
}

overrides=("$@")
own_reward="reward.custom_reward_function.path=$here/json_form.py"
run warmup warmup 120 --model "$out/data/model" actor_rollout_ref.actor.optim.lr=3e-3 critic.optim.lr=2e-3
for weight in 0 0.7; do
  run gad "gad-$weight" 80 --warmup_dir "$out/warmup" "$own_reward" gad.task_reward.weight="$weight" \
    actor_rollout_ref.actor.optim.lr=3e-4 critic.optim.lr=2e-3 actor_rollout_ref.actor.kl_loss_coef=0.1 \
    algorithm.norm_adv_by_std_in_grpo=False gad.imitation_coef=0.3
done
"$PYTHON" "$here/problem.py" show "$out/warmup" "$out/gad-0" "$out/gad-0.7"
