"""A chain of 32 layers (dispatch, combine) in one program on one rank, with command buffers and without: what an
operation takes, of it its kernels, and the gap that is left.

    python chain.py graphs|plain

"gap" is the time of an operation, taken without a profiler, less that of its kernels, taken with one. "idle" is what
the profiler itself sees between kernels, which it disturbs.
"""

import os
import sys
import time

LAYERS, REPEATS, TRACED = 32, 30, 10
graphs = sys.argv[1] == "graphs"
os.environ |= {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "CUDA_MODULE_LOADING": "EAGER",
    "XLA_FLAGS": "--xla_gpu_graph_min_graph_size=1" if graphs else "--xla_gpu_enable_command_buffer=",
}
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jax_nixlep as nx  # noqa: E402
from jax_nixlep import _ffi  # noqa: E402
from jax_nixlep.bench_kernels import kernels_of, usage  # noqa: E402

config = nx.EpConfig(max_ranks=1, experts_per_rank=8, max_tokens_per_rank=16, hidden=2048, top_k=4, recv_capacity=64)
nx.initialize(config, rank=0, members=[0])
x = jax.random.normal(jax.random.key(0), (16, 2048), jnp.bfloat16)
ids = jax.random.randint(jax.random.key(1), (16, 4), 0, 8)
weights = jnp.full((16, 4), 0.25, jnp.float32)


@jax.jit
def chain(x):
    for _ in range(LAYERS):
        received = nx.dispatch(x, ids, weights, config=config)
        x = nx.combine(received.tokens, received.handle, config=config)
    return x


def run(repeats):
    for _ in range(repeats):
        x_out = chain(x)
    return x_out.block_until_ready()


run(5)
before, start = _ffi.num_launches(), time.perf_counter()
run(REPEATS)
us = (time.perf_counter() - start) / REPEATS / LAYERS / 2 * 1e6
launches = (_ffi.num_launches() - before) / REPEATS
kernels = kernels_of(lambda: run(TRACED))
used, operations = usage(kernels), TRACED * LAYERS * 2
print(
    f"chain {sys.argv[1]}: {us:.1f} us per operation, {launches:.1f} handler calls per chain of {2 * LAYERS}"
    f" operations, failure {nx.current_group().health().failure!r}"
)
if not kernels:
    sys.exit(f"chain {sys.argv[1]}: the profiler saw no kernels on this machine")
ours, all_us, idle = (value / operations for value in (used.ours_us, used.busy_us, used.idle_us))
print(
    f"chain {sys.argv[1]}: of it {used.ours / operations:.2f} kernels of ours {ours:.1f} us, others {all_us - ours:.1f}"
    f" us, gap {us - all_us:.1f} us; idle in the profile {idle:.1f} us"
)
