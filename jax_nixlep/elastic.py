"""A rank of an elastic group: it carries out what the log says. `protocol` states the protocol and why it is safe.

Threads: the program's own, which calls `step` between operations and is the only one to arrive, activate an epoch and
swap weights; one that follows the log, renews this rank's lease and holds; and, while a change is prepared, one that
connects and moves weights.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_nixlep import _ffi, _nixl
from jax_nixlep._log import PREFIX, Log
from jax_nixlep.config import EpConfig
from jax_nixlep.placement import Placement, identity_table, plan_table, table_placement
from jax_nixlep.protocol import Running, State, first_state, unready
from jax_nixlep.store import Store, StoreError, connect
from jax_nixlep.weights import Pace, Spec, Tree, WeightSet, check_spec, copy_bytes, flatten, spec_of

Restore = Callable[[list[int]], Tree]

_log = logging.getLogger(__name__)
_POLL_S = 0.004  # of a thread that waits for others at a boundary
_LOOKAHEAD = 2  # boundaries between the promise to hold and the hold, so that the step is known before it comes
_SUSPECT_GRACE_S = 0.15  # for a rank that somebody waited for in vain; it was told at once to stop
_LEASE_S = 3.0
_STORE_TIMEOUT_S = 5.0


class ElasticError(RuntimeError):
    """A change of the group did not happen; the old members go on. Says why."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A change that was begun; see `EpGroup.prepare`.

    Attributes:
      members: ranks that take part after it.
      table: [max_ranks * experts_per_rank] int32, the logical expert of each physical slot after it.
      deadline: time.monotonic() by which it must have happened.
    """

    id: str
    members: tuple[int, ...]
    table: np.ndarray
    deadline: float


@dataclasses.dataclass(frozen=True)
class Switch:
    """One change of epoch, as this rank saw it.

    Attributes:
      blocked_s: between the end of the last step of the old epoch and permission for the first of the new.
      lost: ranks that were evicted, if it was a loss.
      change: id of the change, "" for a loss.
    """

    epoch: int
    members: tuple[int, ...]
    blocked_s: float
    lost: tuple[int, ...]
    change: str


@dataclasses.dataclass
class _Held:
    """Weights and table in use, or ready to be used."""

    change: str
    experts: WeightSet | None = None
    dense: WeightSet | None = None
    expert_arrays: dict[str, Any] | None = None
    dense_arrays: dict[str, Any] | None = None
    placement: Placement | None = None


class Elastic:
    """See the top of this file. `EpGroup` shows to users what is public here."""

    def __init__(
        self,
        url: str,
        endpoint: _ffi.Endpoint,
        config: EpConfig,
        rank: int,
        num_experts: int,
        *,
        secret: str | None,
        timeout_s: float,
        join_timeout_s: float,
        restore: Restore | None,
        bytes_per_s: float | None,
    ):
        self._url, self._secret = url, secret
        self._endpoint, self._config, self._rank = endpoint, config, rank
        self._num_experts, self._timeout_s, self._join_timeout_s = num_experts, timeout_s, join_timeout_s
        self._restore, self._bytes_per_s = restore, bytes_per_s
        self._store: Store = None  # type: ignore[assignment]  # until `connect`
        self._cond = threading.Condition()  # guards what follows
        self._applied = 0  # epoch of the endpoint; 0: not a member yet
        self._members: tuple[int, ...] = ()
        self._boundary, self._operations = 0, 0
        self._at_boundary = False
        self._warm = False  # a joiner has called `step`
        self._set_up = threading.Event()  # `load` was called, or evidently will not be
        self._promise: tuple[str, int] | None = None  # change, and the boundary not to pass before its step is known
        self._problem = ""
        self._seen: tuple[str, float] = ("", 0.0)  # the running change, and when it was first seen
        self._recovery_began = 0.0
        self._held = _Held("")
        self._staged: _Held | None = None
        self._load = np.zeros(num_experts, np.int64)
        # Only for the thread that calls `step`:
        self._serving = 0
        self._timeouts: dict[int, int] = {}
        self.history: list[Switch] = []
        self.on_prepare: list[Callable[[Change], None]] = []
        self.on_commit: list[Callable[[Switch], None]] = []
        # Only for the thread that follows the log:
        self._worker: threading.Thread | None = None
        self._worked = ""
        self._tidied = 0
        self._lease_due = 0.0
        self._healer: threading.Thread | None = None

        self._connected: dict[int, int] = {}  # nonces of connected peers; under _cond
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="nixlep-elastic", daemon=True)

    # --- Start and end. ---

    def connect(self) -> None:
        """Before anything else. Calls to the store are short: one that is away must not keep a rank from serving."""
        self._store = connect(self._url, secret=self._secret, timeout_s=_STORE_TIMEOUT_S)
        self._log = Log(self._store)

    def create(self, members: Sequence[int]) -> None:
        """Starts the log as the lowest of the first members; before the others `open`."""
        per_rank = self._config.experts_per_rank
        table = identity_table(self._num_experts, members, per_rank, self._config.max_ranks)
        self._log.create(first_state(members, tuple(map(int, table)), per_rank, self._join_timeout_s))

    def open(self, nonces: Mapping[int, int], timeout_s: float) -> None:
        """As a first member, connected to the others, whose regions have these `nonces`."""
        self._log.open(timeout_s)
        self._connected = dict(nonces)
        self._held.placement = table_placement(self._log.state.table, self._num_experts, self._config.max_ranks)
        self._renew()
        self._thread.start()

    def join(self) -> None:
        """As a newcomer: waits until a change names this rank and everything was received."""
        self._log.newcomer = True
        self._log.open(self._join_timeout_s)
        state = self._log.state
        if len(state.table) != self._config.num_slots or max(state.table) >= self._num_experts:
            raise ValueError(
                f"initialize: config and num_experts must equal the group's; got {self._config.num_slots} slots and "
                f"{self._num_experts} experts, the group has {len(state.table)} slots; start all with one config"
            )
        self._endpoint.activate(0, [self._rank])  # programs run, compile and warm up, each rank alone
        self._renew()
        if not self._thread.is_alive():
            self._thread.start()
        deadline = time.monotonic() + self._join_timeout_s
        with self._cond:
            while self._staged is None:
                self._check_joining(deadline)
                self._cond.wait(0.1)

    def _check_joining(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            why = self._log.state.aborted[1]
            raise TimeoutError(
                f"initialize: rank {self._rank} must be named by a prepare() that is committed, within "
                f"{self._join_timeout_s:g} s; got none{f' (the last failed: {why})' if why else ''}; "
                "call group.prepare on a member"
            )

    def close(self) -> None:
        """Leaves. Members that were not asked by a change are told, and go on without this rank."""
        if self._store is None:
            return
        try:
            if len(self._members) > 1:
                event = {"kind": "suspect", "epoch": self._applied, "rank": self._rank, "ranks": [self._rank]}
                self._append(lambda _: event)
            self._store.delete(f"{PREFIX}lease/{self._rank}/")
        except StoreError:
            pass  # the lease expires, and peers time out
        self._closing.set()
        self._store.close()  # ends the wait of the thread
        for thread in (self._thread, self._worker, self._healer):
            if thread is not None and thread.is_alive():
                thread.join(10)
        self._held, self._staged = _Held(""), None

    # --- Reading. ---

    @property
    def members(self) -> tuple[int, ...]:
        return self._members

    @property
    def epoch(self) -> int:
        return self._applied

    @property
    def boundary(self) -> int:
        """Steps completed in this epoch; equal on all members in the same step."""
        return self._boundary

    @property
    def _current(self) -> _Held:
        return self._held if self._applied or self._staged is None else self._staged

    @property
    def placement(self) -> Placement:
        placement = self._current.placement
        assert placement is not None
        return placement

    @property
    def experts(self) -> dict[str, Any]:
        return self._current.expert_arrays or {}

    @property
    def dense(self) -> dict[str, Any]:
        return self._current.dense_arrays or {}

    @property
    def table(self) -> np.ndarray:
        return np.array(self._log.state.table, np.int32)

    def lost_experts(self) -> list[int]:
        """Experts without a live replica."""
        return sorted(set(range(self._num_experts)) - set(self._log.state.table))

    def observe(self, load: Any) -> None:
        """Adds to the load that `prepare` balances: [L] tokens of this rank that chose each expert."""
        with self._cond:
            self._load += np.asarray(load, np.int64)

    def load(self, experts: Tree, dense: Tree) -> None:
        """Takes over the weights that this rank serves with."""
        held = _Held(self._held.change, placement=self._held.placement)
        for name, tree in (("experts", experts), ("dense", dense)):
            flat = flatten(tree)
            if name == "experts":
                for path, value in flat.items():
                    if not value.ndim or value.shape[0] != self._config.experts_per_rank:
                        raise ValueError(
                            f"load: experts must have experts_per_rank = {self._config.experts_per_rank} rows in front;"
                            f" got {list(value.shape)} for {path}; stack one expert per slot"
                        )
            kept = WeightSet(spec_of(flat))
            for path, value in flat.items():
                np.copyto(kept.views[path], np.asarray(value))
            setattr(held, name, kept)
        held.expert_arrays, held.dense_arrays = held.experts.arrays(), held.dense.arrays()  # type: ignore[union-attr]
        with self._cond:
            self._held = held
        self._set_up.set()

    # --- What a caller asks for. ---

    def prepare(
        self,
        members: Iterable[int] | None,
        *,
        table: Sequence[int] | np.ndarray | None = None,
        deadline_s: float,
        **plan: Any,
    ) -> Change:
        state = self._log.append(lambda _: None)  # the newest
        wanted = tuple(sorted({int(r) for r in (state.members if members is None else members)}))
        bad = [r for r in wanted if not 0 <= r < self._config.max_ranks]
        if bad or not wanted:
            raise ValueError(
                f"prepare: members must be ranks in [0, {self._config.max_ranks}), at least one; got {wanted}; "
                "raise EpConfig.max_ranks"
            )
        if table is None:
            load = sum((np.asarray(lease["load"]) for lease in self._leases().values()), np.zeros(self._num_experts))
            table = plan_table(wanted, self._config.experts_per_rank, np.array(state.table), load, **plan)
        rows = tuple(int(e) for e in table)
        self._check_table(wanted, rows)
        name = secrets.token_hex(6)
        began = time.monotonic()

        def begin(state: State) -> dict[str, Any] | None:
            if state.change or state.recovery:
                return None
            event = {"kind": "begin", "change": name, "epoch": state.epoch, "rank": self._rank}
            return event | {"members": wanted, "table": rows, "deadline_s": deadline_s}

        state = self._append(begin)
        change = state.change
        if change is None or (change.id != name and change.members != wanted):
            running = f"to ranks {list(change.members)} by rank {change.by}" if change else "after the loss of a member"
            raise ElasticError(
                f"prepare: one change may run at a time; got a second while one {running} runs; wait for it"
            )
        return Change(change.id, change.members, np.array(change.table, np.int32), began + deadline_s)

    def _check_table(self, members: tuple[int, ...], table: tuple[int, ...]) -> None:
        per_rank, served = self._config.experts_per_rank, {e for e in table if e >= 0}
        stray = [slot for slot, e in enumerate(table) if e >= 0 and slot // per_rank not in members]
        if len(table) != self._config.num_slots or stray or not served <= set(range(self._num_experts)):
            raise ValueError(
                f"prepare: table must have {self._config.num_slots} slots with experts below {self._num_experts}, on "
                f"members only; got {len(table)} slots, strays {stray[:4]}; use -1 for empty slots"
            )

    def commit(self, change: Change) -> None:
        self._set_up.set()
        self._until(change, lambda state: not unready(state), "become ready")
        self._append(lambda s: self._for(s, change.id, "prepare") and {"kind": "commit", "change": change.id})
        if threading.get_ident() != self._serving:
            self._until(change, lambda state: False, "switch")
            return
        with self._cond:
            self._at_boundary = True
        try:
            self._until(change, lambda state: state.change.phase == "switch", "agree on the step")  # type: ignore[union-attr]
        finally:
            self.step()  # goes through at once if the step is a later one

    def _until(self, change: Change, done: Callable[[State], bool], what: str) -> None:
        """Until the change is over (and then whether it happened) or `done`."""
        suspicious = time.monotonic() + 2 * _LEASE_S / 3
        while True:
            state = self._log.state
            if state.last == change.id:
                return
            if state.aborted[0] == change.id or state.change is None or state.change.id != change.id:
                why = state.aborted[1] if state.aborted[0] == change.id else "a member was lost meanwhile"
                raise ElasticError(f"resize: the change to ranks {list(change.members)} did not happen: {why}")
            if done(state):
                return
            now, waiting = time.monotonic(), self._waits_for(state)
            if now > change.deadline:
                self.abort(change, f"ranks {waiting} did not {what} within the deadline")
            elif now > suspicious:
                suspicious = now + _LEASE_S / 3
                leases = self._leases()
                if dead := [r for r in waiting if r not in leases and r in state.members]:
                    self.abort(change, f"ranks {dead} are gone")
            with self._cond:
                self._cond.wait(0.05)

    @staticmethod
    def _waits_for(state: State) -> list[int]:
        change = state.change
        assert change is not None
        if change.phase == "prepare":
            return sorted(unready(state))
        done = {rank for rank, _ in change.holds} if change.phase == "commit" else change.arrived
        return sorted(set(state.members) - done)

    def abort(self, change: Change, reason: str) -> None:
        event = {"kind": "abort", "change": change.id, "reason": reason}
        self._append(lambda s: self._for(s, change.id, "prepare", "commit", "switch") and event)

    @staticmethod
    def _for(state: State, change: str, *phases: str) -> Any:
        running = state.change
        return (running is not None and running.id == change and running.phase in phases) or None

    def _append(self, make: Callable[[State], dict[str, Any] | None]) -> State:
        state = self._log.append(make)
        with self._cond:
            self._cond.notify_all()
        return state

    # --- The boundary between two steps. ---

    def step(self) -> bool:
        """See `EpGroup.step`."""
        began, todo = time.monotonic(), ""
        self._set_up.set()
        self._serving = threading.get_ident()
        if self._applied:
            self._look_back()
        while True:
            try:
                todo, state = self._next()
                if todo in ("go", "out"):
                    return todo == "go"
                if todo == "apply":
                    self._apply(state, began)
                elif todo == "wait":
                    self._wait(state, began)
                else:
                    self._append(lambda s, todo=todo: self._event(s, todo))  # type: ignore[misc]
            except StoreError:
                # A rank that only holds goes on: nothing can have begun without its arrival. One that may have arrived,
                # or has lost a member, needs the store.
                if time.monotonic() - began > self._timeout_s:
                    if todo != "wait" or self._problem or self._arrived(self._log.state):
                        raise
                    with self._cond:
                        self._promise = None

    def ok(self) -> bool:
        """Whether every operation since the last `step` had all members."""
        return not self._endpoint.failure() and not any(self._endpoint.health(r)["masked"] for r in self._members)

    def _look_back(self) -> None:
        """Judges what ran since the last boundary."""
        self._endpoint.drain()
        problem = self._endpoint.failure()
        if not problem and any(self._endpoint.health(r)["masked"] for r in self._members):
            problem = "a member was late"
        with self._cond:
            operations = self._endpoint.num_operations
            if problem:
                self._problem = problem
            elif operations != self._operations:
                self._boundary += 1
            self._operations = operations
            self._at_boundary = True

    def _next(self) -> tuple[str, State]:
        """What this rank has to do at its boundary in view of the log."""
        with self._cond:
            state, me = self._log.state, self._rank
            self._warm = self._at_boundary = True
            if state.epoch != self._applied:
                if me in state.members:
                    return "apply", state
                if self._applied:
                    self._leave(state)
                    return "out", state
            if me not in state.members:
                return "ready" if self._staged and self._for(state, self._staged.change, "prepare") else "wait", state
            if self._problem and state.recovery is None:
                return "suspect", state
            if state.recovery:
                return "wait" if self._arrived(state) else "arrive", state
            change = state.change
            if change and change.phase == "switch" and self._boundary >= change.step:
                return "wait" if self._arrived(state) else "arrive", state
            promise = self._promise if change and change.phase == "commit" else None
            if change and promise and promise[0] == change.id and self._boundary >= promise[1]:
                return "wait", state
            if self._healing(state):
                return "wait", state
            self._at_boundary = False
            return "go", state

    def _arrived(self, state: State) -> bool:
        where = state.recovery or state.change
        return where is not None and self._rank in where.arrived

    def _healing(self, state: State) -> bool:
        """Lost experts are about to come back: results would be wrong until then."""
        room = len(state.members) * state.per_rank >= self._num_experts
        return self._restore is not None and room and self._held.experts is not None and bool(self.lost_experts())

    def _event(self, state: State, todo: str) -> dict[str, Any] | None:
        me = self._rank
        if todo == "ready":
            staged = self._staged
            if staged is None or me in state.members or not self._for(state, staged.change, "prepare"):
                return None
            return None if me in state.change.ready else {"kind": "ready", "change": staged.change, "rank": me}  # type: ignore[union-attr]
        if me not in state.members or state.epoch != self._applied:
            return None
        if todo == "suspect":
            return {"kind": "suspect", "epoch": state.epoch, "rank": me, "ranks": self._suspects()}
        change = state.change.id if state.change else ""
        return {"kind": "arrive", "epoch": state.epoch, "rank": me, "change": change}

    def _suspects(self) -> list[int]:
        others = [r for r in self._members if r != self._rank]
        health = {r: self._endpoint.health(r) for r in others}
        late = [r for r in others if health[r]["masked"] or health[r]["timeouts"] > self._timeouts.get(r, 0)]
        return sorted({*late, *(r for r in others if not self._endpoint.peer_alive(r))})

    def _wait(self, state: State, since: float) -> None:
        """Others have to do something: waits a little, and sees to those that do not."""
        with self._cond:
            if self._log.state is state:
                self._cond.wait(_POLL_S)
        now = time.monotonic()
        if self._rank not in state.members:
            self._check_joining(since + self._join_timeout_s)
            return
        if now - since > 1:
            self._log.pull()  # finds out whether the store is there
        recovery, change = state.recovery, state.change
        if recovery is not None:
            self._endpoint.interrupt()
            missing = [r for r in state.members if r not in recovery.arrived]
            waited = now - (self._recovery_began or now)
            out = [
                r
                for r in missing
                if not self._endpoint.peer_alive(r)
                or waited > (_SUSPECT_GRACE_S if r in recovery.suspects else self._timeout_s)
            ]
            if out:
                event = {"kind": "evict", "epoch": state.epoch, "rank": self._rank, "ranks": out}
                self._append(lambda s: event if s.epoch == state.epoch and s.recovery else None)
        elif (
            change
            and change.phase == "switch"
            and now - since > (self._timeout_s if state.epoch else change.deadline_s)
        ):
            missing = [r for r in state.members if r not in change.arrived]
            event = {"kind": "suspect", "epoch": state.epoch, "rank": self._rank, "ranks": missing}
            self._append(lambda s: event if self._for(s, change.id, "switch") else None)
        elif change and any(not self._endpoint.peer_alive(r) for r in state.members if r in self._connected):
            event = {"kind": "suspect", "epoch": state.epoch, "rank": self._rank, "ranks": self._suspects()}
            self._append(lambda s: event if s.epoch == state.epoch and not s.recovery else None)

    def _apply(self, state: State, began: float) -> None:
        """Starts an epoch on this rank. No operation runs."""
        with self._cond:
            for peer in [r for r in self._connected if r not in state.members]:
                self._endpoint.drop_peer(peer)
                del self._connected[peer]
            self._endpoint.activate(state.epoch, list(state.members))
            staged = self._staged
            if staged and staged.change == state.last:
                if self._held.experts and self._held.experts is not staged.experts:
                    self._held.experts.retire()
                self._held = staged
            else:
                placement = table_placement(state.table, self._num_experts, self._config.max_ranks)
                self._held = dataclasses.replace(self._held, placement=placement)
            if not state.last and state.epoch > 1:
                lost = f"lost ranks {list(state.evicted)}" if state.evicted else "all members are back"
                _log.warning("elastic: epoch %d on rank %d: %s (%s)", state.epoch, self._rank, lost, self._problem)
            self._staged, self._promise, self._problem = None, None, ""
            self._boundary, self._operations = 0, self._endpoint.num_operations
            self._applied, self._members = state.epoch, state.members
            self._log.newcomer = False
            self._recovery_began = 0.0
        self._timeouts = {r: self._endpoint.health(r)["timeouts"] for r in state.members}
        switch = Switch(state.epoch, state.members, time.monotonic() - began, state.evicted, state.last)
        self.history.append(switch)
        for callback in self.on_commit:
            callback(switch)

    def _leave(self, state: State) -> None:
        """This rank is out: alone, as before it joined; it may join again."""
        for peer in self._connected:
            self._endpoint.drop_peer(peer)
        self._connected = {}
        self._endpoint.activate(0, [self._rank])
        self._applied, self._members, self._warm = 0, (), False
        self._staged, self._promise, self._problem = None, None, ""

    # --- Following the log. ---

    def _follow(self) -> None:
        while not self._closing.is_set():
            try:
                self._log.wait(0.2 if self._log.state.change or self._log.state.recovery else _LEASE_S / 6)
                self._log.pull()
                if time.monotonic() > self._lease_due:
                    self._renew()
                self._react(self._log.state)
            except StoreError as error:
                _log.debug("elastic: the store is away: %s", error)
                self._closing.wait(0.2)
            with self._cond:
                self._cond.notify_all()

    def _react(self, state: State) -> None:
        me, change = self._rank, state.change
        with self._cond:
            if state.recovery and me in state.members and self._applied == state.epoch:
                self._recovery_began = self._recovery_began or time.monotonic()
                self._endpoint.interrupt()
            if change is None or change.id != self._seen[0]:
                self._seen = (change.id, time.monotonic()) if change else ("", 0.0)
                if (
                    self._staged
                    and not (change and change.id == self._staged.change)
                    and state.last != self._staged.change
                ):
                    self._staged = None
            overdue = change is not None and time.monotonic() - self._seen[1] > change.deadline_s
            self._cond.notify_all()
        idle = self._worker is None or not self._worker.is_alive()
        if change is None and idle:
            self._drop_strangers(state)
        if change and me in {*state.members, *change.members}:
            if overdue and change.phase != "switch":
                reason = f"ranks {self._waits_for(state)} did not finish phase {change.phase!r} within the deadline"
                event = {"kind": "abort", "change": change.id, "reason": reason}
                self._append(lambda s: self._for(s, change.id, "prepare", "commit") and event)
            elif change.phase == "prepare" and self._worked != change.id and idle:
                self._worked = change.id
                self._worker = threading.Thread(
                    target=self._work, args=(state, change), name="nixlep-move", daemon=True
                )
                self._worker.start()
            elif change.phase == "commit" and me in state.members and me not in dict(change.holds):
                self._hold(state, change)
        if change is None and not state.recovery and me == min(state.members):
            if self._tidied != state.epoch:
                self._tidied = state.epoch
                self._store.delete(f"{PREFIX}change/")
                self._log.trim()
            if self._healing(state) and (self._healer is None or not self._healer.is_alive()):
                self._healer = threading.Thread(target=self._heal, name="nixlep-heal", daemon=True)
                self._healer.start()

    def _hold(self, state: State, change: Running) -> None:
        with self._cond:
            if self._applied != state.epoch:
                return  # this rank has still to begin the epoch; asked again soon
            if self._promise is None or self._promise[0] != change.id:
                ahead = 0 if self._at_boundary else _LOOKAHEAD
                self._promise = (change.id, self._boundary + ahead)
            boundary = self._promise[1]
        event = {"kind": "hold", "change": change.id, "rank": self._rank, "step": boundary}
        self._append(lambda s: self._for(s, change.id, "commit") and event)

    def _drop_strangers(self, state: State) -> None:
        """Forgets ranks that were connected for a change that did not happen."""
        with self._cond:
            if self._applied == (state.epoch if self._rank in state.members else 0):
                for peer in [r for r in self._connected if r not in self._members]:
                    self._endpoint.drop_peer(peer)
                    del self._connected[peer]

    def _heal(self) -> None:
        try:
            change = self.prepare(None, deadline_s=60.0)
            self.commit(change)
        except (ElasticError, StoreError) as error:
            _log.warning("elastic: lost experts are not restored yet: %s", error)
            time.sleep(0.5)

    # --- Leases: who is there, and how to reach it. ---

    def _renew(self) -> None:
        self._lease_due = time.monotonic() + _LEASE_S / 3
        with self._cond:
            load = [int(n) for n in self._load]
        hello = {"address": self._endpoint.address(), "host": _host_id(), "load": load}
        self._store.put(f"{PREFIX}lease/{self._rank}/", json.dumps(hello).encode(), ttl_s=_LEASE_S)

    def _leases(self) -> dict[int, dict[str, Any]]:
        prefix = f"{PREFIX}lease/"
        return {int(k[len(prefix) : -1]): json.loads(v) for k, v in self._store.scan(prefix).items()}

    # --- Preparing a change on this rank. ---

    def _work(self, state: State, change: Running) -> None:
        deadline = time.monotonic() + change.deadline_s
        try:
            hellos = self._meet(state, change, deadline)
            if self._rank in change.members:
                self._connect(change, hellos, deadline)
            staged = self._move(state, change, hellos, deadline)
            handle = Change(change.id, change.members, np.array(change.table, np.int32), deadline)
            for callback in self.on_prepare:
                callback(handle)
            with self._cond:
                if self._for(self._log.state, change.id, "prepare"):
                    self._staged = staged
                self._cond.notify_all()
            if self._rank in state.members or self._warm:
                event = {"kind": "ready", "change": change.id, "rank": self._rank}
                self._append(lambda s: self._for(s, change.id, "prepare") and event)
        except Exception as error:  # whatever went wrong here, the others must not wait for it
            _log.debug("elastic: preparing failed", exc_info=True)
            event = {
                "kind": "abort",
                "change": change.id,
                "reason": f"rank {self._rank}: {type(error).__name__}: {error}",
            }
            with contextlib.suppress(StoreError):  # the deadline ends it
                self._append(lambda s: self._for(s, change.id, "prepare") and event)

    def _key(self, change: Running, what: str, rank: int) -> str:
        return f"{PREFIX}change/{change.id}/{what}/{rank}"

    def _exchange(self, change: Running, what: str, own: Any, peers: Iterable[int], deadline: float) -> dict[int, Any]:
        """Publishes `own` and returns what the `peers` published."""
        if own is not None:
            self._store.put(self._key(change, what, self._rank), json.dumps(own).encode())
        keys = {r: self._key(change, what, r) for r in peers}
        values = self._await(keys.values(), change, deadline)
        return {r: json.loads(values[key]) for r, key in keys.items()}

    def _await(self, keys: Iterable[str], change: Running, deadline: float) -> dict[str, bytes]:
        keys = list(keys)
        while True:
            try:
                return self._store.wait(keys, 0.25) if keys else {}
            except TimeoutError:
                if not self._for(self._log.state, change.id, "prepare") or self._closing.is_set():
                    raise ElasticError("aborted meanwhile") from None
                if time.monotonic() > deadline:
                    raise

    def _meet(self, state: State, change: Running, deadline: float) -> dict[int, dict[str, Any]]:
        """Waits until this rank has begun the epoch and all that take part have a lease."""
        with self._cond:
            while self._rank in state.members and self._applied != state.epoch:
                if time.monotonic() > deadline or self._closing.is_set():
                    raise ElasticError("this rank did not begin the epoch in time")
                self._cond.wait(0.05)
        ranks = {*state.members, *change.members}
        keys = {r: f"{PREFIX}lease/{r}/" for r in ranks}
        found = self._await(keys.values(), change, deadline)
        return {r: json.loads(found[key]) for r, key in keys.items()}

    def _connect(self, change: Running, hellos: dict[int, dict[str, Any]], deadline: float) -> None:
        """Connects to the members after the change, in shared memory where both sides can."""
        address = {r: hellos[r]["address"] for r in change.members if r != self._rank}
        with self._cond:
            new = [r for r in address if self._connected.get(r) != address[r]["nonce"]]
        share = os.environ.get("JAX_NIXLEP_P2P", "1") != "0"

        def reach(r: int) -> bool:
            where = int(address[r]["pid"]), int(address[r]["fd"]), int(address[r]["nonce"])
            return share and self._endpoint.map_peer(r, *where)

        mapped = [r for r in new if reach(r)]
        theirs = self._exchange(change, "mapped", mapped, new, deadline)
        far = [r for r in new if r not in mapped or self._rank not in theirs[r]]
        if far:
            name = f"jax_nixlep-{self._endpoint.address()['nonce']:x}-{self._rank}"
            blob = self._endpoint.open_nixl(str(_nixl.find_library()), name)
            agents = self._exchange(change, "agent", base64.b64encode(blob).decode(), far, deadline)
            for r in far:
                where = int(address[r]["base"]), int(address[r]["nonce"])
                self._endpoint.connect_nixl(r, base64.b64decode(agents[r]), *where)
        with self._cond:
            self._connected |= {r: int(address[r]["nonce"]) for r in new}

    def _move(self, state: State, change: Running, hellos: dict[int, dict[str, Any]], deadline: float) -> _Held:
        """The weights for the new table, read from members while they serve."""
        me, per_rank = self._rank, self._config.experts_per_rank
        nixl = os.environ.get("JAX_NIXLEP_P2P", "1") == "0" or len({hello["host"] for hello in hellos.values()}) > 1
        own: dict[str, Any] | None = None
        if me in state.members:
            if not self._set_up.wait(max(0.0, deadline - time.monotonic())):
                raise TimeoutError("load() was not called")
            held = self._held
            own = {"experts": None}
            if held.experts is not None and held.dense is not None:
                own = {"experts": held.experts.describe(nixl=nixl), "dense": held.dense.describe(nixl=nixl)}
                own |= {"spec": [held.experts.spec, held.dense.spec]}
        if me not in change.members:
            self._exchange(change, "weights", own, [], deadline)
            return _Held(change.id)
        sources = self._exchange(change, "weights", own, state.members, deadline)
        staged = _Held(change.id, placement=table_placement(change.table, self._num_experts, self._config.max_ranks))
        first = sources[state.members[me % len(state.members)]]
        if first["experts"] is None:
            return staged
        pace = Pace(self._bytes_per_s)
        before, after = (table[me * per_rank : (me + 1) * per_rank] for table in (state.table, change.table))
        spec, dense_spec = map(check_spec, first["spec"])
        if me in state.members:
            staged.dense, staged.dense_arrays = self._held.dense, self._held.dense_arrays
        else:
            staged.dense = WeightSet(dense_spec)
            copy = staged.dense.copier(first["dense"], deadline, pace)
            for name in dense_spec:
                copy(name, None, 0)
            staged.dense_arrays = staged.dense.arrays()
        if me in state.members and before == after:
            staged.experts, staged.expert_arrays = self._held.experts, self._held.expert_arrays
            return staged
        staged.experts = WeightSet(spec)
        self._fill(staged.experts, spec, state, after, sources, deadline, pace)
        staged.expert_arrays = staged.experts.arrays()
        return staged

    def _fill(
        self,
        target: WeightSet,
        spec: Spec,
        state: State,
        after: Sequence[int],
        sources: dict[int, Any],
        deadline: float,
        pace: Pace,
    ) -> None:
        """Each slot from this rank's own, from another's, or from the user's `restore`."""
        me, per_rank = self._rank, state.per_rank
        copiers: dict[int, Callable[[str, int | None, int], None]] = {}
        missing: list[int] = []
        for here, expert in enumerate(after):
            if expert < 0:
                continue
            slots = [slot for slot, e in enumerate(state.table) if e == expert]
            mine = [slot for slot in slots if slot // per_rank == me]
            if mine and self._held.experts is not None:
                for name, view in target.views.items():
                    old = mine[0] % per_rank
                    copy_bytes(view[here : here + 1], self._held.experts.views[name][old : old + 1], deadline, pace)
            elif slots:
                slot = slots[(here + me) % len(slots)]  # readers spread over the replicas
                rank = slot // per_rank
                if rank not in copiers:
                    copiers[rank] = target.copier(sources[rank]["experts"], deadline, pace)
                for name in spec:
                    copiers[rank](name, slot % per_rank, here)
            else:
                missing.append(here)
        if missing:
            if self._restore is None:
                raise ElasticError(f"experts {[after[h] for h in missing]} have no live replica; give restore=")
            restored = flatten(self._restore([int(after[h]) for h in missing]))
            for name, view in target.views.items():
                view[missing] = np.asarray(restored[name])


def _host_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{platform.node()}/{file.read().strip()}"


def run(elastic: Elastic, program: Callable[..., Any], *args: Any, repeats: int = 8) -> Any:
    """See `EpGroup.run`."""
    for attempt in range(repeats):
        if not elastic.step():
            raise ElasticError(
                "run: this rank must be a member; it has left the group or was evicted; see EpGroup.rejoin"
            )
        before = elastic.epoch
        try:
            result = jax.block_until_ready(program(*args))
        except (jax.errors.JaxRuntimeError, ValueError):
            if elastic.ok() or attempt + 1 == repeats:
                raise  # not the group's doing, or nothing helps
            continue
        if elastic.ok() and elastic.epoch == before:
            return result
    raise ElasticError(
        f"run: a step must complete within {repeats} attempts; got none; raise timeout_s if ranks are slow"
    )
