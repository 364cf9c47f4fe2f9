"""The layer, the Flax modules and the maths under them on GPUs: the functions of the CPU's tests, with their bounds."""

import functools
import importlib
import inspect
import itertools
import os
import subprocess
import sys
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
import test_flax
import test_moe
from ranks import child_env
from test_moe import HIDDEN, ROUTER, dense, make_config, make_params

import jax_nixlep as nx

NUM_GPUS = int(os.environ.get("JAX_NIXLEP_TEST_GPUS", "1"))
POOLS = [
    (1, "pointer", "graphs"),
    (2, "pointer", "graphs"),
    (2, "pointer", "plain"),
    (2, "put", "graphs"),
    (4, "pointer", "graphs"),
]


@pytest.fixture(scope="module", params=POOLS, ids=lambda pool: "-".join(map(str, pool)))
def pool(request, gpu_pools):
    pool = gpu_pools(*request.param)
    assert set(pool.run(rank_backend)) == {"gpu"}
    return pool


def rank_backend(_job):
    return jax.default_backend()


@pytest.mark.parametrize(("biases", "chunk_tokens"), [(False, None), (True, 5)])
def test_independent_processes(pool, biases, chunk_tokens):
    """jit, grad, remat, and with chunks a scan."""
    test_moe.test_independent_processes(lambda *_: pool, pool.num_ranks, "pointer", biases, chunk_tokens)


def test_flax_modules(pool):
    test_flax.test_independent_processes_hold_one_model(lambda *_: pool)


# --- Layers in a scan, forward and backward, again and again. ---

LAYERS = 3


def tokens_of(num_ranks):
    return np.random.default_rng(3).standard_normal((num_ranks, 12, HIDDEN)).astype(np.float32)


def deep(layer, x):
    """A scan whose steps are recomputed in the backward pass."""
    return jax.lax.scan(jax.checkpoint(lambda h, _: (h + layer(h), None)), x, length=LAYERS)[0]


def rank_scan(job, repeats):
    config = make_config(job.num_ranks)
    job.initialize(config)
    mine = slice(job.rank * config.experts_per_rank, (job.rank + 1) * config.experts_per_rank)
    params = {k: v[mine] if k in ("wi_0", "wi_1", "wo") else v for k, v in make_params().items()}

    def loss(x, params, placement):
        y = deep(lambda h: nx.nixlep_moe(h, params, config=config, router=ROUTER, placement=placement)[0], x)
        return (y**2).sum() / 1000, y

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    x, placement = tokens_of(job.num_ranks)[job.rank], nx.current_group().placement
    return [jax.tree.map(np.asarray, step(x, params, placement)) for _ in range(repeats)]


def test_scan(pool):
    answers = pool.run(rank_scan, 4)
    x, params = tokens_of(pool.num_ranks).reshape(-1, HIDDEN), make_params()

    def loss(x, params):
        y = deep(lambda h: dense(h, params)[0], x)
        return (y**2).sum() / 1000, y

    (_, y), (x_bar, p_bar) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, params)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=4e-6)
    for repeat in zip(*answers, strict=True):
        close(np.concatenate([got[0][1] for got in repeat]), y)
        close(np.concatenate([got[1][0] for got in repeat]), x_bar)
        for name, gradient in p_bar.items():
            parts = [got[1][1][name] for got in repeat]
            total = np.concatenate(parts) if name in ("wi_0", "wi_1", "wo") else sum(parts)
            close(total, gradient, err_msg=name)
    for first, *others in answers:  # the same bits, whatever the timing
        for other in others:
            np.testing.assert_array_equal(other[0][1], first[0][1])


# --- Meshes. ---


def assert_gpu():
    assert jax.default_backend() == "gpu"


ONE = [((1,), ("ep",), {}), ((1, 1), ("dp", "ep"), {"config": {"wire": "bf16"}})]
TWO = [((2,), ("ep",), {}), ((1, 2), ("dp", "ep"), {"config": {"wire": "bf16"}}), ((1, 2), ("ep", "tp"), {})]
FOUR = [((2, 2), ("dp", "ep"), {}), ((2, 2), ("ep", "tp"), {}), ((2, 2), ("pp", "ep"), {"token_axes": ("ep",)})]


@pytest.mark.parametrize(("shape", "names", "options"), ONE + TWO + FOUR)
def test_mesh_of_one_process(on_all_gpus, shape, names, options):
    if np.prod(shape) > NUM_GPUS:
        pytest.skip(f"needs {np.prod(shape)} GPUs")
    on_all_gpus(assert_gpu)
    on_all_gpus(test_moe.mesh_job, shape, names, **options)


@test_moe.crashes_in_shardy
@pytest.mark.skipif(NUM_GPUS < 2, reason="needs 2 GPUs")
def test_scan_and_order_of_a_mesh(on_all_gpus):
    on_all_gpus(test_moe.scan_and_order_job)


@pytest.mark.skipif(NUM_GPUS < 4, reason="needs 4 GPUs")
def test_own_shard_map(on_all_gpus):
    on_all_gpus(test_moe.own_shard_map_job)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_distributed_mesh(num_ranks):
    """Processes of one jax.distributed job; where they share a GPU there can be no NCCL, so the forward pass only."""
    program = Path(__file__).parent / "distributed.py"
    command = [sys.executable, "-m", "jax_nixlep.launch", "-n", num_ranks, "--gpus", NUM_GPUS, "--timeout", 75, program]
    path = os.pathsep.join([str(Path(test_moe.__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = child_env(
        PYTHONPATH=path,
        JAX_DISABLE_MOST_OPTIMIZATIONS="0",
        JAX_DEFAULT_MATMUL_PRECISION="highest",
        UCX_LOG_LEVEL="error",
    )
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=85, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.count("groups of 2 over pointer: right") == num_ranks, done.stdout


# --- Maths that depends on the platform: grouped matmuls, and top-k with ties. ---

MATHS = {
    "test_experts": [
        "test_values_and_gradients", "test_bfloat16_accumulates_in_float32", "test_any_sizes",
        "test_fewer_rows_than_a_block", "test_activations",
    ],
    "test_router": [
        "test_ties_go_to_the_lowest_id", "test_masked_tokens_go_nowhere", "test_deepseek_v3",
        "test_always_distinct_experts_of_the_best_scores",
    ],
}  # fmt: skip


def cases_of(test):
    """The arguments with which pytest would call `test`, a function that is parametrized and takes no fixture but the
    name of a backend."""
    choices = []
    for mark in getattr(test, "pytestmark", []):
        names, values = mark.args
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        choices.append([dict(zip(names, value if len(names) > 1 else (value,), strict=True)) for value in values])
    backend = {"backend": "ragged_dot"} if "backend" in inspect.signature(test).parameters else {}
    return [functools.reduce(dict.__or__, parts, backend) for parts in itertools.product(*choices)]


def rank_maths(_job, module, name):
    """Calls a test on this rank's device; returns what failed."""
    test, failed = getattr(importlib.import_module(module), name), {}
    for case in cases_of(test):
        try:
            test(**case)
        except Exception:
            failed[str(case)] = traceback.format_exc(limit=-3)
    return failed


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in MATHS.items() for name in names])
def test_maths(gpu_pools, module, name):
    pool = gpu_pools(1)
    assert pool.run(rank_backend) == ["gpu"]
    failed = pool.run(rank_maths, module, name)[0]
    assert not failed, "\n".join(f"{case}:\n{text}" for case, text in failed.items())
