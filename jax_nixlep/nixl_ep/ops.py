"""`low_latency_dispatch` and `low_latency_combine`: NVIDIA's kernels with their own layout."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_nixlep import _ffi, _order
from jax_nixlep._check import check_array
from jax_nixlep._vary import vary
from jax_nixlep.config import EpConfig


class LowLatencyHandle(NamedTuple):
    """Where the rows that `low_latency_dispatch` returned came from; for `low_latency_combine`.

    Attributes:
      source: [E, R * T] int32, the token of each row on its rank; anything on rows that were not filled.
      ranges: [E, R, 2] int32, how many rows came from each rank, and the first of them.
      masked: [3, R] int32, not zero: masked before the operation; masked after it; may not be masked, or the group
        fails (members, with `on_timeout="raise"`).
      order: [] float32 zero; pass it as `after=`.
    """

    source: jax.Array
    ranges: jax.Array
    masked: jax.Array
    order: jax.Array


def low_latency_dispatch(
    x: jax.Array, topk_idx: jax.Array, *, config: EpConfig, after: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None, jax.Array, LowLatencyHandle]:
    """Sends each token to its experts, as `Buffer.low_latency_dispatch` of nixl_ep. Collective: every member must call.

    Needs a group with `kernels="nixl_ep"`. S = max_ranks * max_tokens_per_rank. No gradient.

    Args:
      x: [t, H] bfloat16, t <= config.max_tokens_per_rank.
      topk_idx: [t, K] int32 physical slots, -1 = none. Others outside [0, config.num_slots) stop the GPU's program; an
        id repeated in a token gives two rows. (`jax_nixlep.dispatch` takes care of both.)
      config: the group's. `wire` "same" or "bf16" sends bfloat16, "fp8_e4m3" float8 with one scale per 128 values.
      after: any array; this operation runs after what made it.

    Returns:
      recv_x: [E, S, H] bfloat16, or float8_e4m3fn. Only the first `recv_count` rows of each expert are filled, in any
        order.
      scales: None; or [E, H / 128, S] float32, or [E, H / 512, S] int32 of four exponents each with
        scale_format="ue8m0". (Upstream shows the last two axes exchanged; memory is the same.)
      recv_count: [E] int32.
      handle: `LowLatencyHandle`.

    Raises:
      ValueError: at trace time.
      jax.errors.JaxRuntimeError: when the program runs.
    """
    _order.next_ordinal("low_latency_dispatch")  # refuses vmap
    check_array("low_latency_dispatch", "x", x, (x.shape[0], config.hidden), jnp.bfloat16)
    check_array("low_latency_dispatch", "topk_idx", topk_idx, (x.shape[0], config.top_k), jnp.int32)
    experts, ranks = config.experts_per_rank, config.max_ranks
    slots = ranks * config.max_tokens_per_rank
    fp8, ue8m0 = config.wire == "fp8_e4m3", config.scale_format == "ue8m0"
    scales_shape = (experts, config.hidden // (512 if ue8m0 else 128), slots) if fp8 else (0,)
    results = (
        _ffi.struct((experts, slots, config.hidden), jnp.float8_e4m3fn if fp8 else jnp.bfloat16),
        _ffi.struct(scales_shape, jnp.int32 if ue8m0 else jnp.float32),
        _ffi.struct((experts,), jnp.int32),
        _ffi.struct((experts, slots), jnp.int32),
        _ffi.struct((experts, ranks, 2), jnp.int32),
        _ffi.struct((3, ranks), jnp.int32),
        _ffi.struct((), jnp.float32),
    )
    operands = (vary(x), vary(topk_idx), _order.edge(after))
    out = _ffi.call("nixl_ep_dispatch", results, *operands, round_scale=np.int64(config.round_scale))
    rows, scales, counts, source, ranges, masked, order = out
    return rows, scales if fp8 else None, counts, LowLatencyHandle(source, ranges, masked, order)


def low_latency_combine(
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    handle: LowLatencyHandle,
    *,
    config: EpConfig,
    after: jax.Array | None = None,
) -> tuple[jax.Array, LowLatencyHandle]:
    """Brings back the weighted sums, as `Buffer.low_latency_combine` of nixl_ep. Collective: every member must call.

    Args:
      x: [E, S, H] bfloat16, the expert's result for each row of `recv_x`; rows that were not filled are not read. Or
        [C, H] in an order of the caller's, of which `handle` has `source` [C] and `ranges` whose firsts, counted from
        row e * S for expert e, may be negative.
      topk_idx: [t, K] int32, as dispatched.
      topk_weights: [t, K] float32.
      handle: of the dispatch.
      config: the group's.
      after: any array; this operation runs after what made it.

    Returns:
      [t, H] bfloat16: sums in float32 in the order of the choices; and the handle, its `masked` and `order` as of this
      operation. A member that is masked adds nothing.

    Raises:
      ValueError: at trace time.
      jax.errors.JaxRuntimeError: when the program runs.
    """
    op = "low_latency_combine"
    _order.next_ordinal(op)
    slots, tokens = config.max_ranks * config.max_tokens_per_rank, topk_idx.shape[0]
    rows = x.shape[:-1] if x.ndim == 2 else (config.experts_per_rank, slots)
    check_array(op, "x", x, (*rows, config.hidden), jnp.bfloat16)
    check_array(op, "topk_idx", topk_idx, (tokens, config.top_k), jnp.int32)
    check_array(op, "topk_weights", topk_weights, (tokens, config.top_k), jnp.float32)
    check_array(op, "handle.source", handle.source, rows, jnp.int32)
    results = (
        _ffi.struct((tokens, config.hidden), jnp.bfloat16),
        _ffi.struct((3, config.max_ranks), jnp.int32),
        _ffi.struct((), jnp.float32),
    )
    operands = (*map(vary, (x, topk_idx, topk_weights, handle.source, handle.ranges)), _order.edge(after))
    y, masked, order = _ffi.call("nixl_ep_combine", results, *operands, slots=np.int64(slots))
    return y, handle._replace(masked=masked, order=order)
