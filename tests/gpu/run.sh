#!/bin/bash
# The GPU suite. One command, from the repository root, on a machine with a GPU; what each step is: results/README.md.
#   OUT=DIR bash tests/gpu/run.sh [tests] [layer] [generate] [elastic] [decode] [chain] [sanitizer] [phases] [mps]
# OUT gets the raw output. Fails if a step does. The package must be installed with its CUDA module (README.md);
# the headers of libucx-cu13 are for `sanitizer`, torch and a nixl_ep built for it for upstream's side of
# `phases`. WHEELS: for a machine without a network (tests/gpu/setup.sh).
# JAX_NIXLEP_TEST_GPUS: rank r uses GPU r % that number, of those that CUDA_VISIBLE_DEVICES names: calls with a GPU each
# may run at the same time. CASES: lines of arguments of phases.py. DROPLESS=1: also the worst case of rows.
# PYTEST_ARGS: for the tests. DECODE_ARGS: for examples/bench_decode.py.
set -o pipefail
nvidia-smi -L || { echo "tests/gpu/run.sh: needs an NVIDIA GPU and its driver; nvidia-smi shows none"; exit 1; }
. tests/gpu/setup.sh
export JAX_NIXLEP_TEST_GPUS=${JAX_NIXLEP_TEST_GPUS:-1}
OUT=${OUT:-out} failed=0
mkdir -p "$OUT"
steps=${*:-tests layer generate elastic decode chain sanitizer phases mps}
{
  date -u +%FT%TZ
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  nvcc --version | tail -1
  python3 -c "import sys, jax, numpy; print('python', sys.version.split()[0], 'jax', jax.__version__, 'numpy', numpy.__version__)"
  python3 -c "import importlib.metadata as m; print('nixl-cu13', m.version('nixl-cu13'))"
} 2>&1 | tee "$OUT/machine.txt"

run_tests() {  # SECONDS NAME ARGUMENTS...
  timeout "$1" python3 -m pytest -q -p no:cacheprovider --timeout 90 --durations=5 $PYTEST_ARGS "${@:3}" 2>&1 |
    tee "$OUT/$2.txt" || failed=1
}
layer=tests/gpu/test_layer_gpu.py generate=tests/gpu/test_examples_gpu.py elastic=tests/gpu/test_elastic_gpu.py
if [[ $steps == *tests* ]]; then run_tests 800 tests tests/gpu --ignore $layer --ignore $generate --ignore $elastic; fi
if [[ $steps == *layer* ]]; then run_tests 400 layer $layer; fi
if [[ $steps == *generate* ]]; then run_tests 300 generate $generate; fi
if [[ $steps == *elastic* ]]; then
  run_tests 300 elastic $elastic
  JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false CUDA_MODULE_LOADING=EAGER timeout 200 \
    python3 -m jax_nixlep.bench_elastic --transports shared --json "$OUT/elastic.json" 2>&1 |
    tail -9 | tee "$OUT/elastic_figures.txt" || failed=1
fi

if [[ $steps == *decode* ]]; then  # cuBLAS: a program of its own kind for each matmul takes minutes to tune
  XLA_FLAGS=--xla_gpu_enable_triton_gemm=false timeout 300 python3 examples/bench_decode.py --gpu \
    --json "$OUT/decode.json" $DECODE_ARGS 2>&1 | tee "$OUT/decode.txt" || failed=1
fi

if [[ $steps == *sanitizer* ]]; then
  UCX_INCLUDE=${UCX_INCLUDE:-$(python3 -c "import importlib.util as u; print(u.find_spec('libucx').submodule_search_locations[0])")/include}
  nvcc -std=c++20 -arch=native -O3 -lineinfo -fmad=false --expt-relaxed-constexpr -Iffi -isystem "$UCX_INCLUDE" \
    tests/gpu/kernel_phases.cu ffi/cuda/*.cu -o /tmp/kernel_phases && tools="memcheck racecheck synccheck" || failed=1
  rm -f "$OUT/sanitizer.txt"
  for tool in $tools; do
    for case in "4 5 1024 3 8 1 0 0" "2 130 1024 40 8 1 0 1.5" "4 9 1024 8 4 1 1 0" "4 33 1024 650 8 1 0 1.5"; do
      { echo "$tool: $case"; timeout 100 compute-sanitizer --tool $tool --error-exitcode 9 /tmp/kernel_phases $case; } 2>&1 |
        tail -5 | tee -a "$OUT/sanitizer.txt" || failed=1
    done
  done
fi

if [[ $steps == *chain* ]]; then
  rm -f "$OUT/chain.txt"
  for buffers in graphs plain; do
    JAX_PLATFORMS=cuda timeout 60 python3 tests/gpu/chain.py $buffers 2>&1 | grep -E "^chain|Error" |
      tee -a "$OUT/chain.txt" || failed=1
  done
fi

if [[ $steps == *phases* ]]; then
  rm -f "$OUT/phases.txt"
  phases() {
    JAX_PLATFORMS=cuda timeout 100 python3 tests/gpu/phases.py "$@" 2>&1 | grep -E "^[{0-9]|Error" |
      tee -a "$OUT/phases.txt" || failed=1
  }
  with_upstream() { PYTHONPATH=$JAX_NIXLEP_TEST_UPSTREAM:$PYTHONPATH "$@"; }
  while read -r case; do
    set -- $case
    factor=1.125  # rows that hold any routing drawn here; one token: the worst case, as no fewer rows are certain
    [[ $2 == 1 ]] && factor=0
    phases ours $case $factor
    if with_upstream python3 -c "import torch, nixl_ep_cu13" 2>/dev/null; then with_upstream phases nixl_ep $case; fi
  done <<< "${CASES:-4 1 7168 32 8 20 0
4 128 7168 32 8 20 0
4 128 7168 32 8 20 1
2 128 7168 8 8 20 0
4 1024 7168 8 8 10 0}"
  if [[ -n $DROPLESS ]]; then phases ours 4 128 7168 32 8 20 0 0; fi
fi

if [[ $steps == *mps* ]]; then  # ranks use the GPU at the same time
  export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
  export CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
  env -u CUDA_VISIBLE_DEVICES nvidia-cuda-mps-control -d || exit 1  # it would number the devices anew
  trap 'echo quit | nvidia-cuda-mps-control' EXIT
  rm -f "$OUT/mps_bench.txt"
  for ranks in 2 4; do
    timeout 100 python3 -m jax_nixlep.bench --ranks $ranks --gpus 1 --kernels native --json "$OUT/mps_bench$ranks.json" 2>&1 |
      tee -a "$OUT/mps_bench.txt" || failed=1
  done
  run_tests 600 mps -m "not kills" tests/gpu/test_gpu.py $elastic
fi
exit $failed
