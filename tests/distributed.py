"""One process of `test_moe.test_distributed_mesh`."""

import os

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_moe import HIDDEN, ROUTER, dense, make_config, make_params, make_tokens

import jax_nixlep as nx
from jax_nixlep.launch import rank_env

env = rank_env()
for name in [name for name in os.environ if name.startswith("JAX_NIXLEP_")]:
    del os.environ[name]  # the group finds its store through jax.distributed, as in a job that another launcher started
jax.distributed.initialize(env.coordinator, env.num_ranks, env.rank)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("dp", "ep"))
config = make_config(2)
group = nx.initialize(config, mesh=mesh, timeout_s=60)
params, x = make_params(biases=True), make_tokens()


def put(value, spec):
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])


def loss(x, params):
    y, aux = nx.nixlep_moe(x, params, config=config, router=ROUTER, mesh=mesh)
    return (y**2).sum() + aux.loss, y


specs = nx.param_specs(params)
tokens = P(("dp", "ep"))
step = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True))
(_, y), gradients = step(put(x, tokens), {name: put(value, specs[name]) for name, value in params.items()})


def want_loss(params):
    y, routing = dense(x.reshape(-1, HIDDEN), params)
    return (y**2).sum() + routing.aux_loss, y


(_, want), want_gradients = jax.jit(jax.value_and_grad(want_loss, has_aux=True))(params)
for shard in y.addressable_shards:
    np.testing.assert_allclose(shard.data, np.asarray(want).reshape(x.shape)[shard.index], rtol=2e-5, atol=1e-5)
for name, gradient in gradients.items():
    for shard in gradient.addressable_shards:
        np.testing.assert_allclose(shard.data, np.asarray(want_gradients[name])[shard.index], rtol=1e-4, atol=1e-4)
assert len(group.members) == 2
other = group.health().peers[1 - group.rank]
print(f"groups of {len(group.members)} over {other.path}: right", flush=True)
