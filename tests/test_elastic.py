"""Groups that grow, shrink and lose members while they serve: every result is checked, exactly."""

import os
import signal
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ranks import RankPool, run_to_deaths, transport_env

import jax_nixlep as nx
from jax_nixlep import placement as tables
from jax_nixlep.store import StoreError
from jax_nixlep.store.tcp import StoreServer

EXPERTS = 4
CONFIG = nx.EpConfig(max_ranks=4, experts_per_rank=4, max_tokens_per_rank=8, hidden=16, top_k=2, dtype=jnp.float32)


# --- What the ranks run. ---


def expert_weights(ids):
    """Weights of logical experts; small integers, so that sums are exact in any order. [n, ...]; -1 gives zeros."""
    ids = np.asarray(ids)
    gain = (ids[:, None] + 1) * (1 + np.arange(CONFIG.hidden) % 3)
    gain = np.where(ids[:, None] < 0, 0, gain).astype(np.float32)
    return {"layer": {"gain": gain}, "id": ids.astype(np.float32)}


DENSE = {"scale": np.full((3,), 2, np.float32)}


def make_batch(rank, step):
    rng = np.random.default_rng([rank, step])
    tokens = CONFIG.max_tokens_per_rank
    x = rng.integers(-8, 8, (tokens, CONFIG.hidden)).astype(np.float32)
    ids = np.stack([rng.permutation(EXPERTS)[: CONFIG.top_k] for _ in range(tokens)]).astype(np.int32)
    return x, ids, rng.integers(1, 4, ids.shape).astype(np.float32)


def expected(x, ids, weights):
    gain = expert_weights(np.arange(EXPERTS))["layer"]["gain"]
    return 2 * (weights[:, :, None] * gain[ids] * x[:, None]).sum(1)


@jax.jit
def program(x, ids, weights, experts, dense, placement):
    received = nx.dispatch(x, tables.to_slots(placement, ids), weights, config=CONFIG)
    ends = jnp.cumsum(received.group_sizes)
    local = jnp.minimum(jnp.searchsorted(ends, jnp.arange(CONFIG.num_rows), side="right"), CONFIG.experts_per_rank - 1)
    gain = experts["layer"]["gain"][local] * jnp.where(experts["id"][local] < 0, 0, 1)[:, None]
    out = received.tokens * gain * dense["scale"][0]
    return nx.combine(out, received.handle, config=CONFIG, after=received.status.order)


def start(job, members, **options):
    """A member or a newcomer, warmed up."""
    options = {"num_experts": EXPERTS, "timeout_s": 5, "init_timeout_s": 30, "store": job.store} | options
    if job.rank not in members:
        group = nx.initialize(CONFIG, rank=job.rank, join=True, **options)
    else:
        group = nx.initialize(CONFIG, rank=job.rank, members=members, elastic=True, **options)
        row = group.table[job.rank * CONFIG.experts_per_rank :][: CONFIG.experts_per_rank]
        group.load(expert_weights(row), DENSE)
    warm_up(group)
    return group


def wait_until(done, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def warm_up(group):
    jax.block_until_ready(program(*make_batch(group.rank, 0), group.experts, group.dense, group.placement))


def serve(group, until):
    """Steps until this rank is out or `until()`; returns how many, and when each ended."""
    steps, times = 0, []
    batch = make_batch(group.rank, steps)
    while not until():
        try:
            y = group.run(lambda *batch: program(*batch, group.experts, group.dense, group.placement), *batch)
        except nx.ElasticError as error:
            assert "has left" in str(error), error
            break
        where = f"step {steps} of rank {group.rank}, lost {group.lost_experts}, {group.elastic.history[-3:]}"
        np.testing.assert_array_equal(np.asarray(y), expected(*batch), where)
        steps += 1
        times.append((time.monotonic(), group.members))
        batch = make_batch(group.rank, steps)
    return steps, times


def summary(group, steps, **more):
    history = [(s.epoch, s.members, s.blocked_s, s.lost) for s in group.elastic.history]
    return {"steps": steps, "history": history, "compiled": program._cache_size()} | more


def rank_resizes(job, plan, first):
    """Rank 0 resizes along `plan` while all serve; ends alone."""
    group = start(job, first)
    done, failed = threading.Event(), []

    def drive():
        try:
            wait_until(lambda: group.epoch)  # the others may take longer to warm up
            for members in plan:
                time.sleep(0.1)
                change = group.prepare(members, deadline_s=15)
                group.commit(change)
        except BaseException as raised:
            failed.append(raised)
        finally:
            done.set()

    driver = threading.Thread(target=drive)
    if job.rank == 0:
        driver.start()
    steps, _ = serve(group, done.is_set)
    present = [job.rank in members for members in [first, *plan]]
    stints = sum(now and not before for before, now in zip([False, *present], present, strict=False))
    for _ in range(stints - 1):
        group.rejoin()
        steps += serve(group, done.is_set)[0]
    assert not failed, failed
    return summary(group, steps)


@pytest.mark.parametrize("transport", ["shared", "nixl"])
def test_grows_shrinks_and_leaves_holes(pools, transport):
    plan = [[0, 1, 2], [0, 1, 2, 3], [0, 1, 3], [0, 2, 3], [0, 3], [0]]
    answers = pools(4, transport).run(rank_resizes, plan, [0, 1], timeout_s=100)
    assert [members for _, members, *_ in answers[0]["history"]] == [tuple(m) for m in [[0, 1], *plan]]
    for answer in answers:
        assert answer["compiled"] == 1 and answer["steps"] > 0
    print([f"{1e3 * b:.1f}" for _, _, b, _ in answers[0]["history"]], [a["steps"] for a in answers])


def rank_loses(job, victim, when, timeout_s):
    """All four serve, replicas spread; `victim` kills itself `when`. The survivors end together."""
    group = start(job, [0, 1, 2, 3], timeout_s=timeout_s, restore=expert_weights)
    group.step()
    if job.rank == 0:
        threading.Thread(target=group.resize).start()  # spreads the replicas
    serve(group, lambda: group.epoch == 2)
    end = []

    def drive():
        time.sleep(0.5)
        if when == "prepare":
            with pytest.raises(nx.ElasticError, match="did not happen"):
                group.resize([0, 1, 2])
        deadline = time.monotonic() + 10
        while group.members != (0, 1, 3) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        group.resize([0])
        end.append(1)

    if job.rank == 0:
        threading.Thread(target=drive).start()
    if job.rank == victim and when == "call":
        threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if job.rank == victim:
        group.elastic.on_prepare.append(lambda change: os.kill(os.getpid(), signal.SIGKILL))
    steps, times = serve(group, lambda: bool(end))
    gaps = np.diff([t for t, _ in times])
    return summary(group, steps, gap=gaps.max(), lost=group.lost_experts)


@pytest.mark.parametrize("transport", ["shared", "nixl"])
@pytest.mark.parametrize("when", ["call", "prepare"])
def test_survivors_agree_and_go_on(transport, when):
    check_survivors(when, transport_env(transport))


def check_survivors(when, env):
    for answer in run_to_deaths(rank_loses, 2, when, 0.5, num_ranks=4, dead={2}, env=env).values():
        assert [members for _, members, *_ in answer["history"]][2] == (0, 1, 3)
        assert answer["lost"] == [] and answer["compiled"] == 1 and answer["gap"] < 1
        print(answer["history"], answer["gap"])


def rank_refusals(job):
    """What a change that cannot happen says; serving goes on. Rank 0 asks, the others serve."""
    group = start(job, [0, 1])
    end, said = [], {}

    def refused(name, call):
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    def drive():
        while not group.epoch:
            time.sleep(0.1)
        refused("few", lambda: tables.plan_table([0], 1, np.full(16, -1), np.ones(4)))
        refused("range", lambda: group.prepare([0, 9]))
        slot = np.arange(CONFIG.num_slots)
        refused("stray", lambda: group.prepare([0, 1], table=np.where(slot == 8, 0, -1)))
        refused("unknown", lambda: group.prepare([0, 1], table=np.where(slot == 0, EXPERTS, -1)))
        refused("crowded", lambda: group.prepare([0, 1], table=np.where(slot < 5, 3, -1)))
        change = group.prepare([0, 1, 3], deadline_s=2)  # nobody is rank 3
        refused("second", lambda: group.prepare([0]))
        refused("table", lambda: group.prepare([0, 1, 3], table=np.full(CONFIG.num_slots, -1)))
        assert group.prepare([0, 1, 3]).id == change.id, "an equal call joins"
        refused("absent", lambda: group.commit(change))
        change = group.prepare([0, 1, 3], deadline_s=20)
        group.abort(change, "no longer wanted")
        refused("aborted", lambda: group.commit(change))
        group.resize([0])
        end.append(1)

    if job.rank == 0:
        threading.Thread(target=drive).start()
    steps, times = serve(group, lambda: bool(end))
    return said, summary(group, steps, gap=np.diff([t for t, _ in times]).max())


def test_changes_that_cannot_happen_are_refused_and_serving_goes_on(pools):
    (said, answer), (_, other) = pools(2).run(rank_refusals, timeout_s=60)
    assert "at least 4 slots, one for each expert; got 1 on ranks [0]" in said["few"]
    assert "members must be ranks in [0, 4), at least one; got (0, 9)" in said["range"]
    assert (
        "prepare: table must have 16 slots with experts below 4, on members only; got 16 slots, strays [8]"
        in said["stray"]
    )
    assert "prepare: table must have 16 slots with experts below 4" in said["unknown"]
    assert "an expert at most max_ranks = 4 slots; got 5 for expert 3" in said["crowded"]
    assert "one change may run at a time; got a second while one to ranks [0, 1, 3] by rank 0 runs" in said["second"]
    assert "ElasticError" in said["absent"] and "ranks [0, 1, 3] did not" in said["absent"]
    assert "one change may run at a time" in said["table"]
    assert said["aborted"].endswith("no longer wanted")
    assert [members for _, members, *_ in answer["history"]] == [(0, 1), (0,)] and other["steps"] > 10
    assert answer["gap"] < 1.5


def rank_stopped(job, seconds):
    """Rank 1 is stopped for longer than the others wait, finds itself out, and comes back."""
    group = start(job, [0, 1, 2], timeout_s=0.5, restore=expert_weights)
    group.step()
    end = []

    def drive():
        group.resize()
        time.sleep(0.3 + seconds + 1)
        assert group.members == (0, 2), group.members
        group.resize([0, 1, 2])
        time.sleep(0.3)
        group.resize([0])
        end.append(1)

    if job.rank == 0:
        threading.Thread(target=drive).start()
    if job.rank == 1:
        serve(group, lambda: group.epoch == 2)
        subprocess.Popen(["sh", "-c", f"kill -STOP {os.getpid()}; sleep {seconds}; kill -CONT {os.getpid()}"])
        serve(group, lambda: False)  # until it is out
        group.rejoin()
    steps, _ = serve(group, lambda: bool(end))
    return summary(group, steps)


def test_a_rank_wrongly_given_up_rejoins(env=None):
    pool = RankPool(3, env)
    try:
        answers = pool.run(rank_stopped, 1.5, timeout_s=60)
    finally:
        pool.close()
    assert [m for _, m, *_ in answers[0]["history"]] == [(0, 1, 2), (0, 1, 2), (0, 2), (0, 1, 2), (0,)]
    assert answers[0]["history"][2][3] == (1,) and all(a["compiled"] == 1 and a["steps"] for a in answers)


def rank_without_store(job, url, folder):
    """The store dies; serving goes on, a resize is refused; a new store is taken up. What rank 0 was told."""
    group = start(job, [0, 1], store=url)
    said, end = [], []

    def drive():
        wait_until(lambda: group.epoch)
        (folder / "serving").touch()
        wait_until((folder / "closed").exists)
        while not end:
            try:
                group.resize([0])
                end.append(1)
            except (StoreError, nx.ElasticError) as error:  # the latter: a store that has just come back
                said.append(f"{type(error).__name__}: {error}")
                (folder / "refused").touch()
                time.sleep(0.1)

    if job.rank == 0:
        threading.Thread(target=drive).start()
    steps, times = serve(group, lambda: bool(end))
    return said, summary(group, steps, times=[t for t, _ in times])


def test_serving_outlives_the_store(pools, tmp_path):
    servers = [StoreServer()]
    url = servers[0].url

    def restart():
        wait_until((tmp_path / "serving").exists)
        servers[0].close()
        (tmp_path / "closed").touch()
        wait_until((tmp_path / "refused").exists)
        time.sleep(1)
        servers.append(StoreServer(port=int(url.rsplit(":", 1)[1])))

    thread = threading.Thread(target=restart)
    thread.start()
    (said, answer), _ = pools(2).run(rank_without_store, url, tmp_path, timeout_s=60)
    thread.join()
    servers[-1].close()
    assert "is unreachable" in said[0], said
    assert [m for _, m, *_ in answer["history"]] == [(0, 1), (0,)]
    assert np.diff(answer["times"]).max() < 1.5


def test_many_resizes(pools):
    """Random members, holes, ranks that come back."""
    rng = np.random.default_rng(0)
    plan = [[0, *sorted((1 + rng.permutation(3)[: rng.integers(0, 4)]).tolist())] for _ in range(25)] + [[0]]
    answers = pools(4).run(rank_resizes, plan, [0, 1], timeout_s=200)
    blocked = sorted(1e3 * b for _, _, b, _ in answers[0]["history"][1:])
    print(f"blocked ms: median {blocked[len(blocked) // 2]:.1f}, most {blocked[-1]:.1f}")
    assert all(answer["compiled"] == 1 for answer in answers)
