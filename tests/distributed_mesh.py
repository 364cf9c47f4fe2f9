"""One process of `test_elastic_mesh.test_part_of_a_jax_distributed_world`."""

import jax
import numpy as np
from jax.sharding import Mesh
from test_elastic_mesh import CONFIG, EXPERTS, Compiles, check

import jax_nixlep as nx
from jax_nixlep.elastic import ElasticMesh
from jax_nixlep.launch import rank_env

env = rank_env()
jax.distributed.initialize(env.coordinator, env.num_ranks, env.rank)
world = Mesh(np.array(jax.devices()), ("ep",))
group = nx.initialize(CONFIG, mesh=world, timeout_s=20)
mesh = ElasticMesh(group, world, num_experts=EXPERTS)
check(mesh, 0)
compiles = []
for step, members in enumerate([(0, 2, 3), (1, 3), (0, 1, 2, 3), (0, 2, 3), (1, 3), (0, 1, 2, 3)]):
    mesh.resize(members)
    assert mesh.members == members and [device.process_index for device in mesh.mesh.devices] == list(members)
    with Compiles() as counted:
        if group.rank in members:
            check(mesh, step)
    compiles.append(counted.count)
assert compiles[2:] == [0] * 4, compiles
print("right in every membership", flush=True)
