#!/usr/bin/env bash
# Everything that is measured on one GPU, within 10 minutes: correctness, one MoE layer, a training step, planned beside
# allocated memory, the optimizer's step, checkpoints. Writes a JSON file for each part and docs/gpu.md's tables from them.
#
#   benchmarks/gpu.sh [--size quick] [--out FOLDER] [PART ...]
#
# FOLDER (or $OUT): where the files go, docs/gpu by default; with another one the page is written there, too.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
words=("$@")
out=${OUT:-$here/../docs/gpu}
for ((i = 0; i < $#; i++)); do
  [ "${words[i]}" = --out ] && out=${words[i + 1]}
done
export PYTHONPATH="$here/..:$here${PYTHONPATH:+:$PYTHONPATH}"
python3 "$here/gpu_parts.py" --out "$out" "$@"
ended=$?
python3 "$here/gpu_tables.py" --results "$out"
exit $ended
