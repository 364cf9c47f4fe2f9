"""Who is a member: the protocol of an elastic group, as a pure function of a log.

The store holds a log: entry n is the key made of n, written by compare_and_swap against "no such key", so all ranks
read the same entries in the same order and a rank that appends knows what came before. `State` is what the log means;
`apply` is total and deterministic, and ignores what does not fit. No rank decides anything else, and none is special:
whoever asked for a change may die, and any rank may append an abort, a suspicion or an eviction.

Resize.   begin    one change at a time; the second is ignored, and its caller sees whose runs.
          ready    by each old and new member: connected, weights received, warmed up. Serving goes on.
          commit   by the caller once all are ready.
          hold     by each old member: "I stop at boundary k until I know more". The greatest k is the step.
          arrive   by each old member that stands at the step, with no operation running, and by each new one, which
                   waits. When all have arrived, and at that very entry, the next epoch begins: members, table and
                   weights switch together.
          abort    at any time before that (a deadline, a failed or dead joiner, the caller); the old epoch goes on.
Loss.     suspect  by a rank whose operation failed or masked a peer. Aborts a change; all members stop and arrive. One
                   that names itself leaves.
          evict    names members that left, did not arrive in time or are known dead.
          When every member has arrived or is evicted, the next epoch begins with those that arrived. An evicted rank
          finds itself out, and may rejoin by a later change.
          forgo    experts that were lost do not come back in this epoch; serving goes on without.

Why two epochs never serve at once: an epoch begins at the entry where every member of the one before has said that it
stopped, or has been evicted. An evicted rank that still runs cannot complete a step: a step needs all members of its
epoch, and all others have stopped; a step in which it masked them does not count. A crash between two entries leaves
the old state. While the store is away nothing can be appended: the epoch that serves goes on serving; a rank that was
asked to hold goes on once its deadline is over, since nothing can have begun without its arrival; only a rank that
cannot tell whether its arrival was written has to stop.
Steps, "boundary k", are counted from the begin of an epoch; all members run the same operations, so they agree on k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Event = Mapping[str, Any]  # JSON: "kind", and the fields that `apply` names
_KEPT = ("epoch", "members", "table", "per_rank", "last", "aborted", "evicted", "forgone")  # by a snapshot


@dataclasses.dataclass(frozen=True)
class Running:
    """A change that has begun and neither happened nor been aborted."""

    id: str
    by: int
    members: tuple[int, ...]
    table: tuple[int, ...]
    deadline_s: float
    phase: Literal["prepare", "commit", "switch"] = "prepare"
    ready: frozenset[int] = frozenset()
    holds: tuple[tuple[int, int], ...] = ()  # (rank, boundary)
    arrived: frozenset[int] = frozenset()

    @property
    def step(self) -> int:
        """The boundary at which to arrive, in phase "switch"."""
        return max(boundary for _, boundary in self.holds)


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Members stop, to go on without some."""

    suspects: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()  # those that said so themselves
    arrived: frozenset[int] = frozenset()
    evicted: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class State:
    """What a prefix of the log means.

    Attributes:
      epoch: number of the membership; grows by one.
      members: its ranks, ascending.
      table: logical expert of each physical slot, -1 for none.
      per_rank: slots of a rank.
      change: the one that runs.
      recovery: the one that runs; excludes a change.
      last: id of the change that made this epoch, or "" after a loss or at the start.
      aborted: (id, reason) of the newest change that did not happen.
      evicted: who was lost when this epoch began.
      forgone: this epoch serves without the experts that were lost.
    """

    epoch: int
    members: tuple[int, ...]
    table: tuple[int, ...]
    per_rank: int
    change: Running | None = None
    recovery: Recovery | None = None
    last: str = ""
    aborted: tuple[str, str] = ("", "")
    evicted: tuple[int, ...] = ()
    forgone: bool = False

    def apply(self, event: Event) -> State:
        """The state after `event`; this one if the event does not fit."""
        handler = _HANDLERS.get(event.get("kind", ""))
        return self if handler is None else handler(self, event)

    def to_json(self) -> dict[str, Any]:
        """What a snapshot of the log needs: at the start, or when nothing runs."""
        deadline_s = self.change.deadline_s if self.change else 0.0
        return {name: getattr(self, name) for name in _KEPT} | {"deadline_s": deadline_s}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> State:
        epoch, members, table = int(value["epoch"]), tuple(value["members"]), tuple(value["table"])
        aborted = value["aborted"][0], value["aborted"][1]
        if not epoch:
            start = first_state(members, table, value["per_rank"], value["deadline_s"])
            return dataclasses.replace(start, aborted=aborted)
        return State(
            epoch,
            members,
            table,
            value["per_rank"],
            last=value["last"],
            aborted=aborted,
            evicted=tuple(value["evicted"]),
            forgone=value["forgone"],
        )


def first_state(members: Iterable[int], table: tuple[int, ...], per_rank: int, deadline_s: float) -> State:
    """Epoch 0, in which nobody serves: the first members are to arrive for epoch 1."""
    ranks = tuple(sorted(members))
    holds = tuple((rank, 0) for rank in ranks)
    start = Running("start", ranks[0], ranks, table, deadline_s, phase="switch", holds=holds)
    return State(0, ranks, table, per_rank, change=start)


def _begin(state: State, event: Event) -> State:
    if state.change or state.recovery or event["epoch"] != state.epoch or not event["members"]:
        return state
    members, table = tuple(sorted(event["members"])), tuple(event["table"])
    change = Running(event["change"], event["rank"], members, table, event["deadline_s"])
    return dataclasses.replace(state, change=change)


def running(state: State, change_id: str, *phases: str) -> Running | None:
    """The change of this id, if it runs and is in one of the `phases`."""
    change = state.change
    return change if change and change.id == change_id and change.phase in phases else None


def _ready(state: State, event: Event) -> State:
    if not (change := running(state, event["change"], "prepare")):
        return state
    return dataclasses.replace(state, change=dataclasses.replace(change, ready=change.ready | {event["rank"]}))


def _commit(state: State, event: Event) -> State:
    change = running(state, event["change"], "prepare")
    if not change or unready(state):
        return state
    return dataclasses.replace(state, change=dataclasses.replace(change, phase="commit"))


def _hold(state: State, event: Event) -> State:
    change = running(state, event["change"], "commit")
    if not change or event["rank"] not in state.members:
        return state
    holds = {event["rank"]: event["step"]} | dict(change.holds)  # the first counts
    change = dataclasses.replace(change, holds=tuple(sorted(holds.items())))
    if set(holds) == set(state.members):
        change = dataclasses.replace(change, phase="switch")
    return dataclasses.replace(state, change=change)


def _abort(state: State, event: Event) -> State:
    if not running(state, event["change"], "prepare", "commit", "switch"):
        return state
    return dataclasses.replace(state, change=None, aborted=(event["change"], event["reason"]))


def _arrive(state: State, event: Event) -> State:
    rank = event["rank"]
    if event["epoch"] != state.epoch:
        return state
    if state.recovery:
        if rank not in state.members or rank in state.recovery.evicted:
            return state
        return _recovered(state, dataclasses.replace(state.recovery, arrived=state.recovery.arrived | {rank}))
    # Named: an arrival for a change that was aborted says nothing about the next one.
    change = running(state, event["change"], "switch")
    if not change or rank not in {*state.members, *change.members}:
        return state
    change = dataclasses.replace(change, arrived=change.arrived | {rank})
    if change.arrived >= {*state.members, *change.members}:
        return State(
            state.epoch + 1, change.members, change.table, state.per_rank, last=change.id, aborted=state.aborted
        )
    return dataclasses.replace(state, change=change)


def _suspect(state: State, event: Event) -> State:
    if event["epoch"] != state.epoch or event["rank"] not in state.members:
        return state
    old, named = state.recovery or Recovery(), set(event["ranks"]) & set(state.members)
    recovery = dataclasses.replace(old, suspects=old.suspects | named, left=old.left | named & {event["rank"]})
    aborted = (state.change.id, f"rank {event['rank']} lost a member") if state.change else state.aborted
    return dataclasses.replace(state, change=None, recovery=recovery, aborted=aborted)


def _evict(state: State, event: Event) -> State:
    recovery = state.recovery
    if event["epoch"] != state.epoch or recovery is None or event["rank"] not in recovery.arrived:
        return state
    evicted = (recovery.evicted | set(event["ranks"]) & set(state.members)) - recovery.arrived
    return _recovered(state, dataclasses.replace(recovery, evicted=evicted))


def _forgo(state: State, event: Event) -> State:
    return dataclasses.replace(state, forgone=True) if event["epoch"] == state.epoch else state


def _recovered(state: State, recovery: Recovery) -> State:
    if recovery.arrived | recovery.evicted < set(state.members):
        return dataclasses.replace(state, recovery=recovery)
    gone, per_rank = recovery.evicted, state.per_rank
    return State(
        state.epoch + 1,
        tuple(sorted(recovery.arrived)),
        tuple(-1 if slot // per_rank in gone else expert for slot, expert in enumerate(state.table)),
        per_rank,
        aborted=state.aborted,
        evicted=tuple(sorted(recovery.evicted)),
    )


_HANDLERS = {
    "begin": _begin,
    "ready": _ready,
    "commit": _commit,
    "hold": _hold,
    "abort": _abort,
    "arrive": _arrive,
    "suspect": _suspect,
    "evict": _evict,
    "forgo": _forgo,
}


def unready(state: State) -> set[int]:
    """Ranks whose `ready` the running change waits for."""
    assert state.change is not None
    return (set(state.members) | set(state.change.members)) - state.change.ready


def waits_for(state: State) -> list[int]:
    """Ranks that have still to do something for the running change to enter its next phase, or to happen."""
    change = state.change
    assert change is not None
    if change.phase == "prepare":
        return sorted(unready(state))
    if change.phase == "commit":
        return sorted(set(state.members) - {rank for rank, _ in change.holds})
    return sorted({*state.members, *change.members} - change.arrived)
