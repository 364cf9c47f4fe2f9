"""Which physical slots serve a logical expert: small arrays given to the program at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Placement(NamedTuple):
    """Slots of each logical expert. A runtime argument of a program: changing it compiles nothing.

    Attributes:
      slots: [L, P] int32, the physical slots (`rank * experts_per_rank + local expert`) of each logical expert,
        replicas after each other; entries past its count are unused.
      counts: [L] int32, replicas of each expert; 0 = served by nobody, its tokens get nothing from it.
    """

    slots: jax.Array
    counts: jax.Array


def identity_placement(num_experts: int, members: Sequence[int], experts_per_rank: int) -> Placement:
    """Logical experts in order over the slots of `members`, one replica each.

    Raises:
      ValueError: more experts than slots.
    """
    slots = [rank * experts_per_rank + local for rank in sorted(members) for local in range(experts_per_rank)]
    if num_experts > len(slots):
        raise ValueError(
            f"identity_placement: num_experts must be at most the {len(slots)} slots of {len(members)} members; "
            f"got {num_experts}; raise experts_per_rank or add members"
        )
    return Placement(jnp.asarray(np.array(slots[:num_experts], np.int32)[:, None]), jnp.ones((num_experts,), jnp.int32))


def to_slots(placement: Placement, expert_ids: jax.Array) -> jax.Array:
    """Physical slots [T, K] int32 of logical `expert_ids` [T, K] int32; -1 stays -1. Tokens take replicas in turn."""
    known = (expert_ids >= 0) & (expert_ids < placement.counts.shape[0])
    expert = jnp.where(known, expert_ids, 0)
    count = placement.counts[expert]
    turn = jnp.arange(expert_ids.shape[0], dtype=jnp.int32)[:, None] % jnp.maximum(count, 1)
    return jnp.where(known & (count > 0), placement.slots[expert, turn], jnp.where(known, -1, expert_ids))
