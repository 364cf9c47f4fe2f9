"""A chain of 32 layers (dispatch, combine) in one program on one rank: wall time of an operation, with command buffers
and without.

    python chain.py graphs|plain
"""

import os
import sys
import time

LAYERS, REPEATS = 32, 30
graphs = sys.argv[1] == "graphs"
os.environ |= {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "CUDA_MODULE_LOADING": "EAGER",
    "XLA_FLAGS": "--xla_gpu_graph_min_graph_size=1" if graphs else "--xla_gpu_enable_command_buffer=",
}
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jax_nixlep as nx  # noqa: E402
from jax_nixlep import _cuda  # noqa: E402

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


for _ in range(5):
    x_out = chain(x).block_until_ready()
before, start = _cuda.num_launches(), time.perf_counter()
for _ in range(REPEATS):
    x_out = chain(x)
x_out.block_until_ready()
us = (time.perf_counter() - start) / REPEATS / LAYERS / 2 * 1e6
print(
    f"chain {sys.argv[1]}: {us:.1f} us per operation, {(_cuda.num_launches() - before) / REPEATS:.1f} handler calls per"
    f" chain of {2 * LAYERS} operations, failure {nx.current_group().health().failure!r}"
)
