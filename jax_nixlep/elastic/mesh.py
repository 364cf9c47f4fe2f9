"""`ElasticMesh`: what a model keeps in step with the members of its group."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jax_nixlep.elastic.state import Change, Switch
from jax_nixlep.placement import Placement, check_table, identity_table, plan_table, table_placement

if TYPE_CHECKING:
    from jax_nixlep.group import EpGroup


class ElasticMesh:
    """The JAX mesh and the placement for the members of now, and the user's callbacks when they change.

    The transport, the XLA client and compiled programs are left alone.

    Of an elastic group (`initialize(elastic=True)` or `join=True`) each process is a JAX runtime of its own: `mesh`
    holds its own device and stays the same object, so nothing is ever compiled for a change. Changes come from
    `group.resize` and happen in `group.step`.

    Of a group made from a mesh (`initialize(mesh=)`: a static `jax.distributed` world, or several local devices) the
    members are some of the ranks along its axis; `resize` here changes them. `mesh` is then the part of the world's
    mesh with those ranks. A program over a mesh not seen before is compiled, over one seen before it is not; open the
    shard_map inside the jitted function, with the mesh as a static argument. Slots keep the numbers they have in the
    world: parameters stacked by slot are those of the members, in order.

    Attributes:
      mesh: a `jax.sharding.Mesh`.
    """

    def __init__(
        self,
        group: EpGroup,
        mesh: jax.sharding.Mesh | None = None,
        *,
        axis: str = "ep",
        num_experts: int | None = None,
        on_prepare: Callable[[Change], None] | None = None,
        on_commit: Callable[[Switch], None] | None = None,
    ):
        """
        Args:
          group: the process's group.
          mesh: the one given to `initialize`; None for an elastic group.
          axis: the axis of the ranks.
          num_experts: logical experts, of a group made from a mesh; default: one for each slot.
          on_prepare: called before a change, while the old members serve: the place to warm up. Of an elastic group in
            a thread beside the one that serves. If it raises, the change does not happen.
          on_commit: called when it has happened, before the next step, with `mesh` and `placement` renewed.

        Raises:
          ValueError: a mesh is missing, or given for an elastic group.
        """
        self.group, self._axis = group, axis
        self._on_prepare, self._on_commit = on_prepare, on_commit
        self._world = mesh
        if group.is_elastic == (mesh is not None):
            need, got = ("no mesh", "one") if mesh is not None else ("the mesh given to initialize", "None")
            raise ValueError(f"ElasticMesh: mesh must be {need} for this group; got {got}; correct it")
        if mesh is None:
            self.mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:1]), (axis,))
            if on_prepare:
                group.elastic.on_prepare.append(on_prepare)
            if on_commit:
                group.elastic.on_commit.append(on_commit)
            return
        self.mesh = mesh
        config = group.config
        self._num_experts = len(group.members) * config.experts_per_rank if num_experts is None else num_experts
        self._table = identity_table(self._num_experts, group.members, config.experts_per_rank, config.max_ranks)

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks that take part."""
        return self.group.members

    @property
    def placement(self) -> Placement:
        """Which slots serve which expert; a runtime argument of the program."""
        if self._world is None:
            return self.group.placement
        return table_placement(self._table.tolist(), self._num_experts, self.group.config.max_ranks)

    @property
    def table(self) -> np.ndarray:
        """[max_ranks * experts_per_rank] int32, the logical expert of each slot, -1 for none."""
        return self.group.table if self._world is None else self._table.copy()

    def resize(
        self,
        members: Iterable[int],
        *,
        table: Sequence[int] | np.ndarray | None = None,
        load: Any = None,
        **plan: Any,
    ) -> None:
        """Changes the members of a group made from a mesh, between two steps, with no operation running.

        Collective: every process of the mesh calls it with equal arguments, also one without a member before or after.

        Args:
          members: ranks along the axis, in any order.
          table: see `table`; default: balanced by `placement.plan_table` with `load` [L] and the options `plan`.

        Raises:
          RuntimeError: the group is elastic.
          ValueError: members out of range, or with too few slots; a table that does not fit them.
          TimeoutError: names the processes that did not come.
        """
        if self._world is None:
            raise RuntimeError(
                "ElasticMesh.resize: group must be made from a mesh; got an elastic one; use group.resize"
            )
        config = self.group.config
        wanted, size = tuple(sorted({int(r) for r in members})), self._world.shape[self._axis]
        if not wanted or not 0 <= wanted[0] <= wanted[-1] < size:
            raise ValueError(f"ElasticMesh.resize: members must be ranks in [0, {size}); got {wanted}; correct them")
        if table is None:
            even = np.ones(self._num_experts) if load is None else np.asarray(load)
            table = plan_table(wanted, config.experts_per_rank, self._table, even, **plan)
        rows = np.asarray(table, np.int32)
        check_table(
            "ElasticMesh.resize", rows.tolist(), wanted, config.experts_per_rank, config.max_ranks, self._num_experts
        )
        change = Change(secrets.token_hex(6), wanted, rows, float("inf"))
        if self._on_prepare:
            self._on_prepare(change)
        began = time.monotonic()
        self.group._replace_members(wanted)
        devices = np.take(self._world.devices, wanted, axis=self._world.axis_names.index(self._axis))
        self.mesh = jax.sharding.Mesh(devices, self._world.axis_names, axis_types=self._world.axis_types)
        self._table = change.table
        if self._on_commit:
            self._on_commit(Switch(self.group.epoch, wanted, time.monotonic() - began, (), change.id))
