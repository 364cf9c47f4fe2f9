"""What the threads of a rank of an elastic group share, and what they tell its user."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_nixlep.elastic.weights import Tree, WeightSet
from jax_nixlep.placement import Placement

Restore = Callable[[list[int]], Tree]
LEASE_S = 3.0


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
      blocked_s: between the end of the last step of the old epoch and permission for the first of the new; 0 for a rank
        that was not in the old.
      lost: ranks that were evicted, if it was a loss.
      change: id of the change, "" for a loss.
    """

    epoch: int
    members: tuple[int, ...]
    blocked_s: float
    lost: tuple[int, ...]
    change: str


@dataclasses.dataclass
class Held:
    """Weights and table in use, or ready to be used; `change` says since when."""

    change: str
    experts: WeightSet | None = None
    dense: WeightSet | None = None
    expert_arrays: dict[str, Any] | None = None
    dense_arrays: dict[str, Any] | None = None
    placement: Placement | None = None


class Shared:
    """Guarded by `cond`, which is notified when any of it, or the log, has changed. Reading one field needs no lock.

    Attributes:
      applied: epoch of the endpoint; 0: not a member yet, or out.
      members: those of that epoch.
      boundary: steps with operations completed in it.
      at_boundary: the thread that steps waits, with no operation running.
      warm: a joiner has called `step`.
      promise: a change, and the boundary not to pass before its step is known.
      problem: why the last step did not count.
      recovery_began: time.monotonic(), or 0 while there is none.
      held: in use.
      staged: of the change that runs.
      failure: what ended the thread that follows the log.
    """

    def __init__(self, num_experts: int):
        self.cond = threading.Condition()
        self.applied = 0
        self.members: tuple[int, ...] = ()
        self.boundary = 0
        self.at_boundary = False
        self.warm = False
        self.promise: tuple[str, int] | None = None
        self.problem = ""
        self.recovery_began = 0.0
        self.held = Held("")
        self.staged: Held | None = None
        self.load = np.zeros(num_experts, np.int64)
        self.failure: BaseException | None = None
        self.set_up = threading.Event()  # `load` was called, or evidently will not be
        self.closing = threading.Event()

    def check(self, op: str) -> None:
        """
        Raises:
          RuntimeError: nobody follows the log any more.
        """
        if self.failure is not None:
            raise RuntimeError(
                f"{op}: the thread that follows the group's log must run; got its failure; restart this rank"
            ) from self.failure

    def notify(self) -> None:
        with self.cond:
            self.cond.notify_all()
