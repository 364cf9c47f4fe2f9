"""What `dispatch` returns: arrays only, so that jit, grad, remat and scan carry them like any other."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jax_nixlep._ffi import PEER_ABSENT as PEER_ABSENT
from jax_nixlep._ffi import PEER_OK as PEER_OK
from jax_nixlep._ffi import PEER_TIMED_OUT as PEER_TIMED_OUT


class Handle(NamedTuple):
    """How rows and tokens belong together; made by `dispatch`, used by `combine`. Treat as opaque.

    Attributes:
      expert_ids: [T, K] int32, the ids this rank dispatched (invalid ones replaced by -1).
      row_of: [R, max_tokens_per_rank, K] int32, the local row that serves choice k of token t of
        rank r; -1 where that choice is not served here or was dropped.
      row_weights: [C] float32, the routing weight of each row; zero on padding rows. A repeated id
        of one token is one row, whose weight is the sum. Ones where `dispatch` got no weights.
    """

    expert_ids: jax.Array
    row_of: jax.Array
    row_weights: jax.Array


class PackedHandle(NamedTuple):
    """The handle of groups with `kernels="nixl_ep"`, where weights stay with their tokens. Treat as opaque.

    Attributes:
      expert_ids: [t, K] int32, the ids this rank dispatched (invalid ones replaced by -1).
      weights: [t, K] float32, of `dispatch`.
      source: [C] int32, the token of each row on its rank.
      ranges: [E, R, 2] int32, how many rows of each local expert came from each rank, and the first of them, counted
        from row `e * R * max_tokens_per_rank`.
    """

    expert_ids: jax.Array
    weights: jax.Array
    source: jax.Array
    ranges: jax.Array


class Status(NamedTuple):
    """What happened in one `dispatch` call, seen from this rank.

    Attributes:
      peers: [R] int32: `PEER_OK`, `PEER_ABSENT` (not a member, or masked) or `PEER_TIMED_OUT`.
      dropped: [] int32, rows this rank could not take because of `recv_capacity`.
      invalid_ids: [] int32, ids of this rank that were neither -1 nor a slot of the group.
      order: [] float32, always zero; an operation that takes it as `after=` runs after this one.
    """

    peers: jax.Array
    dropped: jax.Array
    invalid_ids: jax.Array
    order: jax.Array


class Received(NamedTuple):
    """The rows routed to this rank's experts.

    Attributes:
      tokens: [C, H], expert-major: the rows of local expert 0, then 1, ...; within an expert ordered
        by (source rank, source token). Rows past `sum(group_sizes)` are zero.
      scales: None, or with `dequantize=False` the fp8 scales [C, H / 128].
      group_sizes: [E] int32, rows of each local expert.
      demand: [E] int32, rows each local expert would have had with unlimited capacity.
      handle: `Handle` for `combine`; `PackedHandle` with `kernels="nixl_ep"`.
      status: `Status`.
    """

    tokens: jax.Array
    scales: jax.Array | None
    group_sizes: jax.Array
    demand: jax.Array
    handle: Handle | PackedHandle
    status: Status
