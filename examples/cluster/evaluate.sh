#!/usr/bin/env bash
# Evaluates SeqKD, warmup and GAD of one output folder and compares them.
set -euo pipefail
# shellcheck source=examples/gad/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/../gad/flags.sh"

usage() {
  cat <<'HELP'
usage: evaluate.sh --val_files PATH --output_dir DIR [-- option of gad eval ...]
  --val_files PATH  held-out rows
  --output_dir DIR  folder with seqkd, warmup and gad; the scores go to DIR/eval
HELP
}

VAL_FILES="" OUTPUT_DIR=""
read_flags "val_files output_dir" "" "$@"
[ -n "$VAL_FILES" ] && [ -n "$OUTPUT_DIR" ] || fail "--val_files and --output_dir are needed; see --help"
gad=("${PYTHON:-python3}" -m recipe.gad.cli eval)
for run in seqkd warmup gad; do
  "${gad[@]}" --model "$OUTPUT_DIR/$run" --val_files "$VAL_FILES" --output_dir "$OUTPUT_DIR/eval/$run" \
    ${REST[@]+"${REST[@]}"}
done
"${gad[@]}" compare "$OUTPUT_DIR"/eval/{seqkd,warmup,gad} --output "$OUTPUT_DIR/eval/compare.json"
