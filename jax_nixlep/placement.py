"""Which physical slots serve a logical expert: small arrays given to the program at run time.

A *table* is the same thing the other way round, on the host: int32 [max_ranks * experts_per_rank], the logical expert
of each physical slot, -1 for none. `plan_table` makes one for a new membership or a new load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
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
    table = identity_table(num_experts, members, experts_per_rank, max(members, default=0) + 1)
    return table_placement(table.tolist(), num_experts, 1)


def to_slots(placement: Placement, expert_ids: jax.Array) -> jax.Array:
    """Physical slots [T, K] int32 of logical `expert_ids` [T, K] int32; -1 stays -1. Tokens take replicas in turn."""
    known = (expert_ids >= 0) & (expert_ids < placement.counts.shape[0])
    expert = jnp.where(known, expert_ids, 0)
    count = placement.counts[expert]
    turn = jnp.arange(expert_ids.shape[0], dtype=jnp.int32)[:, None] % jnp.maximum(count, 1)
    return jnp.where(known & (count > 0), placement.slots[expert, turn], jnp.where(known, -1, expert_ids))


def table_placement(table: Sequence[int], num_experts: int, max_replicas: int) -> Placement:
    """The runtime arrays of a table, of shapes that do not depend on it.

    Args:
      max_replicas: P, the most replicas an expert can have; `config.max_ranks` if they are on distinct ranks.
    """
    slots, counts = np.zeros((num_experts, max_replicas), np.int32), np.zeros(num_experts, np.int32)
    for slot, expert in enumerate(table):
        if expert >= 0:
            slots[expert, counts[expert]] = slot
            counts[expert] += 1
    return Placement(jnp.asarray(slots), jnp.asarray(counts))


def identity_table(num_experts: int, members: Collection[int], per_rank: int, max_ranks: int) -> np.ndarray:
    """The table of `identity_placement`.

    Raises:
      ValueError: more experts than slots.
    """
    check_experts("placement", num_experts, members, per_rank)
    table = np.full(max_ranks * per_rank, -1, np.int32)
    slots = [rank * per_rank + local for rank in sorted(members) for local in range(per_rank)]
    table[slots[:num_experts]] = np.arange(num_experts)
    return table


def check_experts(op: str, num_experts: int, members: Collection[int], per_rank: int) -> None:
    """
    Raises:
      ValueError: more experts than slots; begins with `op`.
    """
    slots = len(members) * per_rank
    if num_experts > slots:
        raise ValueError(
            f"{op}: num_experts must be at most the {slots} slots of {len(members)} members; got {num_experts}; "
            "raise experts_per_rank or add members"
        )


def check_table(
    op: str, table: Sequence[int], members: Collection[int], per_rank: int, max_ranks: int, num_experts: int
) -> None:
    """
    Raises:
      ValueError: `table` is none for these members, of this length, with these experts; begins with `op`.
    """
    stray = [slot for slot, e in enumerate(table) if e >= 0 and slot // per_rank not in members]
    slots = Counter(e for e in table if e >= 0)
    if len(table) != max_ranks * per_rank or stray or max(slots, default=-1) >= num_experts:
        raise ValueError(
            f"{op}: table must have {max_ranks * per_rank} slots with experts below {num_experts}, on members only; "
            f"got {len(table)} slots, strays {stray[:4]}; use -1 for empty slots"
        )
    for expert, count in slots.items():
        if count > max_ranks:
            raise ValueError(
                f"{op}: table must give an expert at most max_ranks = {max_ranks} slots; got {count} for expert "
                f"{expert}; put its replicas on different ranks"
            )


def plan_table(
    members: Sequence[int],
    per_rank: int,
    old: np.ndarray,
    load: np.ndarray,
    *,
    num_groups: int = 1,
    num_nodes: int = 1,
    slack: float = 0.1,
) -> np.ndarray:
    """A balanced table over `members`, near the `old` one. After DeepSeek's EPLB, with four differences.

    Replicas of an expert are on distinct ranks. Where slots allow, every expert has two before any has three: the loss
    of one rank then loses none. An expert stays on a rank, and in its slot, while that keeps the rank within `slack` of
    the mean load. Ranks may be any; a node is `len(members) / num_nodes` consecutive members.

    Hierarchical when `num_nodes` > 1 divides `num_groups` and the members: groups of consecutive experts are packed to
    nodes, and replicated inside. Otherwise global.

    Args:
      old: the table so far; -1 everywhere for none.
      load: [L] tokens of each expert, of any unit.

    Raises:
      ValueError: fewer slots than experts.
    """
    members, load = sorted(members), np.asarray(load, np.float64)
    experts = len(load)
    if len(members) * per_rank < experts:
        raise ValueError(
            f"plan_table: members must have at least {experts} slots, one for each expert; got "
            f"{len(members) * per_rank} on ranks {members}; keep more members or raise experts_per_rank"
        )
    table = np.full(len(old), -1, np.int32)
    load = load / max(load.sum(), 1e-30) + 1e-9  # experts that nobody chose are spread evenly too
    if num_nodes > 1 and num_groups % num_nodes == 0 and len(members) % num_nodes == 0 and experts % num_groups == 0:
        size, ranks = experts // num_groups, len(members) // num_nodes
        if size * num_groups // num_nodes <= ranks * per_rank:
            nodes = _pack(load.reshape(num_groups, size).sum(1), num_nodes)
            for node, groups in enumerate(nodes):
                ids = np.concatenate([np.arange(g * size, (g + 1) * size) for g in sorted(groups)])
                _plan_flat(table, members[node * ranks : (node + 1) * ranks], per_rank, old, load, ids, slack)
            return table
    _plan_flat(table, members, per_rank, old, load, np.arange(experts), slack)
    return table


def _pack(weights: np.ndarray, packs: int) -> list[list[int]]:
    """Items into packs of equal count, the heaviest first into the lightest pack with room."""
    room = len(weights) // packs
    result: list[list[int]] = [[] for _ in range(packs)]
    totals = np.zeros(packs)
    for item in np.argsort(-weights, kind="stable"):
        pack = min((p for p in range(packs) if len(result[p]) < room), key=lambda p: (totals[p], p))
        result[pack].append(int(item))
        totals[pack] += weights[item]
    return result


def _plan_flat(table, members, per_rank, old, load, ids, slack) -> None:
    """Fills the slots of `members` with the experts `ids`."""
    had = {rank: {int(e) for e in old[rank * per_rank : (rank + 1) * per_rank] if e >= 0} for rank in members}
    copies = {int(e): sum(e in h for h in had.values()) for e in ids}
    spare = len(members) * per_rank - len(ids)
    count = {int(e): 1 for e in ids}
    if spare >= len(ids) and len(members) > 1:
        count, spare = dict.fromkeys(count, 2), spare - len(ids)
    for _ in range(spare):
        open_ids = [e for e in count if count[e] < len(members)]
        if not open_ids:
            break
        best = max(open_ids, key=lambda e: (load[e] / count[e], copies[e] > count[e], -e))
        count[best] += 1

    share = {e: load[e] / count[e] for e in count}
    limit = (1 + slack) * sum(load[e] for e in count) / len(members)
    holds: dict[int, set[int]] = {rank: set() for rank in members}
    total = dict.fromkeys(members, 0.0)

    def put(rank: int, e: int) -> None:
        holds[rank].add(e)
        total[rank] += share[e]

    for e in sorted((e for e in count for _ in range(count[e])), key=lambda e: (-share[e], e)):
        free = [r for r in members if len(holds[r]) < per_rank and e not in holds[r]]
        if free:
            put(min(free, key=lambda r: (total[r] + share[e] > limit, e not in had[r], total[r], r)), e)
            continue
        # Only ranks that already hold e have room: one takes an expert of another rank, which then takes e.
        room = min((r for r in members if len(holds[r]) < per_rank), key=lambda r: (total[r], r))
        other, moved = next(
            (r, f) for r in members if e not in holds[r] for f in sorted(holds[r]) if f not in holds[room]
        )
        holds[other].remove(moved)
        total[other] -= share[moved]
        put(room, moved)
        put(other, e)

    for rank in members:
        slots = range(rank * per_rank, (rank + 1) * per_rank)
        new = set(holds[rank])
        for slot in slots:
            if old[slot] in new:
                table[slot] = old[slot]
                new.remove(int(old[slot]))
        empty = [slot for slot in slots if table[slot] < 0]
        for slot, e in zip(empty, sorted(new), strict=False):
            table[slot] = e
