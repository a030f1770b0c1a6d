#!/usr/bin/env bash
# tiny.sh with vLLM on one GPU of 80 GB: two layers of Qwen3-30B-A3B's width learn from two of an 8B Llama's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../flags.sh"

usage() {
  cat <<'HELP'
usage: slice.sh [--output_dir DIR] [--layers N] [--skip-doctor] [hydra.key=value ...]
  --output_dir DIR  models, data and runs (default: outputs/moe_gspo_slice)
  --layers N        layers of each model (default: 2)
  --skip-doctor     do not run `gad doctor` before each stage
Hydra overrides go to both stages.
HELP
}

OUTPUT_DIR=outputs/moe_gspo_slice LAYERS=2 SKIP_DOCTOR=""
read_flags "output_dir layers" skip_doctor "$@"
exec bash "$here/tiny.sh" --shape slice --device gpu --layers "$LAYERS" --output_dir "$OUTPUT_DIR" \
  ${SKIP_DOCTOR:+--skip-doctor} \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192 critic.ppo_max_token_len_per_gpu=8192 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.4 \
  actor_rollout_ref.actor.optim.lr=1e-5 critic.optim.lr=1e-5 \
  "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]" "critic.checkpoint.save_contents=[hf_model]" \
  trainer.critic_warmup=3 trainer.total_training_steps=6 trainer.save_freq=6 trainer.test_freq=6 \
  ${REST[@]+"${REST[@]}"}
