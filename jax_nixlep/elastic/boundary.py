"""The boundary between two steps, where a rank stops, switches to a new epoch, and goes on."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

from jax_nixlep import _ffi
from jax_nixlep.config import EpConfig
from jax_nixlep.elastic.links import Links
from jax_nixlep.elastic.log import Log
from jax_nixlep.elastic.protocol import Running, State, running, waits_for
from jax_nixlep.elastic.state import Shared, Switch
from jax_nixlep.placement import table_placement
from jax_nixlep.store import StoreError

_log = logging.getLogger(__name__)
_POLL_S = 0.004  # of a thread that waits for others
_IDLE_S = 0.25  # without an operation, after which a rank does not wait for the boundaries it promised
_GRACE_S = 0.15  # for a suspect whose death would not show; it was told at once to stop
_HISTORY = 1000


def lost_experts(state: State, num_experts: int) -> list[int]:
    """Experts without a live replica."""
    return sorted(set(range(num_experts)) - set(state.table))


class Boundary:
    """Used by the one thread that steps."""

    def __init__(
        self,
        shared: Shared,
        log: Log,
        endpoint: _ffi.Endpoint,
        links: Links,
        config: EpConfig,
        rank: int,
        num_experts: int,
        *,
        timeout_s: float,
        join_timeout_s: float,
        restores: bool,
    ):
        """`restores`: experts that were lost are brought back."""
        self._shared, self._log, self._endpoint, self._links = shared, log, endpoint, links
        self._config, self._rank, self._num_experts = config, rank, num_experts
        self._timeout_s, self._join_timeout_s, self._restores = timeout_s, join_timeout_s, restores
        self._operations = 0
        self._idle = False  # no operation ran since the boundary before
        self._phase: tuple[tuple[str, str], float] = (("", ""), 0.0)  # of a change, and when `_since` first saw it
        self._timeouts: dict[int, int] = {}
        self.history: list[Switch] = []
        self.on_commit: list[Callable[[Switch], None]] = []

    def step(self) -> bool:
        """See `EpGroup.step`."""
        began, todo = time.monotonic(), ""
        if self._shared.applied:
            self._look_back()
        while True:
            self._shared.check("step")
            try:
                todo, state = self._next()
                if todo in ("go", "out"):
                    return todo == "go"
                if todo == "apply":
                    self._apply(state, began)
                elif todo == "wait":
                    self._wait(state, began)
                else:
                    self._log.append(lambda s, todo=todo: self._event(s, todo))  # type: ignore[misc]
            except StoreError:
                # A rank that only holds goes on: nothing can have begun without its arrival. One that may have arrived,
                # or has lost a member, needs the store.
                waited, state = time.monotonic() - began, self._log.state
                if todo == "wait" and not (self._shared.problem or self._arrived(state) or self.healing(state)):
                    if waited > self._timeout_s:
                        with self._shared.cond:
                            self._shared.promise = None
                elif waited > self._join_timeout_s:
                    raise

    def ok(self) -> bool:
        """Whether every operation since the last `step` had all members."""
        return not self._endpoint.failure() and not self._endpoint.gave_up()

    def healing(self, state: State) -> bool:
        """Experts that were lost are about to come back: results would be wrong until then."""
        room = len(state.members) * state.per_rank >= self._num_experts
        wanted = self._restores and not state.last and not state.forgone
        return (
            wanted and room and self._shared.held.experts is not None and bool(lost_experts(state, self._num_experts))
        )

    def stranger(self, state: State) -> bool:
        """A member has this rank's number, but is not this process, which was started again or has been out."""
        staged = self._shared.staged
        return self._rank in state.members and self._log.newcomer and not (staged and staged.change == state.last)

    def _look_back(self) -> None:
        """Judges what ran since the last boundary."""
        self._endpoint.drain()
        problem = self._endpoint.failure()
        if not problem and not self.ok():
            problem = "a member was late"
        with self._shared.cond:
            operations = self._endpoint.num_operations
            self._idle = operations == self._operations
            if problem:
                self._shared.problem = problem
            elif operations != self._operations:
                self._shared.boundary += 1
            self._operations = operations
            self._shared.at_boundary = True

    def _next(self) -> tuple[str, State]:
        """What this rank has to do in view of the log."""
        shared = self._shared
        with shared.cond:
            state, me = self._log.state, self._rank
            shared.warm = shared.at_boundary = True
            if me not in state.members or self.stranger(state) or state.epoch < shared.applied:
                if shared.applied:
                    self._leave()
                    return "out", state
                change = running(state, shared.staged.change, "prepare", "switch") if shared.staged else None
                if change and me not in (change.ready if change.phase == "prepare" else change.arrived):
                    return "ready" if change.phase == "prepare" else "arrive", state
                return "wait", state
            if state.epoch != shared.applied:
                return "apply", state
            if shared.problem and state.recovery is None:
                return "suspect", state
            change = state.change
            if state.recovery or (change and change.phase == "switch" and self._is_at(change)):
                return "wait" if self._arrived(state) else "arrive", state
            promise = shared.promise if change and change.phase == "commit" else None
            if change and promise and promise[0] == change.id and shared.boundary >= promise[1]:
                return "wait", state
            if self.healing(state):
                return "wait", state
            shared.at_boundary = False
            return "go", state

    def _is_at(self, change: Running) -> bool:
        """Whether the change may happen here. Boundaries are counted by steps with operations: with nothing to do for
        all, none would come."""
        seen_s = time.monotonic() - self._since(change)
        return self._shared.boundary >= change.step or (self._idle and seen_s > _IDLE_S)

    def _since(self, change: Running) -> float:
        """When this was first asked about the change in its phase of now."""
        if self._phase[0] != (change.id, change.phase):
            self._phase = ((change.id, change.phase), time.monotonic())
        return self._phase[1]

    def _arrived(self, state: State) -> bool:
        where = state.recovery or state.change
        return where is not None and self._rank in where.arrived

    def _event(self, state: State, todo: str) -> dict[str, Any] | None:
        me, staged = self._rank, self._shared.staged
        if todo == "ready":
            change = running(state, staged.change, "prepare") if staged else None
            return {"kind": "ready", "change": change.id, "rank": me} if change and me not in change.ready else None
        arrival = {"kind": "arrive", "epoch": state.epoch, "rank": me}
        if todo == "arrive" and not self._shared.applied and staged and running(state, staged.change, "switch"):
            return arrival | {"change": staged.change}  # a newcomer
        if me not in state.members or state.epoch != self._shared.applied:
            return None
        if todo == "suspect":
            return {"kind": "suspect", "epoch": state.epoch, "rank": me, "ranks": self._suspects()}
        return arrival | {"change": state.change.id if state.change else ""}

    def _suspects(self) -> list[int]:
        others = [r for r in self._shared.members if r != self._rank]
        health = {r: self._endpoint.health(r) for r in others}
        late = [r for r in others if health[r]["masked"] or health[r]["timeouts"] > self._timeouts.get(r, 0)]
        return sorted({*late, *(r for r in others if not self._links.alive(r))})

    def _wait(self, state: State, since: float) -> None:
        """Others have to do something: waits a little, and sees to those that do not."""
        with self._shared.cond:
            if self._log.state is state:
                self._shared.cond.wait(_POLL_S)
        now, me = time.monotonic(), self._rank
        if me not in state.members or self.stranger(state):
            check_joining(self._log, me, since, self._join_timeout_s)
            return
        if now - since > 1:
            self._log.pull()  # finds out whether the store is there
        recovery, change = state.recovery, state.change
        if recovery is not None:
            self._endpoint.interrupt()
            waited = now - (self._shared.recovery_began or now)
            patience_s = self._timeout_s if state.epoch else self._join_timeout_s
            out = []
            for r in sorted(set(state.members) - recovery.arrived):
                doubtful = r in recovery.suspects and not self._links.shows_death(r)
                gone = r in recovery.left or not self._links.alive(r)
                if gone or waited > (_GRACE_S if doubtful else patience_s):
                    out.append(r)
            if out:
                event = {"kind": "evict", "epoch": state.epoch, "rank": me, "ranks": out}
                self._log.append(lambda s: event if s.epoch == state.epoch and s.recovery else None)
        elif change:
            patience_s = self._timeout_s if state.epoch else change.deadline_s
            impatient = change.phase != "prepare" and now - self._since(change) > patience_s
            missing = [r for r in waits_for(state) if impatient or not self._links.alive(r)]
            late = [r for r in missing if r in state.members]
            if late or not all(self._links.alive(r) for r in state.members):
                ranks = late or self._suspects()
                event = {"kind": "suspect", "epoch": state.epoch, "rank": me, "ranks": ranks}
            elif missing:  # newcomers: the members lose nothing but the change
                event = {"kind": "abort", "change": change.id, "reason": f"ranks {missing} are gone, or did not arrive"}
            else:
                return
            self._log.append(lambda s: event if running(s, change.id, "prepare", "commit", "switch") else None)

    def _apply(self, state: State, began: float) -> None:
        """Starts an epoch on this rank. No operation runs."""
        shared = self._shared
        joined = not shared.applied
        with shared.cond:
            self._links.keep(state.members)
            self._endpoint.activate(state.epoch, list(state.members))
            staged = shared.staged
            if staged and staged.change == state.last:
                if shared.held.experts and shared.held.experts is not staged.experts:
                    shared.held.experts.retire()
                shared.held = staged
            else:
                placement = table_placement(state.table, self._num_experts, self._config.max_ranks)
                shared.held = dataclasses.replace(shared.held, placement=placement)
            if not state.last:
                lost = f"lost ranks {list(state.evicted)}" if state.evicted else "all members are back"
                _log.warning("elastic: epoch %d on rank %d: %s (%s)", state.epoch, self._rank, lost, shared.problem)
            shared.staged, shared.promise, shared.problem = None, None, ""
            shared.boundary, self._operations = 0, self._endpoint.num_operations
            shared.applied, shared.members = state.epoch, state.members
            shared.recovery_began = 0.0
            self._log.newcomer = False
            shared.cond.notify_all()
        self._timeouts = {r: self._endpoint.health(r)["timeouts"] for r in state.members}
        blocked_s = 0.0 if joined else time.monotonic() - began
        switch = Switch(state.epoch, state.members, blocked_s, state.evicted, state.last)
        self.history.append(switch)
        del self.history[:-_HISTORY]
        for callback in self.on_commit:
            callback(switch)

    def _leave(self) -> None:
        """This rank is out: alone, as before it joined; it may join again."""
        shared = self._shared
        self._links.keep(())
        self._endpoint.activate(0, [self._rank])
        shared.applied, shared.members, shared.warm, shared.recovery_began = 0, (), False, 0.0
        shared.staged, shared.promise, shared.problem = None, None, ""
        self._log.newcomer = True


def check_joining(log: Log, rank: int, since: float, timeout_s: float) -> None:
    """
    Raises:
      TimeoutError: this rank has waited from `since` (time.monotonic()) on to be taken in, for too long.
    """
    change = log.state.change
    if time.monotonic() - since <= timeout_s or (change and rank in change.members):
        return  # a change has its own deadline
    if rank in log.state.members:
        why = "; the group still counts on another process of this rank"
    else:
        why = f" (the last failed: {log.state.aborted[1]})" if log.state.aborted[1] else ""
    raise TimeoutError(
        f"join: rank {rank} must be named by a prepare() that is committed, within {timeout_s:g} s; got "
        f"none{why}; call group.prepare on a member"
    )
