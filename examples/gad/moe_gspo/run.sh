#!/usr/bin/env bash
# Warmup and GAD with a mixture-of-experts student, a dense discriminator, GSPO and a format reward. The defaults are
# for Qwen3-30B-A3B and Qwen3-8B on one node with eight large GPUs; README.md says what was run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../flags.sh"
export PYTHON=${PYTHON:-python3}

usage() {
  cat <<'HELP'
usage: run.sh --model MOE --reward_model DENSE --train_files PATH --reward FILE [flags] [hydra.key=value ...]
  --model MOE          student: a mixture-of-experts model
  --reward_model DENSE discriminator: a model of another architecture with the student's vocabulary
  --train_files PATH   parquet with columns content (chat messages) and teacher_response
  --val_files PATH     the same for validation (default: 64 rows of the training file)
  --reward FILE        Python file with compute_score, which judges an answer's form (../task_reward/json_form.py)
  --output_dir DIR     runs and TensorBoard files (default: outputs/moe_gspo)
  --device gpu|cpu     cpu is for small models
  --dry-run            print the commands of both stages and exit
  --skip-doctor        do not run `gad doctor` before each stage
Hydra overrides go to both stages.
HELP
}

MODEL="" REWARD_MODEL="" TRAIN_FILES="" VAL_FILES="" REWARD="" OUTPUT_DIR=outputs/moe_gspo DEVICE=gpu
DRY_RUN="" SKIP_DOCTOR=""
read_flags "model reward_model train_files val_files reward output_dir device" "dry_run skip_doctor" "$@"
set -- ${REST[@]+"${REST[@]}"}
for name in MODEL REWARD_MODEL TRAIN_FILES REWARD; do
  [ -n "${!name}" ] || fail "--${name,,} is missing; see --help"
done
case "$OUTPUT_DIR" in /*) out=$OUTPUT_DIR ;; *) out="$PWD/$OUTPUT_DIR" ;; esac
[ -f "$REWARD" ] || fail "--reward $REWARD is no file"
reward=$(cd "$(dirname "$REWARD")" && pwd)/$(basename "$REWARD")
overrides=("$@")

run() { # run STAGE ARGUMENT...
  local stage=$1; shift
  stoppable bash "$here/../run_$stage.sh" --device "$DEVICE" ${SKIP_DOCTOR:+--skip-doctor} ${DRY_RUN:+--dry-run} \
    --output_dir "$out/$stage" --train_files "$TRAIN_FILES" ${VAL_FILES:+--val_files "$VAL_FILES"} "$@" \
    data.train_batch_size=128 data.max_prompt_length=3800 data.max_response_length=2900 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 critic.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=98304 critic.ppo_max_token_len_per_gpu=98304 \
    actor_rollout_ref.actor.optim.clip_grad=0.3 critic.optim.lr=3e-6 critic.optim.clip_grad=0.2 \
    actor_rollout_ref.actor.strategy=fsdp2 critic.strategy=fsdp2 \
    actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    critic.fsdp.param_offload=True critic.fsdp.optimizer_offload=True \
    actor_rollout_ref.rollout.tensor_model_parallel_size=4 actor_rollout_ref.rollout.gpu_memory_utilization=0.7 \
    actor_rollout_ref.rollout.max_model_len=7200 actor_rollout_ref.rollout.max_num_seqs=128 \
    actor_rollout_ref.rollout.temperature=0.6 actor_rollout_ref.rollout.val_kwargs.temperature=0.6 \
    trainer.critic_warmup=20 "trainer.logger=[console,file,tensorboard]" \
    "+ray_kwargs.ray_init.runtime_env.env_vars.TENSORBOARD_DIR='$out/tensorboard/$stage'" \
    ${overrides[@]+"${overrides[@]}"}
}

run warmup --model "$MODEL" --reward_model "$REWARD_MODEL" actor_rollout_ref.actor.optim.lr=1e-6
gad_models=(--warmup_dir "$out/warmup")
[ -z "$DRY_RUN" ] || gad_models=(--model "$MODEL" --reward_model "$REWARD_MODEL") # no checkpoint exists yet
run gad "${gad_models[@]}" actor_rollout_ref.actor.optim.lr=3e-6 \
  actor_rollout_ref.actor.policy_loss.loss_mode=gspo actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
  actor_rollout_ref.actor.clip_ratio_low=0.005 actor_rollout_ref.actor.clip_ratio_high=0.01 \
  actor_rollout_ref.actor.clip_ratio_c=10 actor_rollout_ref.actor.kl_loss_coef=0.6 \
  actor_rollout_ref.actor.entropy_coeff=0.01 \
  "reward.custom_reward_function.path='$reward'" gad.task_reward.weight=0.7
