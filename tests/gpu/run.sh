#!/bin/bash
# The GPU suite. One command, from the repository root, on a machine with a GPU; what each step is: results/README.md.
#   WHEELS=DIR OUT=DIR bash tests/gpu/run.sh [tests] [layer] [generate] [elastic] [decode] [chain] [sanitizer] [phases] [mps]
# WHEELS holds nixl.tar.xz and ucx.tar.xz (tests/gpu/setup.sh); OUT gets the raw output. The modules must be built
# (pip install -e . with nvcc and UCX's headers present), or are found in jax_nixlep/.
# JAX_NIXLEP_TEST_GPUS: rank r uses GPU r % that number, of those that CUDA_VISIBLE_DEVICES names: calls with a GPU each
# may run at the same time. UPSTREAM: a program that prints upstream's phase times for the same
# arguments as phases.py (none: ours alone). CASES: lines of those arguments. DROPLESS=1: also the worst case of rows.
# PYTEST_ARGS: for the tests. DECODE_ARGS: for examples/bench_decode.py.
. tests/gpu/setup.sh
export JAX_NIXLEP_TEST_GPUS=${JAX_NIXLEP_TEST_GPUS:-1}
OUT=${OUT:-out}
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
  timeout "$1" python3 -m pytest -q -p no:cacheprovider --timeout 90 --durations=5 $PYTEST_ARGS "${@:3}" 2>&1 | tee "$OUT/$2.txt"
}
layer=tests/gpu/test_layer_gpu.py generate=tests/gpu/test_examples_gpu.py elastic=tests/gpu/test_elastic_gpu.py
if [[ $steps == *tests* ]]; then run_tests 800 tests tests/gpu --ignore $layer --ignore $generate --ignore $elastic; fi
if [[ $steps == *layer* ]]; then run_tests 400 layer $layer; fi
if [[ $steps == *generate* ]]; then run_tests 300 generate $generate; fi
if [[ $steps == *elastic* ]]; then
  run_tests 300 elastic $elastic
  JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false CUDA_MODULE_LOADING=EAGER timeout 200 \
    python3 -m jax_nixlep.bench_elastic --transports shared --json "$OUT/elastic.json" 2>&1 | tail -9 | tee "$OUT/elastic_figures.txt"
fi

if [[ $steps == *decode* ]]; then  # cuBLAS: a program of its own kind for each matmul takes minutes to tune
  XLA_FLAGS=--xla_gpu_enable_triton_gemm=false timeout 300 python3 examples/bench_decode.py --gpu \
    --json "$OUT/decode.json" $DECODE_ARGS 2>&1 | tee "$OUT/decode.txt"
fi

if [[ $steps == *sanitizer* ]]; then
  nvcc -std=c++20 -arch=sm_90 -O3 -lineinfo -fmad=false --expt-relaxed-constexpr -Iffi -isystem $UCX/include \
    tests/gpu/kernel_phases.cu ffi/cuda/*.cu -o /tmp/kernel_phases
  for tool in memcheck racecheck synccheck; do
    for case in "4 5 1024 3 8 1 0 0" "2 130 1024 40 8 1 0 1.5" "4 9 1024 8 4 1 1 0" "4 33 1024 650 8 1 0 1.5"; do
      echo "$tool: $case"
      timeout 100 compute-sanitizer --tool $tool --error-exitcode 9 /tmp/kernel_phases $case 2>&1 | tail -4
    done
  done | tee "$OUT/sanitizer.txt"
fi

if [[ $steps == *chain* ]]; then
  for buffers in graphs plain; do timeout 60 python3 tests/gpu/chain.py $buffers 2>&1 | grep ^chain; done | tee "$OUT/chain.txt"
fi

if [[ $steps == *phases* ]]; then
  while read -r case; do
    set -- $case
    factor=1.125  # rows that hold any routing drawn here; one token: the worst case, as no fewer rows are certain
    [[ $2 == 1 ]] && factor=0
    timeout 100 python3 tests/gpu/phases.py $case $factor 2>&1 | grep -E "^ours|^[0-9]"
    [[ -n $UPSTREAM ]] && PYTHONPATH=$SITE/s14 timeout 100 python3 "$UPSTREAM" $1 $2 $3 $4 $5 $6 $7 2>&1 | grep -E "^ranks|^[0-9]"
  done <<< "${CASES:-4 1 7168 32 8 20 0
4 128 7168 32 8 20 0
4 128 7168 32 8 20 1
2 128 7168 8 8 20 0
4 1024 7168 8 8 10 0}" | tee "$OUT/phases.txt"
  [[ -n $DROPLESS ]] && timeout 100 python3 tests/gpu/phases.py 4 128 7168 32 8 20 0 0 2>&1 | grep -E "^ours|^[0-9]" | tee -a "$OUT/phases.txt"
fi

if [[ $steps == *mps* ]]; then  # ranks use the GPU at the same time
  export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
  export CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
  env -u CUDA_VISIBLE_DEVICES nvidia-cuda-mps-control -d || exit 1  # it would number the devices anew
  trap 'echo quit | nvidia-cuda-mps-control' EXIT
  for ranks in 2 4; do
    timeout 100 python3 -m jax_nixlep.bench --ranks $ranks --gpus 1 --kernels native --json "$OUT/mps_bench$ranks.json" 2>&1
  done | tee "$OUT/mps_bench.txt"
  run_tests 600 mps tests/gpu/test_gpu.py $elastic
fi
