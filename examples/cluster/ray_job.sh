#!/usr/bin/env bash
# Submits a stage to a running Ray cluster as a Ray job, follows its log, says its status, and stops it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=examples/gad/flags.sh
source "$root/examples/gad/flags.sh"

usage() {
  cat <<'HELP'
usage: ray_job.sh [--name NAME] [--address URL] submit STAGE [flag of run_STAGE.sh ...]
       ray_job.sh [--address URL] logs|status|stop NAME
  --name NAME    name of the job (default: gad-STAGE)
  --address URL  Ray's dashboard (default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265)
submit returns at once. logs follows the output until the job ends. status prints the state; its exit code is 0 unless
the job failed. stop lets the stage finish its step and save. To resume, submit again under a new name.
The repository must have the same path on every node, and all other paths must be absolute.
HELP
}

NAME="" ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
read_flags "name address" "" "$@"
set -- ${REST[@]+"${REST[@]}"}
[ $# -gt 1 ] || fail "name an action and a stage or job; see --help"
action=$1 name=$2; shift 2
case "$action" in
  submit)
    [ -f "$root/examples/gad/run_$name.sh" ] || fail "no stage $name: expected seqkd, warmup, gad, soda or pipeline"
    # Ray waits 3 s between SIGTERM and SIGKILL; a step and a save take longer
    ray job submit --address "$ADDRESS" --no-wait --submission-id "${NAME:-gad-$name}" \
      --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "3600"}}' \
      -- bash "$root/examples/gad/run_$name.sh" "$@" ;;
  logs)
    no_arguments "$@"
    ray job logs --address "$ADDRESS" --follow "$name" ;;
  status)
    no_arguments "$@"
    status=$(ray job status --address "$ADDRESS" "$name" 2>&1) || fail "$status"
    echo "$status"
    case "$status" in *FAILED*) exit 1 ;; esac ;;
  stop)
    no_arguments "$@"
    ray job stop --address "$ADDRESS" --no-wait "$name" ;;
  *) fail "unknown action $action: expected submit, logs, status or stop" ;;
esac
