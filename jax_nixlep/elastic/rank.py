"""A rank of an elastic group: it carries out what the log says. `protocol` states the protocol and why it is safe.

Threads: the program's own, which calls `step` between operations and is the only one to arrive, activate an epoch and
swap weights (`boundary`); one that follows the log, renews this rank's lease and holds (`follower`); and, while a
change is prepared, one that connects and moves weights (`preparation`).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_nixlep import _ffi
from jax_nixlep.agreement import Described, check_alike
from jax_nixlep.config import EpConfig
from jax_nixlep.elastic.boundary import Boundary, check_joining, lost_experts
from jax_nixlep.elastic.follower import Follower, leases
from jax_nixlep.elastic.links import Links
from jax_nixlep.elastic.log import Log
from jax_nixlep.elastic.preparation import Preparation
from jax_nixlep.elastic.protocol import Running, State, first_state, running, unready, waits_for
from jax_nixlep.elastic.state import Change, ElasticError, Held, Restore, Shared, Switch
from jax_nixlep.elastic.weights import Tree, WeightSet, flatten, spec_of
from jax_nixlep.placement import Placement, check_table, identity_table, plan_table, table_placement
from jax_nixlep.store import StoreError, connect

_ATTEMPTS = 8  # at a step, each after the loss of a member
_STORE_TIMEOUT_S = 5.0  # short: a store that is away must not keep a rank from serving


class Elastic:
    """See the top of this file. `EpGroup` shows to users what is public here."""

    def __init__(
        self,
        url: str,
        endpoint: _ffi.Endpoint,
        config: EpConfig,
        rank: int,
        num_experts: int,
        about: Described,
        *,
        secret: str | None,
        timeout_s: float,
        join_timeout_s: float,
        restore: Restore | None,
        restore_timeout_s: float,
        bytes_per_s: float | None,
    ):
        """Connects to the store.

        Raises:
          StoreError: it is away or refuses the secret.
        """
        self._endpoint, self._config, self._rank = endpoint, config, rank
        self._num_experts, self._join_timeout_s, self._about = num_experts, join_timeout_s, about
        self._restore, self._bytes_per_s = restore, bytes_per_s
        self._store = connect(url, secret=secret, timeout_s=_STORE_TIMEOUT_S)
        self._shared = Shared(num_experts)
        self._log = Log(self._store, rank, self._shared.notify)
        self._links = Links(endpoint, rank)
        self._boundary = Boundary(
            self._shared,
            self._log,
            endpoint,
            self._links,
            config,
            rank,
            num_experts,
            timeout_s=timeout_s,
            join_timeout_s=join_timeout_s,
            restores=restore is not None,
        )
        self._follower = Follower(
            self._shared,
            self._log,
            self._store,
            endpoint,
            self._links,
            self._boundary,
            rank,
            preparation=self._preparation,
            rebalance=lambda: self.prepare(None, deadline_s=restore_timeout_s),
            commit=self.commit,
        )
        self._serving = 0  # the thread that steps

    def _preparation(self, state: State, change: Running) -> Preparation:
        return Preparation(
            state,
            change,
            shared=self._shared,
            log=self._log,
            store=self._store,
            endpoint=self._endpoint,
            links=self._links,
            config=self._config,
            rank=self._rank,
            num_experts=self._num_experts,
            restore=self._restore,
            bytes_per_s=self._bytes_per_s,
        )

    # --- Start and end. ---

    def create(self, members: Sequence[int]) -> None:
        """Starts the log as the lowest of the first members; before the others `open`."""
        per_rank = self._config.experts_per_rank
        table = identity_table(self._num_experts, members, per_rank, self._config.max_ranks)
        self._log.create(first_state(members, tuple(map(int, table)), per_rank, self._join_timeout_s), self._about)

    def open(self, nonces: Mapping[int, int], timeout_s: float) -> None:
        """As a first member, connected to the others, whose regions have these `nonces`."""
        self._log.open(timeout_s)
        self._links.adopt(nonces)
        placement = table_placement(self._log.state.table, self._num_experts, self._config.max_ranks)
        self._shared.held.placement = placement
        self._follower.start()

    def join(self) -> None:
        """As a newcomer: waits until a change names this rank and everything was received."""
        began, shared = time.monotonic(), self._shared
        self._log.newcomer = True
        self._log.open(self._join_timeout_s)
        check_alike(self._about, self._rank, self._log.about, "in the group")
        self._endpoint.activate(0, [self._rank])  # programs run, compile and warm up, each rank alone
        self._follower.start()
        with shared.cond:
            while shared.staged is None:
                shared.check("initialize")
                check_alike(self._about, self._rank, self._log.about, "in the group")  # another job may have come
                check_joining(self._log, self._rank, began, self._join_timeout_s)
                shared.cond.wait(0.1)

    def close(self) -> None:
        """Leaves. Members that were not asked by a change are told, and go on without this rank."""
        shared = self._shared
        shared.closing.set()
        try:
            if len(shared.members) > 1:
                me = self._rank
                event = {"kind": "suspect", "epoch": shared.applied, "rank": me, "ranks": [me]}
                self._log.append(lambda _: event)
            self._follower.end_lease()
        except StoreError:
            pass  # the lease expires, and peers time out
        self._store.close()  # ends the waits of the threads
        self._follower.join()
        shared.held, shared.staged = Held(""), None

    # --- Reading. ---

    @property
    def members(self) -> tuple[int, ...]:
        return self._shared.members

    @property
    def epoch(self) -> int:
        return self._shared.applied

    @property
    def boundary(self) -> int:
        """Steps completed in this epoch; equal on all members in the same step."""
        return self._shared.boundary

    @property
    def history(self) -> list[Switch]:
        """The newest epochs of this rank, the last at the end."""
        return self._boundary.history

    @property
    def on_commit(self) -> list[Callable[[Switch], None]]:
        """Called in `step` with each new epoch, on every member that takes part in it."""
        return self._boundary.on_commit

    @property
    def on_prepare(self) -> list[Callable[[Change], None]]:
        """Called in a thread of its own for each change this rank prepares, before it says that it is ready."""
        return self._follower.on_prepare

    @property
    def _current(self) -> Held:
        shared = self._shared
        return shared.held if shared.applied or shared.staged is None else shared.staged

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
    def phase(self) -> str:
        """What goes on in the group: "prepare", "commit" or "switch" of a change, "recovery", or ""."""
        state = self._log.state
        return "recovery" if state.recovery else state.change.phase if state.change else ""

    @property
    def table(self) -> np.ndarray:
        return np.array(self._log.state.table, np.int32)

    def lost_experts(self) -> list[int]:
        """Experts without a live replica."""
        return lost_experts(self._log.state, self._num_experts)

    def observe(self, load: Any) -> None:
        """Adds to the load that `prepare` balances: [L] tokens of this rank that chose each expert."""
        with self._shared.cond:
            self._shared.load += np.asarray(load, np.int64)

    def load(self, experts: Tree, dense: Tree) -> None:
        """Takes over the weights that this rank serves with."""
        held = Held(self._shared.held.change, placement=self._shared.held.placement)
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
        with self._shared.cond:
            self._shared.held = held
        self._shared.set_up.set()

    # --- What a caller asks for. ---

    def prepare(
        self,
        members: Iterable[int] | None,
        *,
        table: Sequence[int] | np.ndarray | None = None,
        deadline_s: float,
        **plan: Any,
    ) -> Change:
        asked = None if table is None else tuple(int(e) for e in table)
        state = self._log.append(lambda _: None)  # the newest
        wanted = tuple(sorted({int(r) for r in (state.members if members is None else members)}))
        bad = [r for r in wanted if not 0 <= r < self._config.max_ranks]
        if bad or not wanted:
            raise ValueError(
                f"prepare: members must be ranks in [0, {self._config.max_ranks}), at least one; got {wanted}; "
                "raise EpConfig.max_ranks"
            )
        if table is None:
            told = leases(self._store).items()
            loads = (np.asarray(lease["load"]) for rank, lease in told if rank in state.members)
            load = sum(loads, np.zeros(self._num_experts))
            table = plan_table(wanted, self._config.experts_per_rank, np.array(state.table), load, **plan)
        rows = tuple(int(e) for e in table)
        config = self._config
        check_table("prepare", rows, wanted, config.experts_per_rank, config.max_ranks, self._num_experts)
        name = secrets.token_hex(6)
        began = time.monotonic()

        def begin(state: State) -> dict[str, Any] | None:
            if state.change or state.recovery:
                return None
            event = {"kind": "begin", "change": name, "epoch": state.epoch, "rank": self._rank}
            return event | {"members": wanted, "table": rows, "deadline_s": deadline_s}

        state = self._log.append(begin)
        change = state.change
        same = change is not None and change.members == wanted and asked in (None, change.table)
        if change is None or (change.id != name and not same):
            running = f"to ranks {list(change.members)} by rank {change.by}" if change else "after the loss of a member"
            raise ElasticError(
                f"prepare: one change may run at a time; got a second while one {running} runs; wait for it"
            )
        return Change(change.id, change.members, np.array(change.table, np.int32), began + deadline_s)

    def commit(self, change: Change) -> None:
        shared = self._shared
        shared.set_up.set()
        self._until(change, lambda state: not unready(state), "become ready")
        event = {"kind": "commit", "change": change.id}
        self._log.append(lambda s: event if running(s, change.id, "prepare") else None)
        if threading.get_ident() != self._serving:
            self._until(change, lambda state: False, "switch")
            return
        with shared.cond:
            shared.at_boundary = True
        try:
            agreed = lambda state: running(state, change.id, "switch") is not None  # noqa: E731
            self._until(change, agreed, "agree on the step")
        finally:
            self.step()  # goes through at once if the step is a later one

    def _until(self, change: Change, done: Callable[[State], bool], what: str) -> None:
        """Until the change is over (and then whether it happened) or `done`."""
        while True:
            state = self._log.state
            if state.last == change.id:
                return
            if state.change is None or state.change.id != change.id:
                why = state.aborted[1] if state.aborted[0] == change.id else "a member, or the store, was lost"
                raise ElasticError(f"resize: the change to ranks {list(change.members)} did not happen: {why}")
            if done(state):
                return
            if self._shared.closing.is_set():
                raise ElasticError(f"resize: this rank left while the change to {list(change.members)} was running")
            if time.monotonic() > change.deadline:
                self.abort(change, f"ranks {waits_for(state)} did not {what} within the deadline")
            with self._shared.cond:
                self._shared.cond.wait(0.05)

    def abort(self, change: Change, reason: str) -> None:
        event = {"kind": "abort", "change": change.id, "reason": reason}
        self._log.append(lambda s: event if running(s, change.id, "prepare", "commit", "switch") else None)

    def step(self) -> bool:
        """See `EpGroup.step`."""
        self._shared.set_up.set()
        self._serving = threading.get_ident()
        return self._boundary.step()

    def ok(self) -> bool:
        """See `EpGroup.ok`."""
        return self._boundary.ok()


def run(elastic: Elastic, program: Callable[..., Any], *args: Any) -> Any:
    """See `EpGroup.run`."""
    for attempt in range(_ATTEMPTS):
        if not elastic.step():
            raise ElasticError(
                "run: this rank must be a member; it has left the group or was evicted; see EpGroup.rejoin"
            )
        before = elastic.epoch
        try:
            result = jax.block_until_ready(program(*args))
        except (jax.errors.JaxRuntimeError, ValueError):
            if elastic.ok() or attempt + 1 == _ATTEMPTS:
                raise  # not the group's doing, or nothing helps
            continue
        if elastic.ok() and elastic.epoch == before:
            return result
    raise ElasticError(
        f"run: a step must complete within {_ATTEMPTS} attempts; got none; raise timeout_s if ranks are slow"
    )
