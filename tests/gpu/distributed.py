"""One process of `test_layer_gpu.test_distributed_mesh`: groups of two, beside each other along "dp"."""

import os

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_moe import HIDDEN, ROUTER, dense, make_config, make_params, make_tokens

import jax_nixlep as nx
from jax_nixlep.launch import rank_env

env = rank_env()
for name in ("JAX_NIXLEP_RANK", "JAX_NIXLEP_NUM_RANKS", "JAX_NIXLEP_STORE"):
    del os.environ[name]  # the group finds its store through jax.distributed, as in a job that another launcher started
jax.distributed.initialize(env.coordinator, env.num_ranks, env.rank)
mesh = Mesh(np.array(jax.devices()).reshape(-1, 2), ("dp", "ep"))
config = make_config(2)
group = nx.initialize(config, mesh=mesh, timeout_s=40)
params, x = make_params(biases=True), make_tokens()


def put(value, spec):
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])


specs, tokens = nx.param_specs(params), P(("dp", "ep"))
layer = jax.jit(lambda x, params: nx.nixlep_moe(x, params, config=config, router=ROUTER, mesh=mesh)[0])
spread = put(x, tokens), {name: put(value, specs[name]) for name, value in params.items()}
with jax.default_device(jax.local_devices()[0]):
    want = np.asarray(jax.jit(dense)(x.reshape(-1, HIDDEN), params)[0]).reshape(x.shape)
for _ in range(3):
    for shard in layer(*spread).addressable_shards:
        np.testing.assert_allclose(shard.data, want[shard.index], rtol=2e-5, atol=1e-5)
assert "all-reduce" not in layer.lower(*spread).compile().as_text()
other = group.health().peers[1 - group.rank]
print(f"groups of {len(group.members)} over {other.path}: right", flush=True)
nx.shutdown()
