#!/usr/bin/env bash
# GAD: starts from a warmup checkpoint and trains both; the discriminator's scores are the actor's reward (GRPO).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: run_gad.sh --warmup_dir DIR [--resume_step N] --train_files PATH [flags] [hydra.key=value ...]
  --warmup_dir DIR     output folder of run_warmup.sh; its newest complete checkpoint starts actor, critic and reference
  --resume_step N      start from its global_step_N instead
  --ppo_mini_batches N optimizer steps of the actor per batch (default 1); N divides data.train_batch_size
  Without --warmup_dir, --model and --reward_model name the actor and a discriminator with a trained score head.
HELP
  flags_help
}

PPO_MINI_BATCHES="" EXTRA_FLAGS="ppo_mini_batches"
parse_flags "$@"
if [ -n "$WARMUP_DIR" ]; then
  [ -z "$MODEL$REWARD_MODEL" ] || fail "--warmup_dir brings actor and discriminator; drop --model and --reward_model"
  check_text --warmup_dir "$WARMUP_DIR"
  case "$WARMUP_DIR" in -*) WARMUP_DIR="./$WARMUP_DIR" ;; esac # it is no option
  checkpoint=$("$PYTHON" -m recipe.gad.run.checkpoint resolve "$WARMUP_DIR" ${RESUME_STEP:+--step "$RESUME_STEP"})
  MODEL="$checkpoint/actor/huggingface"
  REWARD_MODEL="$checkpoint/critic/huggingface"
elif [ -n "$RESUME_STEP" ]; then
  fail "--resume_step chooses a checkpoint of --warmup_dir, which is missing"
fi
mini_batch_size=""
if [ -n "$PPO_MINI_BATCHES" ]; then
  mini_batch_size=$("$PYTHON" -m recipe.gad.run.mini_batches "$PPO_MINI_BATCHES" device="$DEVICE" \
    ${HYDRA_OVERRIDES[@]+"${HYDRA_OVERRIDES[@]}"})
fi
launch gad \
  gad.actor_objective=policy_gradient \
  ${mini_batch_size:+actor_rollout_ref.actor.ppo_mini_batch_size="$mini_batch_size"} \
  trainer.critic_warmup=0
