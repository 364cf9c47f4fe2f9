"""`ElasticMesh`: ranks that are devices of a process, processes of a jax.distributed job, or runtimes of their own."""

import functools
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ranks import child_env
from test_elastic import make_batch, program, serve, start

import jax_nixlep as nx
from jax_nixlep.elastic import ElasticMesh
from jax_nixlep.placement import to_slots

EXPERTS, TOKENS = 4, 8
CONFIG = nx.EpConfig(max_ranks=4, experts_per_rank=2, max_tokens_per_rank=TOKENS, hidden=16, top_k=2, dtype=jnp.float32)


class Compiles:
    """Counts what XLA compiles while it is entered."""

    def __enter__(self):
        self.count = 0
        self._active = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        self._active = False

    def _listen(self, event, duration, **_):
        self.count += self._active and event == "/jax/core/compile/backend_compile_duration"


@functools.partial(jax.jit, static_argnames="mesh")
def layer(mesh, x, ids, gain, placement):
    """Each expert multiplies by its gain; y [ranks, T, H]."""

    def body(x, ids, gain, placement):
        slots = to_slots(placement, ids[0])
        received = nx.dispatch(x[0], slots, config=CONFIG)
        ends = jnp.cumsum(received.group_sizes)
        local = jnp.minimum(jnp.searchsorted(ends, jnp.arange(CONFIG.num_rows), side="right"), 1)
        out = received.tokens * gain[local][:, None]
        return nx.combine(out, received.handle, config=CONFIG)[None]

    specs = (P("ep"), P("ep"), P("ep"), P())
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("ep"))(x, ids, gain, placement)


def check(mesh, step):
    """One step of the members, against numpy; each process of the mesh calls and sees its own part."""
    rng, count = np.random.default_rng(step), len(mesh.members)
    x = rng.integers(-8, 8, (count, TOKENS, CONFIG.hidden)).astype(np.float32)
    ids = np.argsort(rng.random((count, TOKENS, EXPERTS)), axis=-1)[..., :2].astype(np.int32)
    per_rank = CONFIG.experts_per_rank
    rows = np.concatenate([mesh.table[r * per_rank : (r + 1) * per_rank] for r in mesh.members])
    gain = np.where(rows < 0, 0, rows + 1).astype(np.float32)
    sharding = NamedSharding(mesh.mesh, P("ep"))
    sharded = [jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for v in (x, ids, gain)]
    y = layer(mesh.mesh, *sharded, mesh.placement)
    want = (ids + 1).sum(-1, keepdims=True) * x
    for shard in y.addressable_shards:
        np.testing.assert_array_equal(shard.data, want[shard.index])


def test_part_of_a_world():
    world = Mesh(np.array(jax.devices()[:4]), ("ep",))
    group = nx.initialize(CONFIG, mesh=world, timeout_s=20)
    seen = []
    try:
        mesh = ElasticMesh(group, world, num_experts=EXPERTS, on_prepare=seen.append, on_commit=seen.append)
        check(mesh, 0)
        plan = [[0, 2, 3], [3, 1], [0, 1, 2, 3], [0, 2, 3], [1, 3], [0, 1, 2, 3]]
        compiles = []
        for i, members in enumerate(plan):
            mesh.resize(members)
            assert mesh.members == tuple(sorted(members)) == group.health().members or group.rank not in members
            assert list(mesh.mesh.devices) == [jax.devices()[r] for r in sorted(members)]
            with Compiles() as counted:
                check(mesh, i)
            compiles.append(counted.count)
        assert compiles[0] and compiles[1] and compiles[2:] == [0] * 4, compiles
        assert mesh.mesh == world and group.epoch == 7
        changes, switches = seen[::2], seen[1::2]
        assert [c.members for c in changes] == [s.members for s in switches] == [tuple(sorted(m)) for m in plan]
        assert [c.id for c in changes] == [s.change for s in switches]

        for members in ([], [0, 4], [-1]):
            with pytest.raises(ValueError, match=r"members must be ranks in \[0, 4\); got"):
                mesh.resize(members)
        with pytest.raises(ValueError, match="must have at least 4 slots"):
            mesh.resize([2])
        with pytest.raises(ValueError, match="mesh must be the mesh given to initialize for this group; got None"):
            ElasticMesh(group)
        check(mesh, 9)
    finally:
        nx.shutdown()


def test_part_of_a_jax_distributed_world():
    """Four processes of one job: those whose ranks are out skip the steps, and come back."""
    program = str(Path(__file__).parent / "distributed_mesh.py")
    command = [sys.executable, "-m", "jax_nixlep.launch", "-n", "4", "--timeout", "120", program]
    done = subprocess.run(command, env=child_env(), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("right in every membership") == 4


def test_a_failed_prepare_changes_nothing():
    def refuse(change):
        raise RuntimeError(f"not {change.members}")

    world = Mesh(np.array(jax.devices()[:4]), ("ep",))
    group = nx.initialize(CONFIG, mesh=world, timeout_s=20)
    try:
        mesh = ElasticMesh(group, world, num_experts=EXPERTS, on_prepare=refuse)
        with pytest.raises(ValueError, match=r"ElasticMesh.resize: table must have \d+ slots .* got 1 slots"):
            mesh.resize([0, 1], table=[0])
        with pytest.raises(ValueError, match=r"ElasticMesh.resize: table must have .* strays \[\d+"):
            mesh.resize([0, 1], table=np.where(np.arange(len(mesh.table)) == 7, 0, -1))
        with pytest.raises(RuntimeError, match=r"not \(0, 1\)"):
            mesh.resize([0, 1])
        assert mesh.mesh is world and mesh.members == (0, 1, 2, 3) and group.epoch == 1
        check(mesh, 0)
    finally:
        nx.shutdown()


def rank_with_mesh(job):
    """Two processes; 0 lets 1 go and take part again. What each mesh saw."""
    group = start(job, [0, 1])
    seen, end = [], []
    mesh = ElasticMesh(group, on_prepare=lambda c: seen.append(c.members), on_commit=lambda s: seen.append(s.members))
    first = mesh.mesh
    with pytest.raises(RuntimeError, match=r"use group\.resize"):
        mesh.resize([0])
    with pytest.raises(ValueError, match="mesh must be no mesh for this group; got one"):
        ElasticMesh(group, first)

    def drive():
        try:
            while not group.epoch:
                time.sleep(0.01)
            for members in ([0], [0, 1], [0]):
                group.resize(members)
        finally:
            end.append(1)

    def compiles():
        again = ElasticMesh(group).mesh  # made anew, as a model would: the same object
        assert again is first and mesh.mesh is first
        return program._cache_size()

    if job.rank == 0:
        threading.Thread(target=drive).start()
    with Compiles() as counted:
        serve(group, lambda: bool(end))
        if job.rank == 1:
            group.rejoin()
            serve(group, lambda: bool(end))
        jax.block_until_ready(program(*make_batch(0, 0), group.experts, group.dense, mesh.placement))
    return seen, compiles(), counted.count


def test_processes(pools):
    (seen, compiled, counted), (other, other_compiled, other_counted) = pools(2).run(rank_with_mesh, timeout_s=60)
    assert seen == [(0, 1), (0,), (0,), (0, 1), (0, 1), (0,), (0,)]
    assert other[0] == (0, 1) and (0, 1) in other[2:]
    assert compiled == other_compiled == 1 and counted == other_counted == 0
