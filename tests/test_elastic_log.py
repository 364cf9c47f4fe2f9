"""The log of elastic groups in a store that loses replies, repeats entries, and is started again."""

import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jax_nixlep.elastic import log as logs
from jax_nixlep.elastic.log import PREFIX, Log
from jax_nixlep.elastic.protocol import State, unready
from jax_nixlep.store import StoreError, connect
from jax_nixlep.store.tcp import StoreServer

TABLE = (0, 1, 0, 1, 0, 1, -1, -1)
ABOUT = {"hidden": 8}


class Unreliable:
    """A store whose next compare_and_swap can get lost on the way there or back."""

    def __init__(self, store):
        self._store = store
        self.lose = ""

    def __getattr__(self, name):
        return getattr(self._store, name)

    def compare_and_swap(self, key, expected, value):
        lose, self.lose = self.lose, ""
        if lose == "request":
            raise StoreError("lost")
        done = self._store.compare_and_swap(key, expected, value)
        if lose == "reply":
            raise StoreError("lost")
        return done


@pytest.fixture
def store():
    with StoreServer() as server, connect(server.url) as client:
        yield client


def empty(store):
    """As a server that was started again."""
    store.delete("")


def make_logs(store, count=3):
    first = Log(store, 0)
    first.create(State(1, tuple(range(count)), TABLE, 2), ABOUT)
    made = [first] + [Log(store, rank) for rank in range(1, count)]
    for log in made:
        log.open(1)
    return made


def look(log):
    """As the follower does when nothing came for a while."""
    log.wait(log.state, 0.01)
    log.pull()


def begin_and_abort(log, name):
    log.append(
        lambda s: (
            {"kind": "begin", "change": name, "epoch": s.epoch, "rank": 0, "members": [0, 1], "table": TABLE}
            | {"deadline_s": 1.0}
        )
    )
    log.append(lambda s: {"kind": "abort", "change": name, "reason": "test"})


def test_all_read_the_same(store):
    first, second, third = make_logs(store)
    begin_and_abort(first, "c1")
    second.append(lambda s: {"kind": "suspect", "epoch": 1, "rank": 1, "ranks": [2]})
    for log in (first, second, third):
        log.pull()
    assert first.state == second.state == third.state
    assert third.state.aborted == ("c1", "test") and third.state.recovery.suspects == {2}


def test_opening_again_never_goes_back(store):
    """A leaver opens the log again to rejoin, while the thread that asked for the change looks whether it happened."""
    first, second, _ = make_logs(store)
    begin_and_abort(first, "c1")
    second.pull()
    seen = []
    watched = Log(store, 1, lambda: seen.append(watched._next))
    watched.open(1)
    load = watched._load
    watched._load = lambda snapshot: (load(snapshot), seen.append(watched._next))
    watched.open(1)
    assert seen == sorted(seen) and seen[-1] == 2


@pytest.mark.parametrize("lost", ["request", "reply"])
def test_an_entry_whose_reply_is_lost_is_there_once(store, lost):
    make_logs(store)
    unreliable = Unreliable(store)
    log = Log(unreliable, 0)
    log.open(1)
    unreliable.lose = lost
    event = {"kind": "suspect", "epoch": 1, "rank": 0, "ranks": [1]}
    try:
        log.append(lambda s: event)
    except StoreError:
        assert lost == "request"
        log.append(lambda s: event)
    assert len(store.scan(f"{PREFIX}log/")) == 1


def test_a_rank_that_was_away_does_not_append_among_deleted_entries(store):
    """It would evict the others all by itself, in entries that nobody else reads."""
    first, _, away = make_logs(store)
    for i in range(logs._PAGE * 3 // 2):
        begin_and_abort(first, f"c{i}")
    first.trim()
    assert store.get(away._key(away._next)) is None, "the entry it would read next was not deleted"
    away.append(lambda s: {"kind": "suspect", "epoch": s.epoch, "rank": 2, "ranks": [0, 1]})
    away.append(lambda s: {"kind": "arrive", "epoch": s.epoch, "rank": 2, "change": ""})
    first.pull()
    assert first.state == away.state and first.state.recovery.arrived == {2}


def test_trimming_deletes_all_that_was_read(store):
    first, *_ = make_logs(store)
    for i in range(5 * logs._PAGE):
        begin_and_abort(first, f"c{i}")
        if i % logs._PAGE == 0:
            first.trim()
    first.trim()
    assert len(store.scan(f"{PREFIX}log/")) <= 2 * logs._PAGE


def test_the_newest_state_survives_a_store_that_was_started_again(store):
    """The rank that was behind must not make the others forget an epoch that they have begun."""
    ahead, behind, third = make_logs(store)
    for rank in range(3):
        ahead.append(lambda s, rank=rank: {"kind": "suspect", "epoch": 1, "rank": rank, "ranks": []})
        ahead.append(lambda s, rank=rank: {"kind": "arrive", "epoch": 1, "rank": rank, "change": ""})
    assert ahead.state.epoch == 2 and behind.state.epoch == 1
    empty(store)
    look(behind)
    look(third)
    assert behind.state.epoch == 1, "it went on before the others had said what they know"
    look(ahead)
    for log in (ahead, behind, third):
        look(log)
    assert ahead.state == behind.state == third.state and behind.state.epoch == 2
    begin_and_abort(behind, "c1")
    ahead.pull()
    assert ahead.state == behind.state


def test_a_store_that_was_started_again_drops_what_ran(store):
    first, second, third = make_logs(store)
    first.append(
        lambda s: (
            {"kind": "begin", "change": "c", "epoch": 1, "rank": 0, "members": [0, 1], "table": TABLE}
            | {"deadline_s": 1.0}
        )
    )
    empty(store)
    with pytest.raises(StoreError, match="started again"):
        second.append(lambda s: {"kind": "suspect", "epoch": 1, "rank": 1, "ranks": []})
    for _ in range(3):
        for log in (first, second, third):
            look(log)
    assert first.state == second.state == third.state and first.state.change is None


def test_another_job_in_the_store(store):
    """A member keeps away from the log of a later job; a newcomer follows it."""
    first, *_ = make_logs(store)
    newcomer = Log(store, 3)
    newcomer.newcomer = True
    newcomer.open(1)
    Log(store, 0).create(State(7, (0,), TABLE, 2), {"hidden": 9})
    with pytest.raises(StoreError, match="must hold the group's log"):
        first.append(lambda s: {"kind": "suspect", "epoch": 1, "rank": 0, "ranks": []})
    look(newcomer)
    assert newcomer.state.epoch == 7 and first.state.epoch == 1
    assert newcomer.about == {"hidden": 9} and first.about == ABOUT


# --- At random: ranks that read late, die and meet faults, with the real log in a real store. ---


class Rank:
    def __init__(self, store, rank):
        self.store = Unreliable(store)
        self.log = Log(self.store, rank)
        self.rank = rank
        self.applied = 0
        self.stopped = False  # it arrived, or may have, and runs nothing


class Group(RuleBasedStateMachine):
    """Any rank may do at any time what the protocol allows in view of what it has read, however old."""

    server = None

    @initialize()
    def start(self):
        if Group.server is None:
            Group.server = StoreServer()
            Group.client = connect(Group.server.url)
        self.client.delete("")
        self.ranks = [Rank(self.client, rank) for rank in range(4)]
        first = State(1, (0, 1, 2), TABLE, 2)
        self.ranks[0].log.create(first, ABOUT)
        for rank in self.ranks:
            rank.log.newcomer = rank.rank == 3
            rank.log.open(1)
            rank.applied = 1 if rank.rank < 3 else 0
        self.changes = 0
        self.served = 1
        self.members = {1: first.members}  # of each epoch
        self.written = []  # events, to be written again

    def note(self):
        for rank in self.alive():
            state = rank.log.state
            known = self.members.setdefault(state.epoch, state.members)
            assert known == state.members, f"epoch {state.epoch} has two memberships"

    def alive(self):
        return [rank for rank in self.ranks if rank is not None]

    def append(self, rank, make):
        def remember(state):
            event = make(state)
            if event is not None:
                self.written.append(event)
            return event

        try:
            rank.log.append(remember)
        except StoreError:
            return
        finally:
            self.note()

    who = st.integers(0, 3)

    @rule(who=who)
    def read(self, who):
        if rank := self.ranks[who]:
            rank.log.pull()
            self.note()

    @rule(who=who)
    def boundary(self, who):
        """What the thread that steps does, in view of what was read so far."""
        rank = self.ranks[who]
        if rank is None:
            return
        state = rank.log.state
        if who not in state.members or state.epoch < rank.applied:
            rank.applied, rank.stopped, rank.log.newcomer = 0, False, True
        elif rank.log.newcomer and not (state.last and who not in self.members.get(state.epoch - 1, ())):
            return
        elif state.epoch > rank.applied:
            rank.applied, rank.stopped, rank.log.newcomer = state.epoch, False, False
        elif state.recovery or (state.change and state.change.phase == "switch"):
            rank.stopped = True
            change = state.change.id if state.change else ""
            epoch = rank.applied
            self.append(
                rank,
                lambda s: (
                    {"kind": "arrive", "epoch": epoch, "rank": who, "change": change} if s.epoch == epoch else None
                ),
            )
        else:
            rank.stopped = False

    @rule(who=who, members=st.sets(who, min_size=1))
    def begin(self, who, members):
        rank = self.ranks[who]
        if rank and rank.applied:
            self.changes += 1
            name = f"c{self.changes}"
            table = tuple(expert if slot // 2 in members else -1 for slot, expert in enumerate((0, 1) * 4))
            self.append(
                rank,
                lambda s: (
                    {"kind": "begin", "change": name, "epoch": s.epoch, "rank": who, "deadline_s": 1.0}
                    | {"members": sorted(members), "table": table}
                ),
            )

    @rule(who=who)
    def go_on(self, who):
        """The next entry for the change that runs."""
        if (rank := self.ranks[who]) is None:
            return

        def following(state):
            change = state.change
            if change is None:
                return None
            if change.phase == "prepare" and who in unready(state):
                return {"kind": "ready", "change": change.id, "rank": who}
            if change.phase == "prepare" and not unready(state):
                return {"kind": "commit", "change": change.id}
            if change.phase == "commit" and who in state.members:
                return {"kind": "hold", "change": change.id, "rank": who, "step": who}
            return None

        self.append(rank, following)

    @rule(who=who)
    def abort(self, who):
        if rank := self.ranks[who]:
            self.append(rank, lambda s: s.change and {"kind": "abort", "change": s.change.id, "reason": "test"})

    @rule(who=who, late=st.sets(who))
    def suspect(self, who, late):
        """With cause or without."""
        rank = self.ranks[who]
        if rank and rank.applied:
            epoch = rank.applied
            self.append(rank, lambda s: {"kind": "suspect", "epoch": epoch, "rank": who, "ranks": sorted(late)})

    @rule(who=who)
    def evict(self, who):
        rank = self.ranks[who]
        if rank and rank.applied and rank.stopped:
            epoch = rank.applied

            def missing(state):
                if state.epoch != epoch or not state.recovery:
                    return None
                out = sorted(set(state.members) - state.recovery.arrived)
                return {"kind": "evict", "epoch": epoch, "rank": who, "ranks": out}

            self.append(rank, missing)

    @rule(who=who, index=st.integers(0, 40))
    def repeat(self, who, index):
        """An earlier event is written once more, as by a rank that did not hear of its success."""
        if self.ranks[who] and self.written:
            event = self.written[index % len(self.written)]
            # No rank claims once more that it stopped while it goes on.
            if event["kind"] != "arrive" or self.ranks[event["rank"]] is None:
                self.append(self.ranks[who], lambda s: event)

    @rule(who=who, lose=st.sampled_from(["request", "reply"]))
    def fault(self, who, lose):
        if rank := self.ranks[who]:
            rank.store.lose = lose

    @rule(who=who)
    def trim(self, who):
        if self.ranks[who]:
            self.ranks[who].log.trim()

    @precondition(lambda self: len(self.alive()) > 1)
    @rule(who=who)
    def die(self, who):
        self.ranks[who] = None

    @rule()
    def step_completes(self):
        """A step needs all members of its epoch, none of which has stopped."""
        for epoch in {rank.applied for rank in self.alive() if rank.applied}:
            takes_part = [self.ranks[r] for r in self.members[epoch]]
            if all(rank and rank.applied == epoch and not rank.stopped for rank in takes_part):
                assert epoch >= self.served, f"epoch {epoch} serves after epoch {self.served}"
                self.served = epoch

    @invariant()
    def one_history(self):
        if not hasattr(self, "ranks"):
            return
        index: dict[int, str] = {}
        for rank in self.alive():
            state = json.dumps(rank.log.state.to_json(), sort_keys=True)
            assert index.setdefault(rank.log._next, state) == state, "two ranks read different entries"
        for epoch, members in self.members.items():
            serving = [r for r in members if self.ranks[r] and self.ranks[r].applied == epoch]
            stopped = [r for r in serving if self.ranks[r].stopped]
            if epoch < max(self.members) and len(serving) == len(members):
                assert stopped, f"epoch {epoch} can still serve"


TestGroup = Group.TestCase
TestGroup.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def close_server():
    yield
    if Group.server is not None:
        Group.client.close()
        Group.server.close()
