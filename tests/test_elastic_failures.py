"""What can go wrong in a change, one thing at a time: the members go on, right in every row, and can change again."""

import dataclasses
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from ranks import run_to_deaths, transport_env
from test_elastic import CONFIG, expected, expert_weights, make_batch, program, serve, start, summary, wait_until

import jax_nixlep as nx
from jax_nixlep.crew import Crew, Settings
from jax_nixlep.store import connect
from jax_nixlep.store.tcp import StoreServer

STEPS = 5


def make_crew(transport="shared", *, env=None, **options):
    settings = {"max_ranks": 4, "num_experts": 8, "detect_s": 0.5, "join_s": 60.0, "bulk": 1 << 14, "rejoins": True}
    env = env or {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"} | transport_env(transport)
    return Crew(Settings(**settings | options), timeout_s=60, env=env)


def begin(crew, members, joiners=()):
    for rank in members:
        crew.start(rank, members)
    for rank in joiners:
        crew.start(rank)
    crew.wait_right(members, STEPS)
    crew.wait(lambda: {*members, *joiners} <= set(crew.reports()), "the joiners")


def resize(crew, by, members):
    """What went wrong; "" for nothing."""
    number = crew.tell(by, do="resize", members=members, deadline_s=20)
    crew.wait(lambda: crew.answer(number) is not None, "the resize")
    return crew.answer(number)


def test_a_joiner_that_dies_is_noticed_and_can_try_again():
    with make_crew() as crew:
        begin(crew, [0, 1], joiners=[2])
        crew.tell(2, do="die", at="prepare", delay_s=0)
        time.sleep(0.1)
        began = time.monotonic()
        error = resize(crew, 0, [0, 1, 2])
        assert "did not happen" in error and "ranks [2] are gone" in error, error
        assert time.monotonic() - began < 10  # by its lease, long before the deadline
        crew.wait_gone([2])
        crew.wait_right([0, 1], STEPS)
        crew.start(2)
        crew.wait(lambda: 2 in crew.reports(), "the joiner")
        assert resize(crew, 1, [0, 1, 2]) == ""
        crew.wait_right([0, 1, 2], STEPS)


@pytest.mark.parametrize("phase", ["prepare", "sending", "commit"])
def test_a_coordinator_that_dies(phase, env=None):
    """Rank 1 asks for a change and dies in it; another can ask at once."""
    with make_crew(move_bytes_per_s=4e6, env=env) as crew:
        begin(crew, [0, 1, 2], joiners=[3])
        crew.tell(1, do="die", at=phase, delay_s=0)
        time.sleep(0.1)
        crew.tell(1, do="resize", members=[0, 1, 3], deadline_s=20)
        crew.wait_gone([1])
        _, members = crew.wait_settled(STEPS, dead={1})
        assert members in ([0, 2], [0, 3])
        error = resize(crew, 0, [0, 2, 3])
        assert error == "" or members == [0, 2], error
        crew.wait_settled(STEPS, dead={1})


def test_a_member_that_dies_in_commit():
    with make_crew("nixl") as crew:
        begin(crew, [0, 1, 2])
        crew.tell(2, do="die", at="commit", delay_s=0)
        time.sleep(0.1)
        resize(crew, 0, [0, 1, 2])
        crew.wait_gone([2])
        crew.wait_right([0, 1], STEPS)
        assert resize(crew, 1, [0, 1]) == ""
        crew.wait_right([0, 1], STEPS)


def test_two_changes_at_once():
    with make_crew(move_bytes_per_s=4e6) as crew:
        begin(crew, [0, 1], joiners=[2, 3])
        numbers = [crew.tell(by, do="resize", members=[0, 1, 2 + by], deadline_s=20) for by in (0, 1)]
        crew.wait(lambda: all(crew.answer(n) is not None for n in numbers), "both")
        errors = [crew.answer(n) for n in numbers]
        assert errors.count("") == 1, errors
        first = errors.index("")
        assert f"a second while one to ranks [0, 1, {2 + first}] by rank {first} runs" in errors[1 - first]
        crew.wait_right([0, 1, 2 + first], STEPS)


def test_a_rank_that_is_started_again_is_not_taken_for_the_member_it_was():
    """Through NIXL a death shows late: until then the group counts on a process that is gone."""
    with make_crew("nixl", detect_s=8.0) as crew:
        begin(crew, [0, 1, 2])
        crew.tell(1, do="die", at="now", delay_s=0)
        crew.wait_gone([1])
        crew.start(1)
        _, members = crew.wait_settled(STEPS, dead={1})
        assert members == [0, 2]
        crew.wait(lambda: 1 in crew.reports(), "rank 1")
        assert resize(crew, 0, [0, 1, 2]) == ""
        crew.wait_right([0, 1, 2], STEPS)


def rank_refuses(job):
    """Rank 1's own preparation fails. What rank 0 was told."""
    group = start(job, [0, 1])
    said, end = [], []

    def refuse(change):
        if change.members == (0, 1):
            raise MemoryError("none left")

    def drive():
        while not group.epoch:
            time.sleep(0.01)
        try:
            group.resize([0, 1])
        except nx.ElasticError as error:
            said.append(str(error))
        group.resize([0])
        end.append(1)

    if job.rank == 0:
        threading.Thread(target=drive).start()
    else:
        group.elastic.on_prepare.append(refuse)
    steps, _ = serve(group, lambda: bool(end))
    return said, summary(group, steps)


def test_a_preparation_that_fails_is_named(pools):
    (said, answer), _ = pools(2).run(rank_refuses, timeout_s=60)
    assert said[0].endswith("rank 1: MemoryError: none left")
    assert [members for _, members, *_ in answer["history"]] == [(0, 1), (0,)]


def rank_initializes(job, options):
    """With `options` by rank. Why it was refused; who was not does a step."""
    own = {"config": CONFIG, "num_experts": 4, "store": job.store, "init_timeout_s": 20} | options[job.rank]
    try:
        group = nx.initialize(rank=job.rank, **own)
    except ValueError as error:
        return str(error)
    row = group.table[job.rank * CONFIG.experts_per_rank :][: CONFIG.experts_per_rank]
    group.load(expert_weights(row))
    assert group.step()
    return ""


MEMBER = {"members": [0, 1], "elastic": True}


@pytest.mark.parametrize(
    ("options", "refused", "words"),
    [
        ([MEMBER, MEMBER | {"num_experts": 5}], [0, 1], "num_experts must be equal on every rank; got 4 on rank 0 and"),
        ([MEMBER, {"members": [0, 1]}], [0, 1], "elastic must be equal on every rank; got True on rank 0 and False on"),
        ([MEMBER] * 2 + [{"join": True, "num_experts": 5}], [2], "num_experts must be equal on every rank; got 5 on"),
        ([MEMBER] * 2 + [{"join": True, "config": dataclasses.replace(CONFIG, hidden=32)}], [2],
         "hidden must be equal on every rank; got 32 on rank 2 and 16 in the group"),
        ([MEMBER | {"num_experts": 9}] * 2, [0, 1], "num_experts must be at most the 8 slots of 2 members; got 9"),
    ],
)  # fmt: skip
def test_who_differs_is_told_in_what(pools, options, refused, words):
    answers = pools(len(options)).run(rank_initializes, options, timeout_s=60)
    assert [rank for rank, answer in enumerate(answers) if answer] == refused
    assert words in answers[refused[0]]


def rank_leaves(job):
    """Rank 1 shuts its group down, unasked, and its process lives on. Seconds until the others go on without it."""
    group = start(job, [0, 1, 2], timeout_s=60)
    if job.rank == 1:
        serve(group, lambda: group.elastic.boundary >= 3)
        nx.shutdown()
        return 0
    _, times = serve(group, lambda: group.epoch and 1 not in group.members)
    return np.diff([t for t, _ in times]).max()


def test_a_rank_that_leaves_is_not_waited_for(pools):
    gaps = pools(3).run(rank_leaves, timeout_s=90)
    assert max(gaps) < 10, gaps


def rank_newcomer_dies(job):
    """Rank 2, a newcomer, is ready and dies; rank 1 is not ready for long. What rank 0 was told."""
    group = start(job, [0, 1])
    said, end = [], []

    def drive():
        while not group.epoch:
            time.sleep(0.01)
        for members in ([0, 1, 2], [0]):
            try:
                group.resize(members, deadline_s=20)
            except nx.ElasticError as error:
                said.append(str(error))
        end.append(1)

    if job.rank == 0:
        threading.Thread(target=drive).start()
    elif job.rank == 1:
        group.elastic.on_prepare.append(lambda change: time.sleep(4 * (2 in change.members)))
    else:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    steps, _ = serve(group, lambda: bool(end))
    return said, summary(group, steps)


def test_a_newcomer_that_dies_when_it_is_ready():
    said, answer = run_to_deaths(rank_newcomer_dies, num_ranks=3, dead={2})[0]
    assert len(said) == 1 and "did not happen: ranks [2] are gone" in said[0]
    assert [members for _, members, *_ in answer["history"]] == [(0, 1), (0,)]


def rank_idle(job):
    """No rank has anything to do; the members change all the same."""
    group = start(job, [0, 1])
    end, failed = [], []

    def drive():
        try:
            while not group.epoch:
                time.sleep(0.01)
            for members in ([0, 1], [0]):
                group.resize(members, deadline_s=10)
        except nx.ElasticError as error:
            failed.append(str(error))
        end.append(1)

    if job.rank == 0:
        threading.Thread(target=drive).start()
    while group.step() and not end:
        time.sleep(0.002)
    assert not failed, failed
    return [switch.members for switch in group.elastic.history]


def test_a_group_without_work_changes(pools):
    first, second = pools(2).run(rank_idle, timeout_s=60)
    assert first == [(0, 1), (0, 1), (0,)] and second == [(0, 1), (0, 1)]


def rank_unrestorable(job, broken):
    """Half of the experts are only on rank 1, which dies; nobody can restore them, or plan where to (`broken`)."""

    def restore(ids):
        raise OSError(f"no checkpoint of {ids}")

    group = start(job, [0, 1], timeout_s=0.5, restore=restore)
    if broken:
        group.elastic._follower._rebalance = lambda: [][0]
    table = np.full(CONFIG.num_slots, -1)
    table[[0, 1, 4, 5]] = range(4)

    def drive():
        while not group.epoch:
            time.sleep(0.01)
        group.resize([0, 1], table=table)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    group.step()
    if job.rank == 1:
        threading.Thread(target=drive).start()
    while group.members != (0,):
        try:
            jax.block_until_ready(program(*make_batch(0, 0), group.experts, group.dense, group.placement))
        except (jax.errors.JaxRuntimeError, ValueError):
            assert not group.ok()
        group.step()  # after the loss, returns when three attempts have failed
    batch = make_batch(0, 0)
    y = program(*batch, group.experts, group.dense, group.placement)
    x, ids, weights = batch
    weights = np.where(np.isin(ids, group.lost_experts), 0, weights)
    np.testing.assert_array_equal(np.asarray(y), expected(x, ids, weights))
    return group.members, group.lost_experts


@pytest.mark.parametrize("broken", [False, True])
def test_experts_that_cannot_be_restored_do_not_stop_the_group(broken):
    assert run_to_deaths(rank_unrestorable, broken, num_ranks=2, dead={1})[0] == ((0,), [2, 3])


def rank_leader_dies(job):
    """Rank 2 dies, and rank 0, which leads, while it restores what was lost."""

    def restore(ids):
        if job.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return expert_weights(ids)

    group = start(job, [0, 1, 2], timeout_s=0.5, restore=restore)
    table = np.full(CONFIG.num_slots, -1)
    table[[0, 1, 4, 5, 8, 9]] = [0, 1, 0, 1, 2, 3]

    def drive():
        while not group.epoch:
            time.sleep(0.01)
        group.resize([0, 1, 2], table=table)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    if job.rank == 2:
        threading.Thread(target=drive).start()
    serve(group, lambda: group.members == (1,) and not group.lost_experts)


def rank_dies_before_the_first_step(job):
    """Rank 0, which alone has experts, dies when all have begun."""
    group = start(job, [0, 1, 2], restore=expert_weights)
    if job.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    healed = lambda: group.epoch > 1 and not group.lost_experts  # noqa: E731

    def drive():
        wait_until(healed)
        group.resize([1])

    if job.rank == 1:
        threading.Thread(target=drive).start()
    serve(group, lambda: group.members == (1,))
    assert [switch.members for switch in group.elastic.history][:2] == [(1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("function", "dead", "transport"),
    [(rank_leader_dies, {0, 2}, "nixl"), (rank_dies_before_the_first_step, {0}, "shared")],
)
def test_lost_experts_come_back(function, dead, transport):
    assert set(run_to_deaths(function, num_ranks=3, dead=dead, env=transport_env(transport))) == {0, 1, 2} - dead


def rank_store_dies_in_prepare(job, url):
    group = start(job, [0, 1], store=url)
    said, end = [], []

    def drive():
        while not group.epoch:
            time.sleep(0.01)
        try:
            group.resize([0, 1], deadline_s=15)
        except (nx.ElasticError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not end:
            try:
                group.resize([0], deadline_s=10)
                end.append(1)
            except (nx.ElasticError, RuntimeError):
                time.sleep(0.2)

    def tell_and_wait(change):
        if change.members == (0, 1):
            with connect(url) as store:
                store.put("test/preparing", b"")
            time.sleep(2)

    if job.rank == 0:
        group.elastic.on_prepare.append(tell_and_wait)
        threading.Thread(target=drive).start()
    steps, times = serve(group, lambda: bool(end))
    return said, summary(group, steps, gap=np.diff([t for t, _ in times]).max())


def test_a_store_that_dies_in_a_change_and_comes_back_empty(pools):
    servers = [StoreServer()]
    url = servers[0].url

    def restart():
        with connect(url) as store:
            store.wait(["test/preparing"], 60)
        servers[0].close()
        time.sleep(1)
        servers.append(StoreServer(port=int(url.rsplit(":", 1)[1])))

    thread = threading.Thread(target=restart)
    thread.start()
    (said, answer), (_, other) = pools(2).run(rank_store_dies_in_prepare, url, timeout_s=90)
    thread.join()
    servers[-1].close()
    assert len(said) == 1, said
    assert [members for _, members, *_ in answer["history"]] == [(0, 1), (0,)]
    assert max(answer["gap"], other["gap"]) < 2
