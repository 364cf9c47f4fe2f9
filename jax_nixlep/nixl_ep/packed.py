"""The public operations over NVIDIA's kernels: rows packed by expert, in the order that `dispatch` promises."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jax_nixlep import _order
from jax_nixlep._check import check_array
from jax_nixlep._vary import vary
from jax_nixlep.config import EpConfig
from jax_nixlep.nixl_ep.ops import LowLatencyHandle, low_latency_combine, low_latency_dispatch
from jax_nixlep.quant import dequantize as dequantized
from jax_nixlep.routing import PEER_ABSENT, PEER_OK, PEER_TIMED_OUT, PackedHandle, Received, Status


def dispatch(
    x: jax.Array,
    scales: jax.Array | None,
    expert_ids: jax.Array,
    weights: jax.Array | None,
    config: EpConfig,
    after: jax.Array | None = None,
    dequantize: bool = True,
    recv_capacity: int | None = None,
) -> Received:
    """`jax_nixlep.dispatch`, whose arguments are checked."""
    if scales is not None:
        raise ValueError(
            'dispatch: scales must be None with kernels="nixl_ep", whose kernels quantise themselves; got '
            f'{scales.dtype} {list(scales.shape)}; pass tokens of bfloat16, or use kernels="native"'
        )
    num_rows = recv_capacity or config.num_rows
    _check_rows(x, config, num_rows)
    if weights is None:
        weights = jnp.where(_repeats(expert_ids), 0, 1).astype(jnp.float32)
    out = _dispatch(config, dequantize, num_rows, vary(x), vary(expert_ids), vary(weights), after)
    tokens, scales, sizes, handle, peers, invalid_ids, order = out
    zero = vary(jnp.zeros((), jnp.int32))
    return Received(tokens, scales, sizes, sizes, handle, Status(peers, zero, invalid_ids, order))


def combine(
    expert_out: jax.Array,
    handle: PackedHandle,
    weights: jax.Array | None,
    config: EpConfig,
    after: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`jax_nixlep.combine`; also its order edge."""
    _order.next_ordinal("combine")  # refuses vmap
    tokens, rows = handle.expert_ids.shape[0], handle.source.shape[0]
    shape = (config.experts_per_rank, config.max_ranks, 2)
    check_array("combine", "handle.ranges", handle.ranges, shape, jnp.int32)
    check_array("combine", "expert_out", expert_out, (rows, config.hidden), config.dtype)
    if weights is not None:
        check_array("combine", "weights", weights, (tokens, config.top_k), jnp.float32)
    return _combine(config, vary(expert_out), handle, handle.weights if weights is None else vary(weights), after)


def _check_rows(x: jax.Array, config: EpConfig, num_rows: int) -> None:
    """No row may be dropped: its source would not learn of it."""
    alike = bool(jax.sharding.get_abstract_mesh().manual_axes)  # in a mesh all ranks bring as many tokens as this one
    least = config.worst_case_rows(x.shape[0] if alike else None)
    if num_rows < least:
        raise ValueError(
            f'dispatch: recv_capacity must be at least {least} with kernels="nixl_ep", whose kernels drop nothing; got '
            f'{num_rows}; leave it out, or use kernels="native"'
        )


def _without_gradient(op: str, num_static: int):
    """Refuses a gradient when it is traced: NVIDIA's kernels bring no cotangents."""

    def wrap(function):
        static = tuple(range(num_static))
        call = functools.partial(jax.custom_vjp, nondiff_argnums=static)(function)

        def refuse(*_):
            raise NotImplementedError(
                f'{op}: a gradient must be of kernels="native"; got kernels="nixl_ep", which are for inference; '
                'initialize with kernels="native"'
            )

        call.defvjp(refuse, refuse)
        return call

    return wrap


@_without_gradient("dispatch", 3)
def _dispatch(config: EpConfig, dequantize: bool, num_rows: int, x, expert_ids, weights, after):
    known = (expert_ids >= 0) & (expert_ids < config.num_slots)
    clean = jnp.where(known, expert_ids, -1)
    distinct = jnp.where(_repeats(clean), -1, clean)
    rows, scales, sizes, handle = low_latency_dispatch(x, distinct, config=config, after=after)
    before, late, fatal = handle.masked != 0
    peers = jnp.where(before, PEER_ABSENT, jnp.where(late, PEER_TIMED_OUT, PEER_OK)).astype(jnp.int32)
    values, scales, source, ranges = pack(config, dequantize, num_rows, rows, scales, handle.source, handle.ranges)
    values = _poison(values, late, fatal)
    packed = PackedHandle(clean, weights, source, ranges)
    invalid = jnp.sum(~known & (expert_ids != -1), dtype=jnp.int32)
    return values, scales, sizes, packed, peers, invalid, handle.order


def pack(config: EpConfig, dequantize: bool, num_rows: int, rows, scales, source, ranges):
    """NVIDIA's rows [E, S, H], in any order, to rows [C, H] by expert, rank and token.

    Returns rows, their scales or None, their tokens [C], and where those of an expert and rank are [E, R, 2].
    """
    experts, ranks, tokens = config.experts_per_rank, config.max_ranks, config.max_tokens_per_rank
    slots = ranks * tokens
    count, first = ranges[..., 0], ranges[..., 1]

    # Which slot holds the row of (expert, rank, token), called a place: the order of places is that of packed rows.
    slot = jnp.arange(slots, dtype=jnp.int32)
    holds = (slot >= first[..., None]) & (slot < (first + count)[..., None])  # [E, R, S]
    rank = jnp.argmax(holds, axis=1).astype(jnp.int32)
    expert = jnp.arange(experts, dtype=jnp.int32)[:, None]
    place = jnp.where(holds.any(axis=1), (expert * ranks + rank) * tokens + source, experts * slots)
    every = jnp.arange(experts * slots, dtype=jnp.int32)
    slot_at = vary(jnp.full((experts * slots,), -1, jnp.int32)).at[place.reshape(-1)].set(every, mode="drop")
    row_at = jnp.where(slot_at >= 0, jnp.cumsum(slot_at >= 0, dtype=jnp.int32) - 1, num_rows)
    place_of = vary(jnp.zeros((num_rows,), jnp.int32)).at[row_at].set(every, mode="drop")
    begin = jnp.cumsum(count.reshape(-1), dtype=jnp.int32).reshape(count.shape) - count
    packed_ranges = jnp.stack([count, begin - expert * slots], axis=-1)

    filled = (jnp.arange(num_rows) < count.sum())[:, None]
    chosen = jnp.maximum(slot_at[place_of], 0)
    values = rows.reshape(experts * slots, -1)[chosen]
    if scales is not None:
        scales = scales[lax.div(chosen, jnp.int32(slots)), :, lax.rem(chosen, jnp.int32(slots))]
        if config.scale_format == "ue8m0":  # four exponents in each int32
            scales = lax.bitcast_convert_type(scales, jnp.uint8).reshape(num_rows, -1)
        scales = jnp.where(filled, scales, jnp.zeros((), scales.dtype))
        if config.scale_format == "ue8m0":
            scales = lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu)
        if dequantize:
            values, scales = dequantized(values, scales, config.dtype), None
    values = jnp.where(filled, values, jnp.zeros((), values.dtype))
    return values, scales, lax.rem(place_of, jnp.int32(tokens)), packed_ranges


@_without_gradient("combine", 1)
def _combine(config: EpConfig, expert_out, handle, weights, after):
    ids = handle.expert_ids
    # A repeated id is one row, whose weight is the sum.
    same = ids[:, :, None] == ids[:, None, :]
    weights = jnp.sum(jnp.where(same, weights[:, None, :], 0), axis=-1)
    ids = jnp.where(_repeats(ids), -1, ids)
    empty = jnp.zeros((), jnp.float32)
    layout = LowLatencyHandle(handle.source, handle.ranges, jnp.zeros((3, config.max_ranks), jnp.int32), empty)
    y, done = low_latency_combine(expert_out, ids, weights, layout, config=config, after=after)
    return _poison(y, *(done.masked[1:] != 0)), done.order


def _repeats(ids: jax.Array) -> jax.Array:
    """[t, K]: which ids stand earlier in their token."""
    earlier = jnp.tril(jnp.ones((ids.shape[1], ids.shape[1]), bool), -1)
    return ((ids[:, :, None] == ids[:, None, :]) & earlier).any(axis=-1)


def _poison(values: jax.Array, masked: jax.Array, fatal: jax.Array) -> jax.Array:
    """NaN where a late peer ends the group: no result may look good."""
    if values.size == 0:  # the result must depend on its operation all the same, or JAX drops that
        return values
    return jnp.where((masked & fatal).any(), jnp.full((), jnp.nan, values.dtype), values)
