#!/usr/bin/env bash
# One lease of a GPU: the tests marked gpu, then what each fast path brings; within eight minutes.
#
#     OUT=benchmarks/results/DATE_cuda benchmarks/lease.sh [--only train,profile] [--seconds 300]
#
# Options and sections: lease.py. Writes $OUT/lease.json, after each section, and what was printed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 OUT=${OUT:-/tmp/lease}
mkdir -p "$OUT"
{
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv,noheader
    lscpu | grep -E "^(Model name|CPU\(s\))"
    "${PYTHON:-python3}" benchmarks/lease.py "$@" 2>"$OUT/errors.txt"
} | tee "$OUT/lease.txt"
