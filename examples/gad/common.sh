# Shared by the launch scripts of this folder: flags, defaults, and the function that starts verl. Sourced, not run.
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

MODEL="" REWARD_MODEL="" EXP_NAME="" NNODES=1 RESUME_STEP="" TRAIN_FILES="" VAL_FILES="" WARMUP_DIR="" OUTPUT_DIR=""
DEVICE=gpu DRY_RUN="" SKIP_DOCTOR="" RAW_LOG=""
HYDRA_OVERRIDES=()
PYTHON=${PYTHON:-python3}
# After SeqKD, this came closest to the teacher (docs/experiments.md): the discriminator leads alone for the whole warmup,
# its rate is three times the policy's, and the policy's falls to 0.
LEAD=(trainer.critic_warmup=1000000 critic.optim.lr=3e-6)
AFTER_LEAD=(
  critic.optim.lr=3e-6 actor_rollout_ref.actor.optim.lr_scheduler_type=cosine
  actor_rollout_ref.actor.use_kl_loss=False algorithm.norm_adv_by_std_in_grpo=False gad.imitation_coef=0.2
)

flags_help() {
  cat <<'HELP'
Flags (before any Hydra override):
  --model PATH         student: Hugging Face folder or hub id
  --reward_model PATH  initial discriminator (default: the student)
  --train_files PATH   parquet or JSON lines with columns content (chat messages) and teacher_response
  --val_files PATH     the same for validation (default: 64 rows of the training file)
  --exp_name NAME      name of the run (default: the stage)
  --output_dir DIR     checkpoints, metrics.jsonl, val_samples (default: checkpoints/gad/NAME)
  --nnodes N           nodes of the Ray cluster (default 1)
  --device gpu|cpu     cpu is for small models (settings: recipe/gad/config/device/cpu.yaml)
  --dry-run            print the composed command and exit
  --skip-doctor        do not run `gad doctor` first; the trainer still checks configuration, data and folders
  --raw-log            print all that verl and Ray print; otherwise a line per step, and the rest in DIR/train.log
  --help               show this text
Arguments after the flags override the configuration: any key of recipe/gad/config/gad_trainer.yaml or of verl.
HELP
}

# parse_flags ARGUMENT...: flags of all launch scripts, and those that EXTRA_FLAGS and EXTRA_SWITCHES name.
parse_flags() {
  read_flags "model reward_model exp_name nnodes resume_step train_files val_files warmup_dir output_dir device \
${EXTRA_FLAGS:-}" "dry_run skip_doctor raw_log ${EXTRA_SWITCHES:-}" "$@"
  HYDRA_OVERRIDES=(${REST[@]+"${REST[@]}"})
}

absolute() { # makes a relative local path absolute; hub ids and URLs stay as they are
  case "$1" in
    /*|*://*) printf '%s' "$1" ;;
    *) if [ -e "$1" ]; then printf '%s/%s' "$PWD" "$1"; else printf '%s' "$1"; fi ;;
  esac
}

# check_text FLAG VALUE: refuses what neither Hydra nor verl's files keep as it is.
check_text() {
  local shown; printf -v shown %q "$2"
  case "$2" in
    *[[:cntrl:]]*) fail "$1 has a newline or another control character: $shown; rename it" ;;
    *'$'*) fail "$1 holds $, with which Hydra and Ray mark keys and variables: $shown; rename it" ;;
  esac
  local status=0
  printf %s "$2" | iconv -f UTF-8 -t UTF-8 > /dev/null 2>&1 || status=$?
  [ "$status" != 1 ] || fail "$1 is not UTF-8: $shown; rename it"
}

quoted() { # a text in Hydra's quotes; they take backslashes before a quote in pairs
  printf "'%s'" "$(printf %s "$1" | LC_ALL=C sed -E "s/(\\\\*)'/\\1\\1\\\\'/g; s/(\\\\+)\$/\\1\\1/")"
}

text() { # a path or name for Hydra: quoted, unless it is a plain path, which Hydra takes as text anyway
  case "$1" in
    *[!A-Za-z0-9_./-]*) quoted "$1" ;;
    */*) printf %s "$1" ;;
    *) quoted "$1" ;; # 10, 1e5 or null would be no text
  esac
}

# launch STAGE [KEY=VALUE ...]: starts verl with the overrides of the stage, the flags and the user, in this order.
launch() {
  local stage=$1; shift
  [ -n "$MODEL" ] || fail "--model is missing: the student's Hugging Face folder or hub id"
  [ -n "$TRAIN_FILES" ] || fail "--train_files is missing: a parquet file with content and teacher_response"
  case "$DEVICE" in gpu|cpu) ;; *) fail "--device must be gpu or cpu, got $DEVICE" ;; esac
  case "$NNODES" in *[!0-9]*) fail "--nnodes must be a whole number, got $NNODES" ;; esac
  local flag variable
  for flag in model reward_model train_files val_files exp_name output_dir warmup_dir; do
    variable=${flag^^}
    check_text "--$flag" "${!variable}"
  done
  check_text "the current folder" "$PWD"
  for variable in TRAIN_FILES VAL_FILES; do
    local path; path="$(absolute "${!variable}")"
    case "$path" in *[*?[]*|*::*)
      fail "--${variable,,} $path: verl's reader takes *, ?, [ and :: in a path as a pattern; rename the file or its folder" ;;
    esac
  done
  EXP_NAME=${EXP_NAME:-$stage}
  OUTPUT_DIR=${OUTPUT_DIR:-checkpoints/gad/$EXP_NAME}
  case "$OUTPUT_DIR" in /*) ;; *) OUTPUT_DIR="$PWD/$OUTPUT_DIR" ;; esac
  local environment=(VERL_FILE_LOGGER_PATH="$OUTPUT_DIR/metrics.jsonl" VERL_FILE_LOGGER_APPEND=1)
  if [ "$DEVICE" = cpu ]; then
    environment+=(VERL_PLATFORM=cpu)
    if [ "$NNODES" = 1 ] && [ -z "${RAY_ADDRESS:-}" ]; then # Ray's services listen on the loopback address alone
      environment+=(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="${RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER:-0}")
    fi
  else # verl disables the cache, see docs/troubleshooting.md
    environment+=(VLLM_DISABLE_COMPILE_CACHE="${VLLM_DISABLE_COMPILE_CACHE:-0}")
  fi
  local overrides=(
    device="$DEVICE"
    "$@"
    gad.stage="$stage"
    actor_rollout_ref.model.path="$(text "$(absolute "$MODEL")")"
    critic.model.path="$(text "$(absolute "${REWARD_MODEL:-$MODEL}")")"
    data.train_files="$(text "$(absolute "$TRAIN_FILES")")"
    data.val_files="$(text "$(absolute "${VAL_FILES:-$TRAIN_FILES}")")"
    trainer.nnodes="$NNODES"
    trainer.experiment_name="$(text "$EXP_NAME")"
    trainer.default_local_dir="$(text "$OUTPUT_DIR")"
    trainer.validation_data_dir="$(text "$OUTPUT_DIR/val_samples")"
    hydra.run.dir="$(text "$OUTPUT_DIR/hydra")"
  )
  [ -n "$RAW_LOG" ] || overrides+=(hydra.callbacks.short_console.raw_log="$(text "$OUTPUT_DIR/train.log")")
  [ -n "$VAL_FILES" ] || overrides+=(data.val_max_samples=64)
  for variable in "${environment[@]}"; do # Ray workers on other nodes do not inherit this shell's environment
    overrides+=("+ray_kwargs.ray_init.runtime_env.env_vars.${variable%%=*}=$(quoted "${variable#*=}")")
  done
  overrides+=(${HYDRA_OVERRIDES[@]+"${HYDRA_OVERRIDES[@]}"})
  local command=(
    "$PYTHON" -m verl.trainer.main_ppo --config-path pkg://recipe.gad.config --config-name gad_trainer "${overrides[@]}"
  )
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' env "${environment[@]}" "${command[@]}"; echo
    return 0
  fi
  "$PYTHON" -c 'import recipe.gad.plugin' 2>/dev/null ||
    fail "verl-gad is not installed for $PYTHON; run: pip install -e $(dirname "${BASH_SOURCE[0]}")/../.."
  [ -n "${CUDA_VISIBLE_DEVICES:-}" ] || unset CUDA_VISIBLE_DEVICES # an empty value kills Ray
  [ -n "$SKIP_DOCTOR" ] || command=("$PYTHON" -m recipe.gad.launch "${command[@]:1}") # the doctor, then the trainer
  exec env "${environment[@]}" "${command[@]}" # exec: a signal to this script reaches the trainer
}
