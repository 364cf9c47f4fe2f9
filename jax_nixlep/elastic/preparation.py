"""What a rank does for a change before it happens: connects, and fills its new slots while all serve."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from jax_nixlep import _ffi
from jax_nixlep.config import EpConfig
from jax_nixlep.elastic.links import Links
from jax_nixlep.elastic.log import PREFIX, Log
from jax_nixlep.elastic.protocol import Running, State, running
from jax_nixlep.elastic.state import ElasticError, Held, Restore, Shared
from jax_nixlep.elastic.weights import Pace, Spec, WeightSet, check_spec, copy_bytes, flatten
from jax_nixlep.placement import table_placement
from jax_nixlep.store import Store, StoreError

CHANGES = PREFIX + "change/"  # <change id>/<what>/<rank>: what the ranks tell each other for a change


class Preparation:
    """Prepares one rank for one change."""

    def __init__(
        self,
        state: State,
        change: Running,
        *,
        shared: Shared,
        log: Log,
        store: Store,
        endpoint: _ffi.Endpoint,
        links: Links,
        config: EpConfig,
        rank: int,
        num_experts: int,
        restore: Restore | None,
        bytes_per_s: float | None,
    ):
        self._state, self._change = state, change
        self._shared, self._log, self._store = shared, log, store
        self._endpoint, self._links = endpoint, links
        self._config, self._rank, self._num_experts = config, rank, num_experts
        self._restore = restore
        self.deadline = time.monotonic() + change.deadline_s
        self._pace = Pace(bytes_per_s, self.deadline, self._given_up)
        self.connected = False  # to all that take part after the change

    def run(self) -> Held:
        """Collective: all members before and after the change run it. Returns what to serve with after the change.

        Raises:
          Exception: it cannot happen; says why.
        """
        hellos = self._meet()
        if self._rank in self._change.members:
            self._links.connect({r: hellos[r]["address"] for r in self._change.members}, self._exchange)
            self.connected = True
        return self._move(len({hello["host"] for hello in hellos.values()}))

    def _given_up(self) -> bool:
        return self._shared.closing.is_set() or not running(self._log.state, self._change.id, "prepare")

    # --- What ranks tell each other. ---

    def _key(self, what: str, rank: int) -> str:
        return f"{CHANGES}{self._change.id}/{what}/{rank}"

    def _exchange(self, what: str, own: Any, ranks: Collection[int]) -> dict[int, Any]:
        """Publishes `own`, unless None, and returns what the `ranks` published."""
        if own is not None:
            self._publish(what, own)
        keys = {r: self._key(what, r) for r in ranks}
        values = self._await(keys.values())
        return {r: json.loads(values[key]) for r, key in keys.items()}

    def _publish(self, what: str, own: Any) -> None:
        key, value = self._key(what, self._rank), json.dumps(own).encode()
        try:
            written = self._store.compare_and_swap(key, None, value)
        except StoreError:
            written = False
        if not written and self._store.get(key) != value:
            raise ElasticError("it was started again meanwhile")  # others talk to the process that it was before

    def _await(self, keys: Iterable[str]) -> dict[str, bytes]:
        keys = list(keys)
        while True:
            try:
                return self._store.wait(keys, 0.25) if keys else {}
            except TimeoutError:
                if self._given_up():
                    raise ElasticError("given up meanwhile") from None
                if time.monotonic() > self.deadline:
                    raise

    def _meet(self) -> dict[int, dict[str, Any]]:
        """Waits until this rank has begun the epoch and all that take part are there. Where to reach them, by rank."""
        shared, ranks = self._shared, {*self._state.members, *self._change.members}
        with shared.cond:
            while self._rank in self._state.members and shared.applied != self._state.epoch:
                if time.monotonic() > self.deadline or self._given_up():
                    raise ElasticError("this rank did not begin the epoch in time")
                shared.cond.wait(0.05)
        return self._exchange("hello", {"address": self._endpoint.address(), "host": _host_id()}, ranks)

    # --- Weights. ---

    def _move(self, num_hosts: int) -> Held:
        """The weights for the new table, read from members while they serve."""
        state, change, me = self._state, self._change, self._rank
        mine = slice(me * state.per_rank, (me + 1) * state.per_rank)
        held = self._shared.held
        own: dict[str, Any] | None = None
        if me in state.members:
            if not self._shared.set_up.wait(max(0.0, self.deadline - time.monotonic())):
                raise TimeoutError(
                    "load: every first member must call it before a change; got no call; call group.load"
                )
            own, held = {"experts": None}, self._shared.held
            if held.experts is not None and held.dense is not None:
                nixl = num_hosts > 1 or not _ffi.shared_memory_allowed()
                own = {"experts": held.experts.describe(nixl=nixl), "dense": held.dense.describe(nixl=nixl)}
                own |= {"spec": [held.experts.spec, held.dense.spec]}
        if me not in change.members:
            self._exchange("weights", own, [])
            return Held(change.id)
        sources = self._exchange("weights", own, state.members)
        staged = Held(change.id, placement=table_placement(change.table, self._num_experts, self._config.max_ranks))
        first = sources[state.members[me % len(state.members)]]
        if first["experts"] is None:
            return staged
        spec, dense_spec = map(check_spec, first["spec"])
        if me in state.members:
            staged.dense, staged.dense_arrays = held.dense, held.dense_arrays
        else:
            staged.dense = WeightSet(dense_spec)
            copy = staged.dense.copier(first["dense"], self._pace)
            for name in dense_spec:
                copy(name, None, 0)
            staged.dense_arrays = staged.dense.arrays()
        if me in state.members and state.table[mine] == change.table[mine]:
            staged.experts, staged.expert_arrays = held.experts, held.expert_arrays
            return staged
        staged.experts = WeightSet(spec)
        own_set = held.experts if me in state.members else None
        self._fill(staged.experts, spec, own_set, change.table[mine], sources)
        staged.expert_arrays = staged.experts.arrays()
        return staged

    def _fill(
        self, target: WeightSet, spec: Spec, own: WeightSet | None, after: Sequence[int], sources: dict[int, Any]
    ) -> None:
        """Each slot from this rank's own, from another's, or from the user's `restore`."""
        me, per_rank = self._rank, self._state.per_rank
        copiers: dict[int, Callable[[str, int | None, int], None]] = {}
        missing: list[int] = []
        for here, expert in enumerate(after):
            if expert < 0:
                continue
            slots = [slot for slot, e in enumerate(self._state.table) if e == expert]
            mine = [slot % per_rank for slot in slots if slot // per_rank == me]
            if mine and own is not None:
                for name, view in target.views.items():
                    copy_bytes(view[here : here + 1], own.views[name][mine[0] : mine[0] + 1], self._pace)
            elif slots:
                slot = slots[(here + me) % len(slots)]  # readers spread over the replicas
                rank = slot // per_rank
                if rank not in copiers:
                    copiers[rank] = target.copier(sources[rank]["experts"], self._pace)
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
