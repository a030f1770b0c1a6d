#!/usr/bin/env bash
# GAD on a laptop CPU: makes a virtual environment and a toy problem, runs warmup, SeqKD and GAD, and draws it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
source "$here/flags.sh"

usage() {
  cat <<'HELP'
usage: quickstart.sh [--output_dir DIR] [--seed N] [--control frozen_d] [--venv DIR | --no_venv]
  --output_dir DIR     problem, checkpoints, metrics, samples and picture (default: outputs/quickstart)
  --seed N             the same seed gives the same numbers (default 0)
  --control frozen_d   control run that freezes the discriminator after the warmup
  --venv DIR           virtual environment to make or reuse (default: .venv in the repository)
  --no_venv            use the active Python, in which verl-gad[cpu] is installed
Needs Linux and Python 3.10-3.12, and installs about 2 GB of packages.
HELP
}

OUTPUT_DIR=outputs/quickstart SEED=0 CONTROL="" VENV="$root/.venv" NO_VENV=""
read_flags "output_dir seed control venv" "no_venv" "$@"
[ -z "$NO_VENV" ] || VENV=""
no_arguments ${REST[@]+"${REST[@]}"}
case "$OUTPUT_DIR" in /*) out=$OUTPUT_DIR ;; *) out="$PWD/$OUTPUT_DIR" ;; esac
[ -z "$CONTROL" ] || [ "$CONTROL" = frozen_d ] || fail "--control knows frozen_d, got $CONTROL"
case "$SEED" in ''|*[!0-9]*) fail "--seed must be a whole number, got $SEED" ;; esac
[ ${#SEED} -le 9 ] || fail "--seed must have at most 9 digits, got $SEED"
for folder in "$out" "$VENV"; do
  [ ! -e "$folder" ] || [ -d "$folder" ] || fail "$folder is a file, expected a folder"
done
mkdir -p "$out" || fail "cannot make the folder $out; choose another --output_dir"

if [ -n "$VENV" ]; then
  if [ ! -x "$VENV/bin/python" ]; then
    for python in python3.12 python3.11 python3.10 python3 ""; do
      [ -n "$python" ] || fail "no Python 3.10, 3.11 or 3.12 found"
      "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && break
    done
    echo "== making the virtual environment $VENV"
    "$python" -m venv "$VENV"
  fi
  if ! cmp -s "$root/pyproject.toml" "$VENV/verl-gad.installed"; then
    echo "== installing (a few minutes the first time)"
    "$VENV/bin/python" -m pip install -q --upgrade pip
    "$VENV/bin/python" -m pip install -q -c "$root/scripts/constraints-cpu.txt" torch
    "$VENV/bin/python" -m pip install -q -c "$root/scripts/constraints-cpu.txt" -e "${root}[cpu]"
    cp "$root/pyproject.toml" "$VENV/verl-gad.installed"
  fi
  PATH="$VENV/bin:$PATH"
fi
export PYTHON=python3 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_DEDUP_LOGS=1

# The limit of imitation here is data: the teacher answers 16 prompts, one batch. SeqKD memorizes these answers and gets
# the letters of new prompts wrong. With 64 teacher answers or more, SeqKD is the better choice.
echo "== problem: a stochastic teacher, and a small student that answers in another style"
python3 -m recipe.gad.quickstart.problem --out "$out/problem" --seed "$SEED" --n_val 128 --n_train 16

warmup_steps=30 steps=100 # SeqKD and GAD start from the same warmup and take as many teacher batches
common=(
  --device cpu
  --train_files "$out/problem/train.parquet"
  --val_files "$out/problem/val.parquet"
)
hydra=(
  data.train_batch_size=16
  data.max_prompt_length=16
  data.max_response_length=12
  data.seed="$SEED"
  actor_rollout_ref.rollout.seed="$SEED"
  actor_rollout_ref.rollout.n=4
  actor_rollout_ref.rollout.temperature=1.0
  actor_rollout_ref.rollout.val_kwargs.temperature=1.0
  actor_rollout_ref.rollout.agent.num_workers=2
  critic.fsdp.seed="$SEED"
  trainer.total_epochs=100
  trainer.test_freq=10
  "trainer.logger=[file]"
)

run() { # run STAGE STEPS FLAGS_AND_OVERRIDES...: shows a progress bar; the rest goes to the stage's log
  local stage=$1 steps=$2 dir="$out/$1$suffix"; shift 2
  mkdir -p "$out/logs"
  local log="$out/logs/$stage$suffix.log"
  if [ "$(cat "$dir/latest_checkpointed_iteration.txt" 2>/dev/null)" = "$steps" ]; then
    echo "== $stage: complete, reused ($dir)"
    return
  fi
  echo "== $stage: $steps steps (log: $log)"
  bash "$here/run_$stage.sh" "${common[@]}" --output_dir "$dir" "$@" \
    trainer.total_training_steps="$steps" > "$log" 2>&1 &
  local pid=$! bar
  python3 -m recipe.gad.quickstart.report progress --metrics "$dir/metrics.jsonl" --pid "$pid" --steps "$steps" &
  bar=$!
  trap 'echo "stopping $stage"; kill "$pid" "$bar" 2>/dev/null; wait; exit 130' INT TERM
  local status=0
  wait "$pid" || status=$?
  wait "$bar" || true
  if [ "$status" != 0 ]; then
    grep -E "^error: " "$log" >&2 || tail -n 30 "$log" >&2
    fail "$stage failed; its full log is $log"
  fi
  trap - INT TERM
}

suffix=""
run warmup "$warmup_steps" --model "$out/problem/model" "${hydra[@]}" \
  actor_rollout_ref.actor.optim.lr=3e-4 critic.optim.lr=2e-3 trainer.save_freq="$warmup_steps"
# at 3e-4, the rate of the warmup, SeqKD gets more letters wrong
run seqkd "$steps" --model "$out/warmup/global_step_$warmup_steps/actor/huggingface" "${hydra[@]}" \
  actor_rollout_ref.actor.optim.lr=1e-4 trainer.test_freq=50 trainer.save_freq="$steps"

# The advantages are not divided by the group's standard deviation: where the discriminator is unsure, that makes noise
# as loud as signal. The KL (0.2 instead of 0.001) and the imitation term keep so small a model at its task.
discriminator_lr=2e-3
if [ "$CONTROL" = frozen_d ]; then suffix="-frozen_d" discriminator_lr=0; fi
run gad "$steps" --warmup_dir "$out/warmup" "${hydra[@]}" \
  actor_rollout_ref.actor.optim.lr=3e-4 actor_rollout_ref.actor.kl_loss_coef=0.2 \
  algorithm.norm_adv_by_std_in_grpo=False gad.imitation_coef=0.3 \
  critic.optim.lr="$discriminator_lr" trainer.save_freq=50

echo "== what happened"
python3 -m recipe.gad.quickstart.report show --warmup_dir "$out/warmup" --seqkd_dir "$out/seqkd" \
  --gad_dir "$out/gad$suffix" --out "$out/curves$suffix.png"
cat <<DONE

runs         $out/{warmup,seqkd,gad$suffix}/
  global_step_*   checkpoints
  metrics.jsonl   metrics
  val_samples/    samples, one file per validation
logs         $out/logs/
picture      $out/curves$suffix.png
DONE
