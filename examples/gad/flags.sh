# Reads the flags of the scripts in this folder. Sourced, not run.

fail() { # without the control characters of what was given
  local message="error: $*"
  printf '%s\n' "${message//[[:cntrl:]]/?}" >&2
  exit 2
}

# read_flags "NAME ..." "SWITCH ..." ARGUMENT...
# --name VALUE sets NAME=VALUE, --switch sets SWITCH=1, --help calls usage; - and _ in a name are the same.
# REST gets the arguments after the flags. The first one that is no flag ends them, and so does --.
read_flags() {
  local names=" $1 " switches=" $2 " name word; shift 2
  while [ $# -gt 0 ]; do
    case "$1" in
      --help|-h) usage; exit 0 ;;
      --) shift; break ;;
      --*) name=${1#--} name=${name//-/_} ;;
      *=*)
        for word in "$@"; do
          case "$word" in --?*) fail "$word comes after $1; write all flags before the first key=value" ;; esac
        done
        break ;;
      *) break ;;
    esac
    case "$switches" in *" $name "*) printf -v "${name^^}" 1; shift; continue ;; esac
    case "$names" in *" $name "*) ;; *) fail "unknown flag $1; see --help" ;; esac
    case "${2-}" in ''|--*) fail "$1 needs a value${2+, got ${2:-an empty one}}; see --help" ;; esac
    printf -v "${name^^}" %s "$2"
    shift 2
  done
  REST=("$@")
}

no_arguments() { # for scripts that take flags only
  [ $# = 0 ] || fail "unknown argument $1; see --help"
}

# stoppable COMMAND...: runs it, and passes SIGINT, SIGTERM and SIGUSR1 on to it. After one, the script ends with the
# command's exit code: a stage that was stopped has exit code 0, but the next one must not start. STOPPED_BY names the
# signal, or is empty.
stoppable() {
  local pid="" status=0 name
  STOPPED_BY=""
  for name in INT TERM USR1; do
    trap "STOPPED_BY=$name; "'[ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null' "$name"
  done
  "$@" & pid=$!
  [ -z "$STOPPED_BY" ] || kill -TERM "$pid" 2>/dev/null # it came before pid was known
  wait "$pid" || status=$?
  while kill -0 "$pid" 2>/dev/null; do status=0; wait "$pid" || status=$?; done # a signal interrupts wait
  trap - INT TERM USR1
  [ -z "$STOPPED_BY" ] || exit "$status"
  return "$status"
}
