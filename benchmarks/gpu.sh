#!/usr/bin/env bash
# The tests marked gpu, then all benchmarks on a GPU; within ten minutes.
#
#     OUT=benchmarks/results benchmarks/gpu.sh
#
# Writes $OUT/<date>_cuda_<benchmark>.json and .txt; what cannot run says why and does not stop the
# rest. Peers: pip install denoising-diffusion-pytorch diffusers.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
day=$(date -u +%F)
mkdir -p "$out"

timeout 150 python -m pytest -q -m gpu -p no:cacheprovider tests 2>&1 | tee "$out/${day}_cuda_tests.txt"

bench() { # name, seconds at most, arguments of python
    local log="$out/${day}_cuda_$1.txt"
    timeout "$2" python "${@:3}" >"$log" 2>&1 || echo "stopped with status $?" >>"$log"
    grep '^{' "$log" | tail -1 >"$out/${day}_cuda_$1.json"
    sed '/^{/d' "$log" | tail -30
}

bench train_step_64px 70 benchmarks/train_step.py --dim 128 --size 64 --batch_size 64 --repeats 10
bench train_step_64px_compiled 150 benchmarks/train_step.py --dim 128 --size 64 --batch_size 64 --repeats 5 --compile
bench sample 130 benchmarks/sample.py --counts 1,16 --repeats 3
bench sd_step 60 benchmarks/sd_step.py --repeats 10
bench startup 40 benchmarks/startup.py --repeats 1
