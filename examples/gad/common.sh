# Shared by the launch scripts of this folder: flags, defaults, and the one place that starts verl. Sourced, not run.

MODEL="" REWARD_MODEL="" EXP_NAME="" NNODES=1 RESUME_STEP="" TRAIN_FILES="" VAL_FILES="" WARMUP_DIR="" OUTPUT_DIR=""
DEVICE=gpu DRY_RUN=0 DOCTOR=1
HYDRA_OVERRIDES=()
PYTHON=${PYTHON:-python3}

fail() { echo "error: $*" >&2; exit 2; }

flags_help() {
  cat <<'HELP'
Flags (before any Hydra override):
  --model PATH         student: Hugging Face folder or hub id
  --reward_model PATH  initial discriminator (default: the student)
  --train_files PATH   parquet with columns content (chat messages) and teacher_response
  --val_files PATH     parquet of the same form for validation (default: 64 rows of the training file)
  --exp_name NAME      name of the run (default: the stage)
  --output_dir DIR     checkpoints, metrics.jsonl, val_samples (default: checkpoints/gad/NAME)
  --nnodes N           nodes of the Ray cluster (default 1)
  --device gpu|cpu     cpu: small models, Hugging Face rollout, settings of recipe/gad/config/device/cpu.yaml
  --dry-run            print the composed command and stop
  --skip-doctor        start without `gad doctor`; the trainer still checks configuration, data and folders
  --help               this text
Everything after the flags goes to Hydra and wins: any key of recipe/gad/config/gad_trainer.yaml or of verl.
HELP
}

parse_flags() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --help|-h) usage; exit 0 ;;
      --dry-run) DRY_RUN=1; shift; continue ;;
      --skip-doctor) DOCTOR=0; shift; continue ;;
      --) shift; break ;;
      --model|--reward_model|--exp_name|--nnodes|--resume_step|--train_files|--val_files|--warmup_dir|--output_dir|--device)
        [ $# -ge 2 ] || fail "$1 needs a value; see --help" ;;
      --*) fail "unknown flag $1; see --help" ;;
      *) break ;;
    esac
    case "$1" in
      --model) MODEL=$2 ;;
      --reward_model) REWARD_MODEL=$2 ;;
      --exp_name) EXP_NAME=$2 ;;
      --nnodes) NNODES=$2 ;;
      --resume_step) RESUME_STEP=$2 ;;
      --train_files) TRAIN_FILES=$2 ;;
      --val_files) VAL_FILES=$2 ;;
      --warmup_dir) WARMUP_DIR=$2 ;;
      --output_dir) OUTPUT_DIR=$2 ;;
      --device) DEVICE=$2 ;;
    esac
    shift 2
  done
  HYDRA_OVERRIDES=("$@")
}

absolute() { # relative local paths become absolute; hub ids and URLs stay
  case "$1" in
    /*|*://*) printf '%s' "$1" ;;
    *) if [ -e "$1" ]; then printf '%s/%s' "$PWD" "$1"; else printf '%s' "$1"; fi ;;
  esac
}

# launch STAGE [KEY=VALUE ...]: the stage's overrides, then the flags', then the user's. The last thing a script does.
launch() {
  local stage=$1; shift
  [ -n "$MODEL" ] || fail "--model is missing: the student's Hugging Face folder or hub id"
  [ -n "$TRAIN_FILES" ] || fail "--train_files is missing: a parquet file with content and teacher_response"
  case "$DEVICE" in gpu|cpu) ;; *) fail "--device must be gpu or cpu, got $DEVICE" ;; esac
  EXP_NAME=${EXP_NAME:-$stage}
  OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/gad/$EXP_NAME}
  case "$OUTPUT_DIR" in /*) ;; *) OUTPUT_DIR="$PWD/$OUTPUT_DIR" ;; esac
  local model; model=$(absolute "$MODEL")
  local environment=(VERL_FILE_LOGGER_PATH="$OUTPUT_DIR/metrics.jsonl" VERL_FILE_LOGGER_APPEND=1)
  if [ "$DEVICE" = cpu ]; then environment+=(VERL_PLATFORM=cpu); fi
  local overrides=(
    device="$DEVICE"
    "$@"
    gad.stage="$stage"
    actor_rollout_ref.model.path="$model"
    critic.model.path="$(absolute "${REWARD_MODEL:-$MODEL}")"
    data.train_files="$(absolute "$TRAIN_FILES")"
    data.val_files="$(absolute "${VAL_FILES:-$TRAIN_FILES}")"
    trainer.nnodes="$NNODES"
    trainer.experiment_name="$EXP_NAME"
    trainer.default_local_dir="$OUTPUT_DIR"
    trainer.validation_data_dir="$OUTPUT_DIR/val_samples"
    hydra.run.dir="$OUTPUT_DIR/hydra"
  )
  [ -n "$VAL_FILES" ] || overrides+=(data.val_max_samples=64)
  local variable
  for variable in "${environment[@]}"; do # Ray workers on other nodes do not inherit this shell's environment
    overrides+=("+ray_kwargs.ray_init.runtime_env.env_vars.${variable%%=*}='${variable#*=}'")
  done
  overrides+=(${HYDRA_OVERRIDES[@]+"${HYDRA_OVERRIDES[@]}"})
  local command=("$PYTHON" -m verl.trainer.main_ppo --config-path pkg://recipe.gad.config --config-name gad_trainer "${overrides[@]}")
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' env "${environment[@]}" "${command[@]}"; echo
    return 0
  fi
  "$PYTHON" -c 'import recipe.gad.plugin' 2>/dev/null || fail "verl-gad is not installed for $PYTHON; run: pip install -e $(dirname "${BASH_SOURCE[0]}")/../.."
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ] && [ -z "$CUDA_VISIBLE_DEVICES" ]; then unset CUDA_VISIBLE_DEVICES; fi # empty kills Ray
  if [ "$DOCTOR" = 1 ]; then env "${environment[@]}" "$PYTHON" -m recipe.gad.cli doctor --config-name gad_trainer "${overrides[@]}"; fi
  exec env "${environment[@]}" "${command[@]}" # a signal to this script reaches the trainer
}
