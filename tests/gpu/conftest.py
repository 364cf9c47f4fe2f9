"""Pools of rank processes that share the machine's GPUs. Run through tests/gpu/run.sh; needs a GPU."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from ranks import RankPool, without_job

if not os.environ.get("JAX_NIXLEP_TEST_GPUS"):
    collect_ignore_glob = ["test_*.py"]
NUM_GPUS = int(os.environ.get("JAX_NIXLEP_TEST_GPUS", "1"))  # rank r uses GPU r % NUM_GPUS

_FLAGS = {
    "graphs": "--xla_gpu_graph_min_graph_size=1",
    "plain": "--xla_gpu_enable_command_buffer=",
}


def gpu_env(transport="pointer", buffers="graphs"):
    return {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # the tests' bounds are those of float32, not of TensorFloat32
        "JAX_PLATFORMS": "cuda",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "CUDA_MODULE_LOADING": "EAGER",  # a lazily loaded kernel would wait behind a peer's spinning one
        "JAX_NIXLEP_P2P": "0" if transport == "put" else "1",
        # Without autotuning programs compile sooner, and equal matmuls are equal in all of them.
        "XLA_FLAGS": _FLAGS[buffers] + " --xla_gpu_autotune_level=0",
        "UCX_LOG_LEVEL": "error",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # that of the tests on CPUs
        "JAX_NIXLEP_TEST_GPUS": str(NUM_GPUS),
    }


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker("gpu")


@pytest.fixture(scope="session")
def env_of():
    """env_of(transport, buffers): the environment of a rank."""
    return gpu_env


@pytest.fixture(scope="session")
def gpu_pools():
    """pool(n, transport, buffers): n rank processes, one kind of pool at a time."""
    made = {}

    def pool(num_ranks, transport="pointer", buffers="graphs"):
        key = (num_ranks, transport, buffers)
        if key not in made or not made[key].alive():
            for other in made.values():
                other.close()
            made.clear()
            made[key] = RankPool(num_ranks, gpu_env(transport, buffers))
        return made[key]

    yield pool
    for p in made.values():
        p.close()


@pytest.fixture(scope="module")
def on_all_gpus():
    """call(function, *args): function(*args) in a process, kept for the module, that has all GPUs as its devices."""
    env = gpu_env()
    del env["JAX_NIXLEP_TEST_GPUS"]
    made = []

    def call(function, *args, **kwargs):
        if not made or not made[-1].alive():
            made.append(RankPool(1, env))
        made[-1].run(without_job, function.__module__, function.__name__, args, kwargs, timeout_s=120)

    yield call
    for p in made:
        p.close()
