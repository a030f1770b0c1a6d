#!/usr/bin/env bash
# SeqKD, warmup, GAD and their evaluation for SmolLM2-135M with GPT-4's answers, on one GPU. Run prepare.sh first.
# It calls the scripts of examples/gad with the sizes of this example.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../flags.sh"
export PYTHON=${PYTHON:-python3}

usage() {
  cat <<'HELP'
usage: run.sh [--output_dir DIR] [--stages "seqkd warmup gad eval report"] [--skip-doctor] [hydra.key=value ...]
  --output_dir DIR  output folder of prepare.sh; every stage adds a folder (default: outputs/smollm2_gpt4)
  --stages LIST     stages to run, in this order (default: all); a stage that was stopped resumes
  --skip-doctor     do not run `gad doctor` before a stage
Hydra overrides go to every training stage. Without flash-attn, add:
  +actor_rollout_ref.model.override_config.attn_implementation=sdpa
HELP
}

OUTPUT_DIR="$PWD/outputs/smollm2_gpt4" STAGES="seqkd warmup gad eval report" SKIP_DOCTOR=""
read_flags "output_dir stages" "skip_doctor" "$@"
set -- ${REST[@]+"${REST[@]}"}
out=$OUTPUT_DIR
[ -d "$out/student" ] && [ -f "$out/data/train.parquet" ] ||
  fail "$out holds no student and data; run prepare.sh --output_dir $out"

# SeqKD gets as many batches of teacher answers as warmup and GAD together
warmup_steps=50 gad_steps=100
seqkd_steps=$((warmup_steps + gad_steps))
flags=(${SKIP_DOCTOR:+--skip-doctor} --train_files "$out/data/train.parquet" --val_files "$out/data/val.parquet")
sizes=(
  data.train_batch_size=32
  data.max_prompt_length=512
  data.max_response_length=256
  data.val_max_samples=128
  actor_rollout_ref.rollout.max_model_len=768
  actor_rollout_ref.rollout.gpu_memory_utilization=0.3
  actor_rollout_ref.rollout.cudagraph_capture_sizes="[1,8,16,32,64,128,192,256]"
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=32768
  critic.forward_max_token_len_per_gpu=32768
  trainer.n_gpus_per_node=1
  trainer.total_epochs=10
  trainer.test_freq=20
)
# D learns several times faster than the policy; at equal rates the two chase each other (docs/experiments.md)
imitation_lr=2e-5 policy_lr=5e-6 discriminator_lr=3e-5

train() { # train STAGE STEPS START_FLAG START_FOLDER [hydra.key=value ...]
  local stage=$1 steps=$2 start=("$3" "$4"); shift 4
  stoppable bash "$here/../run_$stage.sh" "${flags[@]}" --output_dir "$out/$stage" "${start[@]}" "${sizes[@]}" \
    trainer.total_training_steps="$steps" trainer.save_freq="$steps" "$@"
}

evaluate() { # evaluate NAME MODEL: the two-sample test's discriminators always start from the untrained student
  "$PYTHON" -m recipe.gad.cli eval --model "$2" --val_files "$out/data/val.parquet" --output_dir "$out/eval/$1" \
    --temperature 0.8 --max_prompt_length 512 --max_response_length 256 --gpu_memory_utilization 0.3 \
    --two_sample_model "$out/student"
}

for stage in $STAGES; do
  echo "== $stage"
  case "$stage" in
    seqkd)
      train seqkd "$seqkd_steps" --model "$out/student" \
        actor_rollout_ref.actor.optim.lr="$imitation_lr" "$@" ;;
    warmup)
      train warmup "$warmup_steps" --model "$out/student" \
        actor_rollout_ref.actor.optim.lr="$imitation_lr" critic.optim.lr="$discriminator_lr" "$@" ;;
    gad)
      train gad "$gad_steps" --warmup_dir "$out/warmup" \
        actor_rollout_ref.actor.optim.lr="$policy_lr" critic.optim.lr="$discriminator_lr" "$@" ;;
    eval)
      evaluate base "$out/student"
      for name in seqkd warmup gad; do
        [ ! -d "$out/$name" ] || evaluate "$name" "$out/$name"
      done
      "$PYTHON" -m recipe.gad.cli eval compare "$out"/eval/* --output "$out/eval/compare.json" ;;
    report)
      "$PYTHON" -m recipe.gad.cli report "$out" --output "$out/report.html" ;;
    *) fail "unknown stage $stage; see --help" ;;
  esac
done
