"""The protocol of elastic groups: every interleaving for small groups, and random ones for larger."""

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jax_nixlep.elastic.protocol import State, first_state, unready
from jax_nixlep.placement import plan_table

PER_RANK = 2


# --- Exhaustively: two ranks and a joiner, commit and death in every order. ---


@dataclasses.dataclass(frozen=True)
class Rank:
    """What one rank knows and does. It reads the log one entry at a time, whenever it likes."""

    read: int  # entries of the log it has read
    epoch: int  # in which it serves
    boundary: int = 0
    running: bool = False  # an operation runs
    alive: bool = True
    promise: int | None = None


@dataclasses.dataclass(frozen=True)
class World:
    log: tuple[tuple, ...]  # events, as sorted items
    ranks: tuple[Rank, ...]
    served: int = 0  # newest epoch in which a step completed
    deaths: int = 1  # that may still come

    def replaced(self, i, **changes):
        ranks = list(self.ranks)
        ranks[i] = dataclasses.replace(ranks[i], **changes)
        return dataclasses.replace(self, ranks=tuple(ranks))

    def append(self, **event):
        return dataclasses.replace(self, log=(*self.log, tuple(sorted(event.items()))))


FIRST = State(1, (0, 1), (0, 1, 0, 1, -1, -1), PER_RANK)
TARGET = (1, 2)  # rank 0 leaves, rank 2 joins
TABLE = (-1, -1, 0, 1, 0, 1)
MAX_BOUNDARY = 1


def state_at(log, length, cache):
    key = log[:length]
    if key not in cache:
        cache[key] = FIRST if not key else state_at(log, length - 1, cache).apply(dict(key[-1]))
    return cache[key]


def successors(world, cache):
    """Every world one action away."""
    newest = state_at(world.log, len(world.log), cache)
    for i, rank in enumerate(world.ranks):
        if not rank.alive:
            continue
        if rank.read < len(world.log):
            yield world.replaced(i, read=rank.read + 1)
        if world.deaths:
            yield dataclasses.replace(world.replaced(i, alive=False, running=False), deaths=world.deaths - 1)
        if rank.read < len(world.log):
            continue  # whoever appends has read everything: the store refuses other entries
        state, change = newest, newest.change
        if change and change.phase == "prepare":
            if i in unready(state):
                yield world.append(kind="ready", change="c", rank=i)
            if not unready(state):
                yield world.append(kind="commit", change="c")
        if change and change.phase in ("prepare", "commit"):
            yield world.append(kind="abort", change="c", reason="")
        if change and change.phase == "commit" and i in state.members and rank.promise is None:
            ahead = 1 if rank.running else 0
            promised = world.replaced(i, promise=rank.boundary + ahead)
            yield promised.append(kind="hold", change="c", rank=i, step=rank.boundary + ahead)
        if change and change.phase == "switch" and i in set(change.members) - {*state.members, *change.arrived}:
            yield world.append(kind="arrive", epoch=state.epoch, rank=i, change="c")  # a newcomer, which waits
        # The program's thread, at a boundary.
        if rank.running or i not in state.members:
            continue
        if rank.epoch != state.epoch:
            yield world.replaced(i, epoch=state.epoch, boundary=0, promise=None)
            continue
        dead = [r for r in state.members if not world.ranks[r].alive]
        if dead and not state.recovery:
            yield world.append(kind="suspect", epoch=state.epoch, rank=i, ranks=tuple(dead))
        if state.recovery and i not in state.recovery.arrived:
            yield world.append(kind="arrive", epoch=state.epoch, rank=i, change="")
        if state.recovery and i in state.recovery.arrived:
            others = tuple(r for r in state.members if r not in state.recovery.arrived)  # dead, or only late
            yield world.append(kind="evict", epoch=state.epoch, rank=i, ranks=others)
        if change and change.phase == "switch" and rank.boundary >= change.step and i not in change.arrived:
            yield world.append(kind="arrive", epoch=state.epoch, rank=i, change="c")
    # Operations begin in view of what the rank has read, not of the newest state.
    for i, rank in enumerate(world.ranks):
        if not rank.alive or rank.running or rank.boundary >= MAX_BOUNDARY:
            continue
        seen = state_at(world.log, rank.read, cache)
        if seen.epoch != rank.epoch or i not in seen.members or seen.recovery:
            continue
        change = seen.change
        held = rank.promise is not None and change and change.phase == "commit" and rank.boundary >= rank.promise
        stopped = change and change.phase == "switch" and rank.boundary >= change.step
        if not held and not stopped:
            yield world.replaced(i, running=True)
    # A step completes when all members of the epoch run it.
    for epoch in {rank.epoch for rank in world.ranks if rank.running}:
        members = members_of(world, epoch, cache)
        if members and all(world.ranks[r].running and world.ranks[r].epoch == epoch for r in members):
            assert epoch >= world.served, f"epoch {epoch} serves after {world.served}: {world.log}"
            done = dataclasses.replace(world, served=epoch)
            for r in members:
                done = done.replaced(r, running=False, boundary=world.ranks[r].boundary + 1)
            yield done
    # An operation that cannot complete is given up: a peer died, stopped, or serves another epoch.
    for i, rank in enumerate(world.ranks):
        if rank.running and rank.alive:
            yield world.replaced(i, running=False)


def members_of(world, epoch, cache):
    for length in range(len(world.log) + 1):
        state = state_at(world.log, length, cache)
        if state.epoch == epoch:
            return state.members
    return ()


def check(world, cache):
    state = state_at(world.log, len(world.log), cache)
    held = {e for slot, e in enumerate(state.table) if e >= 0}
    assert held == {0, 1} or not set(range(3)) - set(state.evicted), "lost an expert that had a live copy"
    assert all(slot // PER_RANK in state.members for slot, e in enumerate(state.table) if e >= 0)


@pytest.mark.parametrize(("phase", "deaths", "entries"), [("prepare", 0, 14), ("prepare", 1, 8), ("commit", 1, 13)])
def test_every_interleaving(phase, deaths, entries):
    cache: dict = {}
    begin = {
        "kind": "begin",
        "change": "c",
        "epoch": 1,
        "rank": 0,
        "members": TARGET,
        "table": TABLE,
        "deadline_s": 1.0,
    }
    ranks = (Rank(1, 1), Rank(1, 1), Rank(1, 0))
    start = World((), ranks, deaths=deaths).append(**begin)
    if phase == "commit":
        for i in range(3):
            start = start.append(kind="ready", change="c", rank=i)
        start = start.append(kind="commit", change="c")
        for i in range(3):
            start = start.replaced(i, read=len(start.log))
    seen, stack, epochs = {start}, [start], set()
    while stack:
        world = stack.pop()
        check(world, cache)
        epochs.add((world.served, state_at(world.log, len(world.log), cache).members))
        for following in successors(world, cache):
            if following not in seen and len(following.log) <= entries:
                seen.add(following)
                stack.append(following)
    if entries > 8:
        assert (2, (1, 2)) in epochs  # the change can happen
    if deaths:
        assert {(0,), (1,)} <= {members for _, members in epochs}
    print(len(seen), max(len(w.log) for w in seen), sorted(epochs))


# --- At random: more ranks, stale and duplicated entries. ---


class Protocol(RuleBasedStateMachine):
    """Entries of any kind, also such as make no sense, in any order."""

    def __init__(self):
        super().__init__()
        self.state = first_state([0, 1, 2], (0, 1, 2, -1, -1, -1, -1, -1, -1, -1), PER_RANK, 1.0)
        self.arrived: set[tuple[int, int]] = set()  # (epoch, rank)
        self.begun = 0

    def apply(self, **event):
        before, self.state = self.state, self.state.apply(event)
        if event["kind"] == "arrive":
            self.arrived.add((event["epoch"], event["rank"]))
        if self.state.epoch != before.epoch:
            assert self.state.epoch == before.epoch + 1
            gone = set(self.state.evicted)
            stopped = {r for r in before.members if (before.epoch, r) in self.arrived}
            assert stopped | gone >= set(before.members), "an epoch began while a member of the last may still serve"
            here = {r for r in self.state.members if (before.epoch, r) in self.arrived}
            assert here == set(self.state.members), "an epoch began with a member that did not come"

    ranks = st.integers(0, 4)
    ids = st.sampled_from(["start", "c1", "c2", "c3", "c4", "c5", "c6"])

    @rule(rank=ranks, members=st.sets(ranks, min_size=3))
    def begin(self, rank, members):
        self.begun += 1
        table = plan_table(sorted(members), PER_RANK, [-1] * 10, [1.0] * 3)
        name = f"c{self.begun % 6 + 1}"
        self.apply(kind="begin", change=name, epoch=self.state.epoch, rank=rank, members=sorted(members),
                   table=tuple(int(e) for e in table), deadline_s=1.0)  # fmt: skip

    @precondition(lambda self: self.state.change)
    @rule()
    def all_ready_and_commit(self):
        for rank in sorted({*self.state.members, *self.state.change.members}):
            self.apply(kind="ready", change=self.state.change.id, rank=rank)
        self.apply(kind="commit", change=self.state.change.id)
        for rank in self.state.members:
            self.apply(kind="hold", change=self.state.change.id, rank=rank, step=rank)
        assert self.state.change.phase == "switch"

    @rule(change=ids, rank=ranks)
    def ready(self, change, rank):
        self.apply(kind="ready", change=change, rank=rank)

    @rule(change=ids)
    def commit(self, change):
        self.apply(kind="commit", change=change)

    @rule(change=ids, rank=ranks, step=st.integers(0, 5))
    def hold(self, change, rank, step):
        self.apply(kind="hold", change=change, rank=rank, step=step)

    @rule(change=ids)
    def abort(self, change):
        before = self.state
        self.apply(kind="abort", change=change, reason="test")
        assert self.state.members == before.members and self.state.epoch == before.epoch

    @rule(rank=ranks, stale=st.integers(0, 1))
    def arrive(self, rank, stale):
        change = self.state.change.id if self.state.change else ""
        self.apply(kind="arrive", epoch=self.state.epoch - stale, rank=rank, change=change)

    @rule(rank=ranks, others=st.sets(ranks), stale=st.integers(0, 1))
    def suspect(self, rank, others, stale):
        self.apply(kind="suspect", epoch=self.state.epoch - stale, rank=rank, ranks=sorted(others))

    @rule(rank=ranks, others=st.sets(ranks))
    def evict(self, rank, others):
        self.apply(kind="evict", epoch=self.state.epoch, rank=rank, ranks=sorted(others))

    @invariant()
    def consistent(self):
        state = self.state
        assert state.members and not (state.change and state.recovery)
        assert all(slot // PER_RANK in state.members for slot, e in enumerate(state.table) if e >= 0)
        if not (state.change or state.recovery):
            assert State.from_json(state.to_json()).to_json() == state.to_json()


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
