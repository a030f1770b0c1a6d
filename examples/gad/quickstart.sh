#!/usr/bin/env bash
# GAD on a laptop CPU, from nothing: virtual environment, a self-made problem, warmup, GAD, and a picture of what happened.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

usage() {
  cat <<'HELP'
usage: quickstart.sh [--output_dir DIR] [--seed N] [--control frozen_d] [--venv DIR | --no_venv]
  --output_dir DIR     problem, checkpoints, metrics, samples and picture (default: outputs/quickstart)
  --seed N             the same seed gives the same numbers (default 0)
  --control frozen_d   control run: D stays as the warmup left it; d_acc falls further, closeness does not
  --venv DIR           virtual environment to make or reuse (default: .venv in the repository)
  --no_venv            use the active Python, where verl-gad is installed with the cpu extra
Needs Linux and Python 3.10-3.12; about 2 GB of packages. Everything else it makes by itself.
HELP
}

fail() { echo "error: $*" >&2; exit 2; }

out="$PWD/outputs/quickstart" seed=0 control="" venv="$root/.venv"
while [ $# -gt 0 ]; do
  case "$1" in
    --help|-h) usage; exit 0 ;;
    --no_venv) venv=""; shift ;;
    --output_dir|--seed|--control|--venv)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help"
      case "$1" in
        --output_dir) case "$2" in /*) out=$2 ;; *) out="$PWD/$2" ;; esac ;;
        --seed) seed=$2 ;;
        --control) control=$2 ;;
        --venv) venv=$2 ;;
      esac
      shift 2 ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
done
[ -z "$control" ] || [ "$control" = frozen_d ] || fail "--control knows frozen_d, got $control"
case "$seed" in ''|*[!0-9]*) fail "--seed must be a whole number, got $seed" ;; esac

if [ -n "$venv" ]; then
  if [ ! -x "$venv/bin/python" ]; then
    for python in python3.12 python3.11 python3.10 python3 ""; do
      [ -n "$python" ] || fail "no Python 3.10, 3.11 or 3.12 found"
      "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && break
    done
    echo "== making the virtual environment $venv"
    "$python" -m venv "$venv"
  fi
  if ! cmp -s "$root/pyproject.toml" "$venv/verl-gad.installed"; then
    echo "== installing (a few minutes the first time)"
    "$venv/bin/python" -m pip install -q --upgrade pip
    "$venv/bin/python" -m pip install -q -c "$root/scripts/constraints-cpu.txt" torch
    "$venv/bin/python" -m pip install -q -c "$root/scripts/constraints-cpu.txt" -e "$root[cpu]"
    cp "$root/pyproject.toml" "$venv/verl-gad.installed"
  fi
  PATH="$venv/bin:$PATH"
fi
export PYTHON=python3 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_DEDUP_LOGS=1

echo "== problem: a stochastic teacher with a style of its own, and a small student that answers in another style"
mkdir -p "$out"
python3 -m recipe.gad.quickstart.problem --out "$out/problem" --seed "$seed" --n_val 128

warmup_steps=30 gad_steps=100
common=(
  --device cpu
  --train_files "$out/problem/train.parquet"
  --val_files "$out/problem/val.parquet"
)
hydra=(
  data.train_batch_size=16
  data.max_prompt_length=16
  data.max_response_length=12
  data.seed="$seed"
  actor_rollout_ref.rollout.seed="$seed"
  actor_rollout_ref.rollout.n=4
  actor_rollout_ref.rollout.temperature=1.0
  actor_rollout_ref.rollout.val_kwargs.temperature=1.0
  actor_rollout_ref.rollout.agent.num_workers=2
  critic.fsdp.seed="$seed"
  trainer.total_epochs=100
  trainer.test_freq=10
  "trainer.logger=[file]"
)

run() { # run STAGE STEPS FLAGS_AND_OVERRIDES...: progress on the terminal, everything else in the stage's log
  local stage=$1 steps=$2 dir="$out/$1$suffix"; shift 2
  mkdir -p "$out/logs"
  local log="$out/logs/$stage$suffix.log"
  if [ "$(cat "$dir/latest_checkpointed_iteration.txt" 2>/dev/null)" = "$steps" ]; then
    echo "== $stage: complete, reused ($dir)"
    return
  fi
  echo "== $stage: $steps steps (log: $log)"
  bash "$here/run_$stage.sh" "${common[@]}" --output_dir "$dir" "$@" trainer.total_training_steps="$steps" > "$log" 2>&1 &
  local pid=$! bar
  python3 -m recipe.gad.quickstart.report progress --metrics "$dir/metrics.jsonl" --pid "$pid" --steps "$steps" &
  bar=$!
  trap 'echo "stopping $stage"; kill "$pid" "$bar" 2>/dev/null; wait; exit 130' INT TERM
  local status=0
  wait "$pid" || status=$?
  wait "$bar" || true
  if [ "$status" != 0 ]; then
    grep -E "^error: " "$log" >&2 || tail -n 30 "$log" >&2
    fail "$stage stopped; its whole log is $log"
  fi
  trap - INT TERM
}

# so small a model unlearns its task within steps when it is pulled hard: KL 0.1 to the warmup policy instead of 0.001
suffix=""
run warmup "$warmup_steps" --model "$out/problem/model" "${hydra[@]}" \
  actor_rollout_ref.actor.optim.lr=3e-4 critic.optim.lr=2e-3 trainer.save_freq="$warmup_steps"
discriminator_lr=2e-3
if [ "$control" = frozen_d ]; then suffix="-frozen_d" discriminator_lr=0; fi
run gad "$gad_steps" --warmup_dir "$out/warmup" "${hydra[@]}" \
  actor_rollout_ref.actor.optim.lr=2e-4 actor_rollout_ref.actor.kl_loss_coef=0.1 \
  critic.optim.lr="$discriminator_lr" trainer.save_freq=50

echo "== what happened"
python3 -m recipe.gad.quickstart.report show --warmup_dir "$out/warmup" --gad_dir "$out/gad$suffix" --out "$out/curves$suffix.png"
cat <<DONE

checkpoints  $out/warmup/global_step_*  and  $out/gad$suffix/global_step_*
metrics      $out/warmup/metrics.jsonl  and  $out/gad$suffix/metrics.jsonl
samples      $out/warmup/val_samples/  and  $out/gad$suffix/val_samples/  (one file per validation)
logs         $out/logs/
picture      $out/curves$suffix.png
DONE
