"""`dispatch` and `combine` in plain JAX: the oracle of the tests, and `backend="xla"` for any mesh without NIXL.

Slow and obvious: every rank gathers all tokens and keeps its rows. The results are those of the NIXL ops: rows in the
same order, drops, float32 sums in the same order. XLA orders its own collectives, so `after` is accepted and ignored.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nixlep import quant
from jax_nixlep._check import check_combine, check_dispatch
from jax_nixlep._vary import vary_alike
from jax_nixlep.config import EpConfig
from jax_nixlep.routing import PEER_ABSENT, PEER_OK, Handle, Received, Status

Axis = str | None


def dispatch(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array | None = None,
    *,
    config: EpConfig,
    axis: Axis = "ep",
    scales: jax.Array | None = None,
    dequantize: bool = True,
    recv_capacity: int | None = None,
    after: jax.Array | None = None,
) -> Received:
    """Sends each token to the ranks of its experts. Call it inside shard_map over `axis`.

    Differentiable in `x` (straight through the rounding of the wire), unless it is quantised already, and in
    `weights` (through `handle.row_weights`).

    Args:
      x: [t, H] tokens of this rank in `config.dtype`, t <= `config.max_tokens_per_rank`. With `scales`,
        float8_e4m3fn.
      expert_ids: [t, K] int32 physical slots `rank * experts_per_rank + local expert`; -1 = none.
        Others outside the group are counted in `status.invalid_ids` and treated as -1.
      weights: [t, K] float32 routing weights, or None for ones.
      config: capacities; equal on all ranks.
      axis: mesh axis of at most `config.max_ranks` ranks; None for a group of this one rank.
      scales: [t, H / 128] of a quantised `x`: float32, or for "ue8m0" float8_e8m0fnu or its bytes.
      dequantize: False returns the fp8 values and scales of `wire="fp8_e4m3"` (not differentiable in x).
      recv_capacity: rows to return, instead of `config.num_rows`.
      after: ignored.

    Returns:
      `Received`. Rows beyond the capacity are dropped so that the largest experts lose first.

    Raises:
      ValueError: shapes, dtypes or an axis that do not fit the config.
    """
    del after
    check_dispatch(x, scales, expert_ids, weights, config, dequantize, recv_capacity)
    ranks, rank = _axis_size("dispatch", config, axis), (lax.axis_index(axis) if axis else 0)
    rows = config.num_rows if recv_capacity is None else int(recv_capacity)
    valid = (expert_ids >= 0) & (expert_ids < config.num_slots)
    invalid = jnp.sum(~valid & (expert_ids != -1), dtype=jnp.int32)
    expert_ids = jnp.where(valid, expert_ids, -1)

    row_of, sizes, demand = _assign_rows(_gather(expert_ids, axis), rank, config.experts_per_rank, rows)
    if scales is None:
        tokens, row_scales = _deliver(config, axis, dequantize, rows, *vary_alike(x, row_of))
    else:
        values = vary_alike(*quant.as_given(x, scales), row_of)
        tokens, row_scales = _deliver_quantized(config, axis, dequantize, rows, *values)
    if weights is None:
        row_weights = (jnp.arange(rows) < sizes.sum()).astype(jnp.float32)
    else:
        row_weights = _route_weights(weights, row_of, rows, axis)
    pad = ((0, config.max_ranks - ranks), (0, config.max_tokens_per_rank - x.shape[0]), (0, 0))
    handle = Handle(expert_ids, jnp.pad(row_of, pad, constant_values=-1), row_weights)
    peers = jnp.where(jnp.arange(config.max_ranks) < ranks, PEER_OK, PEER_ABSENT).astype(jnp.int32)
    status = Status(peers, (demand - sizes).sum(), invalid, jnp.zeros((), jnp.float32))
    return Received(tokens, row_scales, sizes, demand, handle, status)


def combine(
    expert_out: jax.Array,
    handle: Handle,
    weights: jax.Array | None = None,
    *,
    config: EpConfig,
    axis: Axis = "ep",
    after: jax.Array | None = None,
) -> jax.Array:
    """Brings the experts' rows back and sums them per token with their weights, in float32.

    Each rank sums its rows of a token (k ascending, from zero) and sends the sum in `config.dtype`, or as bfloat16
    when `wire` is narrower; the token's rank adds the sums in the order of the ranks. Differentiable in
    `expert_out`, `weights` and `handle.row_weights`.

    Args:
      expert_out: [C, H] in `config.dtype`, one row for each row of `dispatch`.
      handle: from `dispatch`.
      weights: [t, K] float32 to use instead of the weights of the handle, or None.
      config, axis, after: as in `dispatch`.

    Returns:
      [t, H] in `config.dtype`; zeros for tokens that no expert took.

    Raises:
      ValueError: shapes, dtypes or an axis that do not fit the config.
    """
    del after
    check_combine(expert_out, handle, weights, config)
    row_of = handle.row_of[: _axis_size("combine", config, axis), : handle.expert_ids.shape[0]]
    row_weights = handle.row_weights
    if weights is not None:
        row_weights = _route_weights(weights, row_of, expert_out.shape[0], axis)
    return _collect(config, axis, *vary_alike(expert_out, row_weights, row_of))


def _assign_rows(ids: jax.Array, rank: Any, experts: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ids [n, t, K] of all ranks -> row_of [n, t, K], group_sizes [E], demand [E] of this rank."""
    local = ids - rank * experts
    here = (ids >= 0) & (local >= 0) & (local < experts)
    local = jnp.where(here, local, experts).reshape(-1, ids.shape[-1])  # `experts` = not here
    token = jnp.arange(local.shape[0])[:, None]
    wanted = jnp.zeros((local.shape[0], experts), jnp.int32).at[token, local].set(1, mode="drop")
    demand = wanted.sum(0, dtype=jnp.int32)
    sizes = _limit(demand, rows)
    place = jnp.cumsum(wanted, axis=0) - 1  # within the expert, by (rank, token)
    row = jnp.where((wanted == 1) & (place < sizes), jnp.cumsum(sizes) - sizes + place, -1)
    row_of = jnp.take_along_axis(jnp.pad(row, ((0, 0), (0, 1)), constant_values=-1), local, axis=1)
    return row_of.reshape(ids.shape).astype(jnp.int32), sizes, demand


def _limit(demand: jax.Array, rows: int) -> jax.Array:
    """Water-filling: the largest L with sum(min(demand, L)) <= rows, then one row more for the first experts.

    sum(min(demand, L)) is the minimum over i of (the i smallest demands + L * the number of others), so the
    largest L is the maximum over i of what is left for the others, shared equally.
    """
    experts = demand.shape[0]
    smallest = jnp.sort(demand)
    before = jnp.cumsum(smallest) - smallest
    limit = jnp.max((rows - before) // (experts - jnp.arange(experts)))
    kept = jnp.minimum(demand, limit)
    over = demand > limit
    return (kept + (over & (jnp.cumsum(over) <= rows - kept.sum()))).astype(jnp.int32)


def _route_weights(weights: jax.Array, row_of: jax.Array, rows: int, axis: Axis) -> jax.Array:
    """[t, K] weights of each rank -> [C]; those of a repeated id are added, k ascending."""
    weights, row_of = vary_alike(weights, row_of)
    gathered = _gather(weights, axis)
    row_weights = jnp.zeros(rows, jnp.float32)
    for k in range(weights.shape[1]):
        row_weights = row_weights.at[_or_past_end(row_of[..., k], rows)].add(gathered[..., k], mode="drop")
    return row_weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _deliver(
    config: EpConfig, axis: Axis, dequantize: bool, rows: int, x: jax.Array, row_of: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Tokens [t, H] of each rank -> rows [C, H] through the wire of `dispatch`."""
    if config.wire != "fp8_e4m3":
        return _to_rows(_wire(config, x).astype(x.dtype), _sources(row_of, rows), axis), None
    values = quant.quantize(x, scale_format=config.scale_format, round_scale=config.round_scale)
    q, scales = lax.optimization_barrier(values)
    return _deliver_quantized(config, axis, dequantize, rows, q, scales, row_of)


def _deliver_quantized(
    config: EpConfig, axis: Axis, dequantize: bool, rows: int, q: jax.Array, scales: jax.Array, row_of: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    source = _sources(row_of, rows)
    q, scales = _to_rows(q, source, axis), _to_rows(scales, source, axis)
    if config.scale_format == "ue8m0":
        scales = lax.bitcast_convert_type(scales, config.scale_dtype)
    return (quant.dequantize(q, scales, config.dtype), None) if dequantize else (q, scales)


def _deliver_fwd(config: EpConfig, axis: Axis, dequantize: bool, rows: int, x: jax.Array, row_of: jax.Array) -> Any:
    return _deliver(config, axis, dequantize, rows, x, row_of), row_of


def _deliver_bwd(config: EpConfig, axis: Axis, dequantize: bool, rows: int, row_of: jax.Array, grads: Any) -> Any:
    if not dequantize:
        raise TypeError(
            "dispatch: dequantize must be True for a gradient; got False; "
            "dequantize in dispatch, or stop the gradient of its results"
        )
    return _sum_to_tokens(config, axis, grads[0], jnp.ones(rows, jnp.float32), row_of), None


_deliver.defvjp(_deliver_fwd, _deliver_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _collect(config: EpConfig, axis: Axis, out: jax.Array, row_weights: jax.Array, row_of: jax.Array) -> jax.Array:
    return _sum_to_tokens(config, axis, out, row_weights, row_of)


def _collect_fwd(config: EpConfig, axis: Axis, out: jax.Array, row_weights: jax.Array, row_of: jax.Array) -> Any:
    return _sum_to_tokens(config, axis, out, row_weights, row_of), (out, row_weights, row_of)


def _collect_bwd(config: EpConfig, axis: Axis, residuals: Any, dy: jax.Array) -> Any:
    out, row_weights, row_of = residuals
    source = _sources(row_of, out.shape[0])
    grad = _to_rows(_wire(config, dy), source, axis).astype(jnp.float32)
    d_weights = jnp.where(source >= 0, jnp.sum(grad * out.astype(jnp.float32), axis=-1), 0)
    return (row_weights[:, None] * grad).astype(out.dtype), d_weights, None


_collect.defvjp(_collect_fwd, _collect_bwd)


def _sum_to_tokens(
    config: EpConfig, axis: Axis, rows: jax.Array, row_weights: jax.Array, row_of: jax.Array
) -> jax.Array:
    """Rows [C, H] -> the weighted sums of this rank's tokens [t, H]; the maths of `combine`."""

    def step(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        partial, product = carry
        row = row_of[..., k]
        earlier = (row_of == row[..., None]) & (jnp.arange(row_of.shape[2]) < k)
        first = (row >= 0) & ~earlier.any(-1)
        weighted = row_weights[row][..., None] * rows[row].astype(jnp.float32)
        return partial + product, jnp.where(first[..., None], weighted, 0)

    # Each product is added one step later: XLA CPU would make one fused multiply-add, with other bits, of the two.
    zeros = vary_alike(jnp.zeros((*row_of.shape[:2], rows.shape[1]), jnp.float32), row_weights, rows, row_of)[0]
    partial, last = lax.fori_loop(0, row_of.shape[2], step, (zeros, zeros))
    partial = partial + last
    partial = _exchange(_wire(config, partial.astype(config.dtype) if config.wire == "same" else partial), axis)
    total = jnp.zeros(partial.shape[1:], jnp.float32)
    for part in partial:
        total = total + part.astype(jnp.float32)
    return total.astype(config.dtype)


def _wire(config: EpConfig, values: jax.Array) -> jax.Array:
    """The form in which token sums and cotangents travel; the barrier keeps XLA from undoing the rounding."""
    return lax.optimization_barrier(values if config.wire == "same" else values.astype(jnp.bfloat16))


def _sources(row_of: jax.Array, rows: int) -> jax.Array:
    """[n, t, K] -> [C] int32, the index rank * t + token behind each row; -1 on padding rows."""
    token = jnp.arange(row_of[..., 0].size, dtype=jnp.int32)[:, None]
    index = _or_past_end(row_of.reshape(-1, row_of.shape[2]), rows)
    return jnp.full(rows, -1, jnp.int32).at[index].set(token, mode="drop")


def _to_rows(values: jax.Array, source: jax.Array, axis: Axis) -> jax.Array:
    """[t, N] of each rank -> [C, N]; zero bits on padding rows (as bytes, since float8_e8m0fnu has no zero)."""
    dtype, narrow = values.dtype, values.dtype.itemsize == 1
    bits = lax.bitcast_convert_type(values, jnp.uint8) if narrow else values
    gathered = _gather(bits, axis).reshape(-1, values.shape[1])
    if gathered.shape[0] == 0:
        gathered = jnp.zeros((1, values.shape[1]), bits.dtype)
    rows = jnp.where(source[:, None] >= 0, gathered[source], 0)
    return lax.bitcast_convert_type(rows, dtype) if narrow else rows


def _or_past_end(row: jax.Array, rows: int) -> jax.Array:
    return jnp.where(row < 0, rows, row)  # a negative index would count from the end; this one is dropped


def _gather(values: jax.Array, axis: Axis) -> jax.Array:
    return lax.all_gather(values, axis) if axis else values[None]


def _exchange(values: jax.Array, axis: Axis) -> jax.Array:
    """[n, ...], element r for rank r -> [n, ...], element r from rank r."""
    return lax.all_to_all(values, axis, 0, 0, tiled=True) if axis else values


def _axis_size(op: str, config: EpConfig, axis: Axis) -> int:
    try:
        size = lax.axis_size(axis) if axis else 1
    except NameError:
        raise ValueError(
            f"{op}: axis must be a mesh axis of an enclosing shard_map; got {axis!r}; call it there, or pass axis=None"
        ) from None
    if size > config.max_ranks:
        raise ValueError(
            f"{op}: axis must have at most max_ranks={config.max_ranks} ranks; got {size}; raise max_ranks in EpConfig"
        )
    return size
