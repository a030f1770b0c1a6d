#!/usr/bin/env bash
# SmolLM2-135M with GPT-4's answers, on one GPU: SeqKD to its best, then GAD against more SeqKD. Run prepare.sh first.
# It calls the scripts of examples/gad with the sizes of this example.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../flags.sh"
export PYTHON=${PYTHON:-python3}

usage() {
  cat <<'HELP'
usage: run.sh [--output_dir DIR] [--stages "short plateau seqkd warmup gad eval report"] [--skip-doctor]
              [hydra.key=value ...]
  --output_dir DIR  output folder of prepare.sh; every stage adds a folder (default: outputs/smollm2_gpt4)
  --stages LIST     stages to run, in this order (default: all); a stage that was stopped resumes
  --skip-doctor     do not run `gad doctor` before a stage
Hydra overrides go to every training stage. Without flash-attn, add:
  +actor_rollout_ref.model.override_config.attn_implementation=sdpa
HELP
}

OUTPUT_DIR="$PWD/outputs/smollm2_gpt4" STAGES="short plateau seqkd warmup gad eval report" SKIP_DOCTOR=""
read_flags "output_dir stages" "skip_doctor" "$@"
set -- ${REST[@]+"${REST[@]}"}
out=$OUTPUT_DIR
[ -d "$out/student" ] && [ -f "$out/data/train.parquet" ] ||
  fail "$out holds no student and data; run prepare.sh --output_dir $out"

# From the plateau, SeqKD and GAD take as many batches of teacher answers. The student stands still in the warmup.
short_steps=240 plateau_steps=3000 lead_steps=120 steps=200
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
  trainer.total_epochs=30
  trainer.test_freq=20
)
# the policy's rate falls to zero; the discriminator's does not (docs/experiments.md)
policy_lr=(actor_rollout_ref.actor.optim.lr=1e-5 actor_rollout_ref.actor.optim.lr_scheduler_type=cosine)
discriminator_lr=critic.optim.lr=3e-5

short="$out/short/global_step_$short_steps/actor/huggingface"
plateau="$out/plateau/global_step_$plateau_steps/actor/huggingface"

train() { # train FOLDER STAGE STEPS [--FLAG FOLDER ...] [hydra.key=value ...]
  local folder=$1 stage=$2 steps=$3 start=(); shift 3
  while [[ "${1-}" == --* ]]; do start+=("$1" "$2"); shift 2; done
  stoppable bash "$here/../run_$stage.sh" "${flags[@]}" --output_dir "$out/$folder" "${start[@]}" "${sizes[@]}" \
    trainer.total_training_steps="$steps" trainer.save_freq="$steps" "$@"
}

evaluate() { # evaluate NAME MODEL: the two-sample test's discriminators always start from the untrained student
  "$PYTHON" -m recipe.gad.cli eval --model "$2" --val_files "$out/data/val.parquet" --output_dir "$out/eval/$1" \
    --n 4 --temperature 0.8 --max_prompt_length 512 --max_response_length 256 --gpu_memory_utilization 0.3 \
    --two_sample_model "$out/student"
}

for stage in $STAGES; do
  echo "== $stage"
  case "$stage" in
    short)
      train short seqkd "$short_steps" --model "$out/student" \
        actor_rollout_ref.actor.optim.lr=2e-5 actor_rollout_ref.actor.optim.lr_scheduler_type=cosine "$@" ;;
    plateau) # more steps make the student worse (docs/experiments.md)
      train plateau seqkd "$plateau_steps" --model "$short" "${policy_lr[@]}" trainer.test_freq=500 "$@" ;;
    seqkd) # the control
      train seqkd seqkd "$steps" --model "$plateau" "${policy_lr[@]}" "$@" ;;
    warmup) # the discriminator's lead: it trains alone, on more prompts and fewer answers
      train warmup warmup "$lead_steps" --model "$plateau" --reward_model "$out/student" \
        trainer.critic_warmup=$((lead_steps + 1)) data.train_batch_size=64 actor_rollout_ref.rollout.n=4 \
        "$discriminator_lr" "$@" ;;
    gad)
      train gad gad "$steps" --warmup_dir "$out/warmup" \
        "${policy_lr[@]}" "$discriminator_lr" actor_rollout_ref.actor.use_kl_loss=False \
        algorithm.norm_adv_by_std_in_grpo=False gad.imitation_coef=0.2 "$@" ;;
    eval)
      evaluate base "$out/student"
      for name in short plateau seqkd gad; do
        [ ! -d "$out/$name" ] || evaluate "$name" "$out/$name"
      done
      "$PYTHON" -m recipe.gad.cli eval compare "$out"/eval/* --output "$out/eval/compare.json" ;;
    report)
      "$PYTHON" -m recipe.gad.cli report "$out" --output "$out/report.html" ;;
    *) fail "unknown stage $stage; see --help" ;;
  esac
done
