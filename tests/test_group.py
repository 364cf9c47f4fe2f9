"""Groups: what is refused and with which words, who is waited for and how long, and what is left behind."""

import math
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ranks import RankError, RankPool
from test_ops import make_config, make_input

import jax_nixlep as nx
from jax_nixlep import _ffi, _nixl
from jax_nixlep.store.tcp import StoreServer

CONFIG = make_config()
FAILED = (jax.errors.JaxRuntimeError, ValueError)  # jax's quick path for compiled calls raises the latter


# --- Refused before anything runs. ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_ranks": 0}, "max_ranks must be a positive int; got 0"),
        ({"experts_per_rank": 1.5}, "experts_per_rank must be a positive int; got 1.5"),
        ({"top_k": True}, "top_k must be a positive int; got True"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16; got"),
        ({"dtype": "no such"}, "dtype must be float32, bfloat16 or float16; got 'no such'"),
        ({"wire": "int4"}, 'wire must be "same", "bf16" or "fp8_e4m3"; got \'int4\''),
        ({"scale_format": "e5m2"}, "scale_format must be"),
        ({"hidden": 6}, "hidden must be a multiple of 4 for float32; got 6"),
        ({"hidden": 12, "dtype": "bfloat16"}, "hidden must be a multiple of 8 for bfloat16; got 12"),
        ({"hidden": 64, "wire": "fp8_e4m3"}, "hidden must be a multiple of 128 for wire='fp8_e4m3'; got 64"),
        ({"recv_capacity": 0}, "recv_capacity must be a positive int or None; got 0"),
    ],
)
def test_config_refuses(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make_config(**changes)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": np.zeros((7, 16), np.float32), "ids": np.zeros((7, 3), np.int32)}, ValueError, "max_tokens_per_rank=6"),
        ({"x": np.zeros((5, 12), np.float32)}, ValueError, "x must be float32 [5, 16]; got float32 [5, 12]"),
        ({"x": np.zeros((5, 16), np.float16)}, ValueError, "x must be float32 [5, 16]; got float16 [5, 16]"),
        ({"ids": np.zeros((5, 2), np.int32)}, ValueError, "expert_ids must be int32 [5, 3]; got int32 [5, 2]"),
        ({"ids": np.zeros((5, 3), np.uint8)}, ValueError, "expert_ids must be int32 [5, 3]; got uint8 [5, 3]"),
        ({"weights": np.zeros((5, 3), np.float16)}, ValueError, "weights must be float32 [5, 3]; got float16"),
        ({"recv_capacity": -1}, ValueError, "recv_capacity must be a positive int or None; got -1"),
        ({"dequantize": False}, ValueError, 'dequantize must be True for wire="same"; got False'),
    ],
)
def test_dispatch_refuses(arguments, error, words):
    given = {"x": np.zeros((5, 16), np.float32), "ids": np.zeros((5, 3), np.int32), "weights": None} | arguments
    x, ids, weights = (given.pop(name) for name in ("x", "ids", "weights"))
    with pytest.raises(error, match=re.escape(words)):
        jax.eval_shape(lambda *a: nx.dispatch(*a, config=CONFIG, **given), x, ids, weights)


def test_combine_refuses():
    x, ids = np.zeros((5, 16), np.float32), np.zeros((5, 3), np.int32)
    handle = jax.eval_shape(lambda x, ids: nx.dispatch(x, ids, config=CONFIG).handle, x, ids)
    with pytest.raises(ValueError, match=re.escape("expert_out must be float32 [24, 16]; got float32 [23, 16]")):
        jax.eval_shape(lambda out, h: nx.combine(out, h, config=CONFIG), np.zeros((23, 16), np.float32), handle)
    with pytest.raises(TypeError, match="handle must be a Handle; got tuple"):
        nx.combine(x, tuple(handle), config=CONFIG)


def test_vmap_and_undequantized_gradients_are_refused():
    x, ids = np.zeros((2, 5, 16), np.float32), np.zeros((2, 5, 3), np.int32)
    with pytest.raises(NotImplementedError, match="dispatch: must not"):
        jax.eval_shape(jax.vmap(lambda x, ids: nx.dispatch(x, ids, config=CONFIG)), x, ids)
    config = make_config(hidden=128, wire="fp8_e4m3")

    def loss(x):
        received = nx.dispatch(x, ids[0], config=config, dequantize=False)
        return received.scales.sum() + received.tokens.astype(jnp.float32).sum()

    with pytest.raises(TypeError, match="dequantize must be True for a gradient; got False"):
        jax.eval_shape(jax.grad(loss), np.zeros((5, 128), np.float32))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank and members must be given; got rank=0, members=None"),
        ({"rank": 0, "members": [0, 1]}, "store must be given for 2 members; got None"),
        ({"rank": 0, "members": [0, 2]}, "members must be distinct ranks in [0, 2); got [0, 2]"),
        ({"rank": 0, "members": [0, 0]}, "members must be distinct ranks"),
        ({"rank": 1, "members": [0]}, "rank must be one of members [0]; got 1"),
        ({"rank": 0, "members": [0], "on_timeout": "ignore"}, "on_timeout must be"),
        (
            {"rank": 0, "members": [0], "store": "tcp://localhost:1", "elastic": True, "on_timeout": "mask"},
            'on_timeout must be "raise" in an elastic group; got "mask"',
        ),
        ({"rank": 0, "members": [0], "timeout_s": 0}, "timeout_s must be positive, and at most 1e9; got 0"),
        ({"rank": 0, "members": [0], "timeout_s": math.inf}, "timeout_s must be positive, and at most 1e9; got inf"),
        ({"rank": 0, "members": [0, 1], "store": "file:///tmp/x"}, "file:///tmp/x"),
    ],
)
def test_initialize_refuses(options, words):
    if "store" not in options and len(options.get("members", [])) > 1 and "distinct" in words:
        options = options | {"store": "tcp://127.0.0.1:1"}
    with pytest.raises((ValueError, nx.EpError), match=re.escape(words)):
        nx.initialize(CONFIG, **options)


def test_initialize_with_mesh_refuses():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(ValueError, match=r"axis must name axes of the mesh \['x'\]; got 'ep'"):
        nx.initialize(CONFIG, mesh=mesh)
    with pytest.raises(ValueError, match=r"mesh= must come without rank= and members="):
        nx.initialize(CONFIG, mesh=mesh, axis="x", rank=0)


# --- Lifecycle, in this process as a group of one. ---


def run_once(config=CONFIG):
    x, ids, weights = make_input(config, 0, 5, 0)
    return nx.dispatch(x, ids, weights, config=config)


def test_lifecycle():
    with pytest.raises(RuntimeError, match="a group must exist; got none"):
        nx.current_group()
    with pytest.raises(jax.errors.JaxRuntimeError, match="dispatch: device 0 must belong to a group; got none"):
        jax.block_until_ready(run_once())
    group = nx.initialize(CONFIG, rank=0, members=[0])
    assert nx.current_group() is group and (group.rank, group.members, group.epoch) == (0, (0,), 1)
    with pytest.raises(RuntimeError, match="must be called once; got a second call"):
        nx.initialize(CONFIG, rank=0, members=[0])
    np.testing.assert_array_equal(run_once().status.peers, [nx.PEER_OK, nx.PEER_ABSENT])
    health = group.health()
    assert health.operations == 1 and health.members == (0,) and health.peers[0].path == "self"
    wide = make_config(hidden=1024)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a row must fit the group's rows of 64 bytes; got 4096"):
        jax.block_until_ready(run_once(wide))
    nx.shutdown()
    nx.shutdown()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"call jax_nixlep\.initialize"):
        jax.block_until_ready(run_once())


def test_ids_out_of_range_are_counted():
    nx.initialize(CONFIG, rank=0, members=[0])
    ids = np.array([[0, -1, 4], [-2, 2**31 - 1, 1]], np.int32)  # slots are 0..3, those of rank 1 have no member
    received = nx.dispatch(np.ones((2, 16), np.float32), ids, config=CONFIG)
    assert received.status.invalid_ids == 3 and nx.current_group().health().invalid_ids == 3
    np.testing.assert_array_equal(received.group_sizes, [1, 1])
    nx.shutdown()


def test_a_forged_handle_is_refused_not_followed():
    nx.initialize(CONFIG, rank=0, members=[0])
    received = run_once()
    forged = received.handle._replace(row_of=received.handle.row_of + 1_000_000)
    with pytest.raises(jax.errors.JaxRuntimeError, match="handle must be the one dispatch returned"):
        jax.block_until_ready(nx.combine(received.tokens, forged, config=CONFIG))
    nx.shutdown()


def test_symmetric_memory_has_no_factor_of_the_experts():
    sizes = []
    for experts in (1, 64):
        nx.initialize(make_config(experts_per_rank=experts, hidden=1024), rank=0, members=[0])
        sizes.append(nx.current_group().health().symmetric_bytes)
        nx.shutdown()
    assert sizes[0] == sizes[1]


def test_a_program_of_another_config_is_refused():
    x, ids, weights = make_input(CONFIG, 0, 4, 0)
    changes = {"max_ranks": CONFIG.max_ranks + 1, "experts_per_rank": CONFIG.experts_per_rank + 1}
    changes |= {"max_tokens_per_rank": CONFIG.max_tokens_per_rank + 1}
    for name, value in changes.items():
        nx.initialize(make_config(**{name: value}), rank=0, members=[0])
        with pytest.raises(FAILED, match="dispatch: the arrays must have the sizes of the group's config"):
            jax.block_until_ready(nx.dispatch(x, ids, weights, config=CONFIG))
        nx.shutdown()


def test_split_operations_on_a_cpu_are_refused():
    x, ids, weights = make_input(CONFIG, 0, 4, 0)
    with pytest.raises(NotImplementedError, match="dispatch_start: the program must be for an NVIDIA GPU; got cpu"):
        nx.dispatch_start(x, ids, weights, config=CONFIG)


# --- NIXL absent, old, broken. ---


def test_nixl_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(nx.NixlError, match=r"version >= 1\.5 must be installed; got none; install it with"):
        _nixl.find_library()


def test_nixl_too_old(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.4.1")
    with pytest.raises(nx.NixlError, match=r"version must be >= 1\.5; got nixl_cu1[23] 1\.4\.1"):
        _nixl.find_library()


def test_nixl_broken(tmp_path):
    endpoint = _ffi.Endpoint(
        rank=0,
        max_ranks=2,
        experts_per_rank=1,
        max_tokens=4,
        top_k=1,
        row_bytes=64,
        timeout_s=1,
        mask_late_peers=False,
    )
    garbage = tmp_path / "libnixl_capi.so"
    garbage.write_text("not a library")
    with pytest.raises(nx.NixlError, match=r"cannot load .*libnixl_capi\.so"):
        endpoint.open_nixl(str(garbage), "r0")
    with pytest.raises(nx.NixlError, match=r"has no nixl_capi_is_stub; install nixl >= 1\.5"):
        endpoint.open_nixl("libc.so.6", "r0")


# --- Members that do not fit, or do not come. ---


def rank_initialize(job, *, configs=None, members=None, **options):
    config = configs[job.rank] if configs else CONFIG
    if members:
        options["members"] = members[job.rank]
    job.initialize(config, **options)


def rank_leaves_at_once(job):
    job.initialize(make_config(max_ranks=3), init_timeout_s=10)


def test_a_rank_that_never_arrives_is_named(pools):
    pools(3).run(rank_leaves_at_once)  # all processes are there, and quick
    with pytest.raises(RankError) as caught:
        pools(3).run(rank_initialize, configs=[make_config(max_ranks=3)] * 3, init_timeout_s=2, only=[0, 2])
    for rank in (0, 2):
        assert re.search(r"TimeoutError: .*ranks \[1.*did not arrive within 2 s", caught.value.errors[rank])


@pytest.mark.parametrize("field", ["hidden", "wire", "recv_capacity"])
def test_configs_that_differ_are_named(pools, field):
    value = {"hidden": 32, "wire": "bf16", "recv_capacity": 3}[field]
    with pytest.raises(RankError) as caught:
        pools(2).run(rank_initialize, configs=[CONFIG, make_config(**{field: value})], init_timeout_s=20)
    for rank in (0, 1):
        assert f"ValueError: initialize: {field} must be equal on every rank; got" in caught.value.errors[rank]
        assert str(value) in caught.value.errors[rank] and str(getattr(CONFIG, field)) in caught.value.errors[rank]


def test_members_that_differ_are_named(pools):
    with pytest.raises(RankError) as caught:
        pools(2).run(
            rank_initialize, configs=[make_config(max_ranks=3)] * 2, members=[[0, 1], [0, 1, 2]], init_timeout_s=20
        )
    assert "members must be equal on every rank; got [0, 1] on rank 0" in caught.value.errors[0]


def rank_cannot_begin(job):
    def refuse(group):
        raise OSError("no memory for an epoch")

    with pytest.MonkeyPatch.context() as patch:
        if job.rank == 1:
            patch.setattr(nx.EpGroup, "_activate", refuse)
        job.initialize(CONFIG)


def test_a_rank_that_fails_after_it_was_met_tells_why(pools):
    with pytest.raises(RankError) as caught:
        pools(2).run(rank_cannot_begin)
    assert caught.value.errors[0] == "RuntimeError: initialize: rank 1 failed: OSError: no memory for an epoch"


def rank_with_store(job, url, init_timeout_s=1, **options):
    job.initialize(CONFIG, store=url, init_timeout_s=init_timeout_s, **options)


def test_store_unreachable_refused_or_taken(pools):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound, not listening: connections are refused
        with pytest.raises(RankError) as caught:
            pools(2).run(rank_with_store, f"tcp://127.0.0.1:{port}", only=[1])
        assert "StoreUnreachableError" in caught.value.errors[1] and str(port) in caught.value.errors[1]
        taken.listen()
        with pytest.raises(RankError) as caught:
            pools(2).run(rank_with_store, f"tcp://127.0.0.1:{port}", only=[0])
        assert "StorePortInUseError" in caught.value.errors[0] and str(port) in caught.value.errors[0]
    with StoreServer(secret="right") as server:
        with pytest.raises(RankError) as caught:
            pools(2).run(rank_with_store, server.url, secret="wrong", init_timeout_s=20)
        for rank in (0, 1):
            assert "StoreAuthError" in caught.value.errors[rank]
            assert "wrong" not in caught.value.errors[rank].replace("wrong secret", "")


# --- Ranks that disagree, dawdle, leave or die while the program runs. ---


def rank_swapped(job):
    job.initialize(CONFIG)
    x, ids, weights = make_input(CONFIG, job.rank, 5, 0)

    @jax.jit
    def program(x):
        first = nx.dispatch(x, ids, weights, config=CONFIG)
        if job.rank == 0:
            return nx.combine(first.tokens, first.handle, config=CONFIG)
        return nx.dispatch(x, ids, weights, config=CONFIG, after=first.tokens).tokens

    return np.asarray(program(x))


@pytest.mark.parametrize("transport", ["shared", "nixl"])
def test_different_operations_are_both_named(pools, transport):
    with pytest.raises(RankError) as caught:
        pools(2, transport).run(rank_swapped, timeout_s=30)
    errors = caught.value.errors
    assert set(errors) == {0, 1}
    named = [bool(re.search(f"{own}.*rank {1 - r} runs {other}.*same order", errors[r]))
             for r, own, other in ((0, "combine #2", "dispatch #2"), (1, "dispatch #2", "combine #2"))]  # fmt: skip
    # The one that looks later may only learn that its peer failed, which says to see that rank's error.
    assert any(named) and all(n or "failed; see its error" in errors[r] for r, n in enumerate(named))


def rank_late(job, seconds, policy, timeout_s):
    """Rank 1 is late for its second step. Returns what each rank saw, or the error and when it came."""
    job.initialize(CONFIG, timeout_s=timeout_s, on_timeout=policy)
    x, ids, weights = make_input(CONFIG, job.rank, 5, 0)
    step = jax.jit(lambda x: nx.dispatch(x, ids, weights, config=CONFIG))
    jax.block_until_ready(step(x))
    if job.rank == 1:
        time.sleep(seconds)
    start, cpu = time.monotonic(), time.process_time()
    try:
        received = jax.tree.map(np.asarray, step(x))
        if job.rank == 1 and seconds > timeout_s and policy == "raise":
            received = jax.tree.map(np.asarray, step(x))  # the first found what was sent before it was given up
        error = None
    except FAILED as raised:
        received, error = None, str(raised)
    took, burnt = time.monotonic() - start, time.process_time() - cpu
    if error is None and policy == "mask" and job.rank == 0:
        received = (received, jax.tree.map(np.asarray, step(x)))  # goes on alone
    return received, error, took, burnt, nx.current_group().health()


@pytest.mark.parametrize("transport", ["shared", "nixl"])
def test_a_late_rank_is_waited_for_without_burning_the_cpu(pools, transport):
    answers = pools(2, transport).run(rank_late, 2.0, "raise", 30)
    assert all(error is None for _, error, *_ in answers)
    _, _, took, burnt, health = answers[0]
    assert took > 1.5 and health.peers[1].wait_s > 1.5
    assert burnt < took / 2


@pytest.mark.parametrize("transport", ["shared", "nixl"])
def test_a_rank_that_is_too_late_is_named(pools, transport):
    answers = pools(2, transport).run(rank_late, 3.0, "raise", 1)
    _, error, took, _, health = answers[0]
    assert re.search(r"dispatch #1 \(operation 2 of epoch 1\): rank 1 did not arrive within 1\.0+ s", error)
    assert took < 2.9 and health.peers[1].timeouts == 1
    assert re.search("rank 0 (failed|has left)", answers[1][1])


def test_a_rank_that_is_too_late_is_masked(pools):
    answers = pools(2).run(rank_late, 3.0, "mask", 1)
    (first, second), error, took, _, health = answers[0]
    assert error is None and took < 2.9
    np.testing.assert_array_equal(first.status.peers, [nx.PEER_OK, nx.PEER_TIMED_OUT])
    np.testing.assert_array_equal(second.status.peers, [nx.PEER_OK, nx.PEER_ABSENT])
    assert health.masked == (1,) and (first.handle.row_of[1] == -1).all() and first.group_sizes.sum() > 0
    # The late rank finds what was sent to it before it was given up, or that the others are gone.
    assert answers[1][1] is None or re.search("went on|has left the group", answers[1][1])


def rank_beside_a_failed_one(job):
    """Rank 2 fails in its second step, after its tokens are out. Returns whom the others missed then and later."""
    config = make_config(max_ranks=3)
    group = job.initialize(config, on_timeout="mask", timeout_s=30)
    x, ids, weights = make_input(config, job.rank, 4, 0)
    step = jax.jit(lambda x: nx.dispatch(x, ids, weights, config=config).status.peers)
    jax.block_until_ready(step(x))
    if job.rank == 2:
        threading.Timer(0.5, group._seats[0].endpoint.interrupt).start()
        with pytest.raises(FAILED, match="interrupted"):
            jax.block_until_ready(step(x))
        return None
    time.sleep(1.5)
    start = time.monotonic()
    peers = [np.asarray(step(x)).tolist() for _ in range(3)]
    return peers, group.health().masked, time.monotonic() - start


@pytest.mark.parametrize("transport", ["shared", "nixl"])
def test_a_rank_that_failed_is_masked_at_once(pools, transport):
    ok, out, absent = nx.PEER_OK, nx.PEER_TIMED_OUT, nx.PEER_ABSENT
    # Over NIXL nothing is written to one that failed.
    of_it = [ok, out, absent] if transport == "shared" else [out, absent, absent]
    for peers, masked, took in pools(3, transport).run(rank_beside_a_failed_one)[:2]:
        assert peers == [[ok, ok, state] for state in of_it]
        assert masked == (2,) and took < 15


def rank_beside_a_dead_one(job):
    """Rank 2 is dead, rank 1 slow: who is said to be missing."""
    config = make_config(max_ranks=3)
    group = job.initialize(config, on_timeout="mask", timeout_s=10)
    if job.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1 + job.rank)
    received = nx.dispatch(*make_input(config, job.rank, 4, 0), config=config)
    return np.asarray(received.status.peers).tolist(), group.health().masked


def test_only_the_peer_that_cannot_be_written_to_is_masked():
    pool = RankPool(3, {"JAX_NIXLEP_P2P": "0", "UCX_TLS": "tcp"})
    try:
        with pytest.raises(RankError) as caught:
            pool.run(rank_beside_a_dead_one, timeout_s=60)
    finally:
        pool.close()
    assert set(caught.value.errors) == {2}, caught.value
    late = [nx.PEER_OK, nx.PEER_OK, nx.PEER_TIMED_OUT]
    for peers, masked in caught.value.results.values():
        assert peers == late and masked == (2,)


def rank_wait_for_nobody(job, seconds):
    """Rank 0 waits in a step that rank 1 never joins; returns the error and how long it took."""
    job.initialize(CONFIG, timeout_s=30)
    if job.rank == 1:
        time.sleep(seconds)
        return None
    x, ids, weights = make_input(CONFIG, 0, 5, 0)
    start = time.monotonic()
    with pytest.raises(FAILED) as caught:
        jax.block_until_ready(nx.dispatch(x, ids, weights, config=CONFIG))
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("transport", ["shared", "nixl"])
def test_a_rank_that_leaves_is_named_at_once(pools, transport):
    error, took = pools(2, transport).run(rank_wait_for_nobody, 1.0)[0]
    assert "rank 1 has left the group" in error and took < 20


def test_a_rank_that_dies_is_named_at_once(pools):
    with pytest.raises(RankError) as caught:
        pools(2).run(rank_killed, timeout_s=25)
    assert "died with exit code -9" in caught.value.errors[1]
    assert re.search("AssertionError: dispatch .*rank 1 is dead", caught.value.errors[0])


def rank_killed(job):
    job.initialize(CONFIG, timeout_s=60)
    if job.rank == 1:
        time.sleep(2)  # rank 0 waits
        os.kill(os.getpid(), signal.SIGKILL)
    x, ids, weights = make_input(CONFIG, 0, 5, 0)
    try:
        jax.block_until_ready(nx.dispatch(x, ids, weights, config=CONFIG))
    except FAILED as error:
        raise AssertionError(str(error).removeprefix("ABORTED: ")) from None


def test_a_rank_may_leave_before_others_have_begun(pools):
    for _ in range(5):
        pools(3).run(rank_leaves_at_once)


def rank_shut_down_after(job, url, seconds):
    """Seconds that `shutdown` takes, so long after all have begun."""
    job.initialize(CONFIG, store=url)
    time.sleep(seconds * job.rank)
    began = time.monotonic()
    nx.shutdown()
    return time.monotonic() - began


def test_the_rank_that_serves_the_store_may_leave_first(pools):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    assert max(pools(2).run(rank_shut_down_after, url, 1.0)) < 5


# --- Nothing is left behind. ---


def resources():
    """Resident MiB, descriptors, mappings of symmetric memory, threads of this process."""
    maps = Path("/proc/self/maps").read_text().count("memfd:jax_nixlep")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), maps, threading_count()


def threading_count():
    return len(os.listdir("/proc/self/task"))


def rank_cycles(job, cycles, warm_up):
    x, ids, weights = make_input(CONFIG, job.rank, 5, 0)
    step = jax.jit(lambda x: nx.combine(*nx.dispatch(x, ids, weights, config=CONFIG)[0:5:4], config=CONFIG))
    for i in range(cycles):
        job.initialize(CONFIG)
        jax.block_until_ready(step(x))
        nx.shutdown()
        if i + 1 == warm_up:
            before = resources()
    return before, resources()


@pytest.mark.parametrize(("transport", "cycles"), [("shared", 100), ("nixl", 100)])
def test_cycles_leave_nothing_behind(pools, transport, cycles):
    for before, after in pools(2, transport).run(rank_cycles, cycles, 20, timeout_s=250):
        assert after[0] - before[0] < 16, f"grew by {after[0] - before[0]:.1f} MiB in {cycles - 20} cycles"
        assert after[1:] == before[1:] and after[2] == 0


def rank_calls(job, calls):
    job.initialize(CONFIG)
    x, ids, weights = make_input(CONFIG, job.rank, 5, 0)
    step = jax.jit(lambda x: nx.combine(*nx.dispatch(x, ids, weights, config=CONFIG)[0:5:4], config=CONFIG))
    for i in range(calls):
        jax.block_until_ready(step(x))
        if i == calls // 5:
            before = resources()
    return before, resources(), nx.current_group().health().operations


@pytest.mark.parametrize("transport", ["shared", "nixl"])
def test_calls_leave_nothing_behind(pools, transport):
    for before, after, operations in pools(2, transport).run(rank_calls, 10_000, timeout_s=250):
        assert operations == 20_000
        assert after[0] - before[0] < 16, f"grew by {after[0] - before[0]:.1f} MiB"
        assert after[1:] == before[1:]
