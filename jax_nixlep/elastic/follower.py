"""The thread of a rank that follows the log: it renews the lease, holds, and has changes prepared and lost experts
restored."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_nixlep import _ffi
from jax_nixlep.elastic.boundary import Boundary
from jax_nixlep.elastic.links import Links
from jax_nixlep.elastic.log import PREFIX, Log
from jax_nixlep.elastic.preparation import CHANGES, Preparation
from jax_nixlep.elastic.protocol import Running, State, running, waits_for
from jax_nixlep.elastic.state import LEASE_S, Change, ElasticError, Shared
from jax_nixlep.store import Store, StoreError

_log = logging.getLogger(__name__)
_LEASES = PREFIX + "lease/"
_LOOKAHEAD = 2  # boundaries between the promise to hold and the hold, so that the step is known before it comes
_HEALS = 3  # failed attempts to restore lost experts before the group goes on without them


def leases(store: Store) -> dict[int, dict[str, Any]]:
    """Of the ranks that are there: what they tell about themselves."""
    return {int(key[len(_LEASES) : -1]): json.loads(value) for key, value in store.scan(_LEASES).items()}


class Follower:
    """See the top of this file."""

    def __init__(
        self,
        shared: Shared,
        log: Log,
        store: Store,
        endpoint: _ffi.Endpoint,
        links: Links,
        boundary: Boundary,
        rank: int,
        *,
        preparation: Callable[[State, Running], Preparation],
        rebalance: Callable[[], Change],
        commit: Callable[[Change], None],
    ):
        self._shared, self._log, self._store, self._endpoint = shared, log, store, endpoint
        self._links, self._boundary, self._rank = links, boundary, rank
        self._preparation, self._rebalance, self._commit = preparation, rebalance, commit
        self.on_prepare: list[Callable[[Change], None]] = []
        self._seen: tuple[str, float] = ("", 0.0)  # the running change, and when it was first seen
        self._looked = 0.0
        self._lapsed: set[int] = set()  # whom a change needs, without a lease when last looked
        self._missed: dict[int, float] = {}  # members without a lease, and since when, while lost experts come back
        self._lease_due = 0.0
        self._prepared = ""
        self._preparing: Preparation | None = None
        self._tidied: tuple[int, str] | None = None
        self._failed_heals: tuple[int, int] = (0, 0)  # epoch, how many
        self._worker: threading.Thread | None = None
        self._healer: threading.Thread | None = None
        self._thread = threading.Thread(target=self._follow, name="nixlep-elastic", daemon=True)

    def start(self) -> None:
        """The first lease is there when it returns. Idempotent."""
        self._renew()
        if not self._thread.is_alive():
            self._thread.start()

    def join(self) -> None:
        """Waits for the threads to end, after `shared.closing`."""
        for thread in (self._thread, self._worker, self._healer):
            if thread is not None and thread.is_alive():
                thread.join(10)

    def end_lease(self) -> None:
        self._store.delete(f"{_LEASES}{self._rank}/")

    def _renew(self) -> None:
        self._lease_due = time.monotonic() + LEASE_S / 3
        with self._shared.cond:
            lease = {"nonce": self._endpoint.address()["nonce"], "load": [int(n) for n in self._shared.load]}
        self._store.put(f"{_LEASES}{self._rank}/", json.dumps(lease).encode(), ttl_s=LEASE_S)

    def _follow(self) -> None:
        try:
            state = self._log.state
            while not self._shared.closing.is_set():
                try:
                    self._log.wait(state, 0.2 if state.change or state.recovery else LEASE_S / 6)
                    self._log.pull()
                    state = self._log.state
                    if time.monotonic() > self._lease_due and not self._shared.closing.is_set():
                        self._renew()
                    self._react(state)
                except StoreError as error:
                    _log.debug("elastic: the store is away: %s", error)
                    self._shared.closing.wait(0.2)
                self._shared.notify()
        except BaseException as error:  # nobody would do the work of this thread; `step` says so
            self._shared.failure = error
            self._shared.notify()

    def _react(self, state: State) -> None:
        me, change, shared = self._rank, state.change, self._shared
        with shared.cond:
            if state.recovery and me in state.members and shared.applied == state.epoch:
                shared.recovery_began = shared.recovery_began or time.monotonic()
                if shared.applied:  # before the first epoch programs run by themselves
                    self._endpoint.interrupt()
            if (change.id if change else "") != self._seen[0]:
                self._seen, self._lapsed = (change.id, time.monotonic()) if change else ("", 0.0), set()
                staged = shared.staged
                if staged and staged.change not in (change.id if change else "", state.last):
                    if not shared.applied:
                        shared.held = staged  # a joiner goes on warming up with what it got
                    shared.staged = None
                shared.cond.notify_all()
        idle = self._worker is None or not self._worker.is_alive()
        if change is None and idle:
            with shared.cond:  # forgets ranks that were connected for a change that did not happen
                members, serves = shared.members, shared.applied and shared.applied == state.epoch
                if settled := serves or (me not in state.members and not shared.applied):
                    self._links.keep(members)
            if settled:
                self._links.tidy(members)
        with shared.cond:
            late = me not in state.members and shared.applied  # the thread that steps has yet to find itself out
        if late or self._boundary.stranger(state):
            return
        if change and me in {*state.members, *change.members}:
            if reason := self._hopeless(change, state):
                event = {"kind": "abort", "change": change.id, "reason": reason}
                self._log.append(lambda s: event if running(s, change.id, "prepare", "commit") else None)
            elif change.phase == "prepare" and self._prepared != change.id and idle:
                self._prepared = change.id
                self._preparing = self._preparation(state, change)
                arguments = (self._preparing, state, change)
                self._worker = threading.Thread(target=self._prepare, args=arguments, name="nixlep-move", daemon=True)
                self._worker.start()
            elif change.phase == "commit" and me in state.members and me not in dict(change.holds):
                self._hold(state, change)
        if not state.recovery and me in state.members and shared.applied == state.epoch:
            if change is None and self._boundary.healing(state):
                self._miss(state)
            else:
                self._missed = {}
            if change is None and me == min(state.members):
                self._lead(state)

    def _hopeless(self, change: Running, state: State) -> str:
        """Why the change will not happen, if that is known."""
        if change.phase == "switch":
            return ""  # the boundary's
        late, now = waits_for(state), time.monotonic()
        if now - self._seen[1] > change.deadline_s:
            return f"ranks {late} did not finish phase {change.phase!r} within the deadline"
        connected = self._prepared == change.id and self._preparing is not None and self._preparing.connected
        needed = {*late, *(set(change.members) - set(state.members))}  # newcomers to the end: no step misses them yet
        gone = [r for r in sorted(needed) if connected and not self._links.alive(r)]
        if not gone and now - self._looked > LEASE_S / 3:
            self._looked = now
            prefix = f"{CHANGES}{change.id}/hello/"  # who has not said so yet may still be starting
            nonces = {r: lease["nonce"] for r, lease in leases(self._store).items()}
            began = {int(key[len(prefix) :]): json.loads(value) for key, value in self._store.scan(prefix).items()}
            here = {r for r in nonces if r not in began or began[r]["address"]["nonce"] == nonces[r]}
            lapsed = (needed & {*began, *state.members}) - here
            gone = sorted(lapsed & self._lapsed)  # at two looks: a busy machine may keep a rank from renewing in time
            self._lapsed = lapsed
        return f"ranks {gone} are gone" if gone else ""

    def _miss(self, state: State) -> None:
        """Suspects members that are gone while all wait for lost experts: no operation misses them."""
        now = time.monotonic()
        if now - self._looked < LEASE_S / 3:
            return
        self._looked = now
        here = leases(self._store)
        self._missed = {r: self._missed.get(r, now) for r in state.members if r not in here}
        # A store that was started again has no leases at first: each is put again in time.
        gone = [r for r, since in self._missed.items() if now - since > LEASE_S or not self._links.alive(r)]
        if gone and self._rank in here:
            event = {"kind": "suspect", "epoch": state.epoch, "rank": self._rank, "ranks": gone}
            self._log.append(lambda s: event if s.epoch == state.epoch and not s.recovery else None)

    def _prepare(self, preparation: Preparation, state: State, change: Running) -> None:
        me, shared = self._rank, self._shared
        try:
            staged = preparation.run()
            handle = Change(change.id, change.members, np.array(change.table, np.int32), preparation.deadline)
            for callback in self.on_prepare:
                callback(handle)
            with shared.cond:
                if running(self._log.state, change.id, "prepare"):
                    shared.staged = staged
                shared.cond.notify_all()
            if me in state.members or shared.warm:
                event = {"kind": "ready", "change": change.id, "rank": me}
                self._log.append(lambda s: event if running(s, change.id, "prepare") else None)
        except Exception as error:  # whatever went wrong here, the others must not wait for it
            _log.debug("elastic: preparing failed", exc_info=True)
            reason = f"rank {me}: {type(error).__name__}: {error}"
            abort = {"kind": "abort", "change": change.id, "reason": reason}
            with contextlib.suppress(StoreError):  # the deadline ends it
                self._log.append(lambda s: abort if running(s, change.id, "prepare") else None)

    def _hold(self, state: State, change: Running) -> None:
        shared = self._shared
        with shared.cond:
            if shared.applied != state.epoch:
                return
            if shared.promise is None or shared.promise[0] != change.id:
                shared.promise = (change.id, shared.boundary + (0 if shared.at_boundary else _LOOKAHEAD))
            boundary = shared.promise[1]
        event = {"kind": "hold", "change": change.id, "rank": self._rank, "step": boundary}
        self._log.append(lambda s: event if running(s, change.id, "commit") else None)

    # --- What the lowest member does for all. ---

    def _lead(self, state: State) -> None:
        if self._tidied != (state.epoch, state.aborted[0]):
            self._tidied = (state.epoch, state.aborted[0])
            over = {key[len(CHANGES) :].split("/")[0] for key in self._store.scan(CHANGES)}
            self._log.pull()  # what was written for a change that begins now is not in `over`, or it is running
            change = self._log.state.change
            for name in over - ({change.id} if change else set()):
                self._store.delete(f"{CHANGES}{name}/")
            self._log.trim()
        if self._boundary.healing(state) and (self._healer is None or not self._healer.is_alive()):
            self._healer = threading.Thread(target=self._heal, args=(state.epoch,), name="nixlep-heal", daemon=True)
            self._healer.start()

    def _heal(self, epoch: int) -> None:
        try:
            try:
                change = self._rebalance()
            except (ElasticError, StoreError):
                self._shared.closing.wait(0.2)  # another change runs, or the store is away
                return
            self._commit(change)
        except Exception as error:  # whatever it is: all wait for the experts, or for the last attempt
            failed = self._failed_heals[1] + 1 if self._failed_heals[0] == epoch else 1
            self._failed_heals = (epoch, failed)
            _log.warning("elastic: lost experts are not restored (attempt %d of %d): %s", failed, _HEALS, error)
            if failed >= _HEALS:
                with contextlib.suppress(StoreError):
                    self._log.append(lambda s: {"kind": "forgo", "epoch": epoch} if s.epoch == epoch else None)
