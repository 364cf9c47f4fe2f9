"""`dispatch`: send each token to the ranks of its experts; get the rows of the local experts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_nixlep import _ffi, _order, quant
from jax_nixlep._check import check_dispatch
from jax_nixlep._vary import vary
from jax_nixlep.config import EpConfig
from jax_nixlep.nixl_ep import packed
from jax_nixlep.routing import Handle, Received, Status


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """What is static about one call of an op."""

    config: EpConfig
    ordinal: int
    num_rows: int
    weighted: bool = False  # weights were given
    dequantize: bool = True
    quantized: bool = False  # x came with scales

    def attributes(self) -> dict:
        config = self.config
        return _ffi.attributes(
            self.ordinal, config.token_wire, config.scale_format, config.round_scale, weighted=self.weighted
        )

    def linear_attributes(self, weighted: bool) -> dict:
        """Partial sums and cotangents travel unquantised."""
        return _ffi.attributes(self.ordinal, self.config.sum_wire, weighted=weighted)


def dispatch(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array | None = None,
    *,
    config: EpConfig,
    scales: jax.Array | None = None,
    after: jax.Array | None = None,
    dequantize: bool = True,
    recv_capacity: int | None = None,
) -> Received:
    """Sends each token to the ranks of its experts. Collective: every member must call, with any number of tokens.

    A row of the result is one distinct (source rank, token, local expert). Rows are packed by expert, and ordered by
    (source rank, token) within it: equal inputs give equal bits, whatever the timing. When more rows are demanded than
    the capacity, every expert keeps an equal share (the largest limit that fits), first come in that order.

    Differentiable in `x` (straight through the wire's rounding), unless it is quantised already, and in `weights`.

    Args:
      x: [t, H] tokens of this rank in `config.dtype`, 0 <= t <= config.max_tokens_per_rank; t may differ between ranks.
        With `scales`, float8_e4m3fn.
      expert_ids: [t, K] int32 physical slots, `rank * experts_per_rank + local expert`; -1 = none. Other values outside
        the group are counted in `status.invalid_ids` and treated as -1. An id repeated in a token gives one row.
      weights: [t, K] float32 routing weights. They travel along and become the handle's, so that `combine` needs no
        exchange of its own for them. None: ones.
      config: the group's `EpConfig`.
      scales: [t, H / 128] of an `x` that is quantised already, with wire "fp8_e4m3": float32, or for scale_format
        "ue8m0" float8_e8m0fnu (or its bytes, uint8). Value times scale is the token; what travels is exactly this.
      after: any array; this operation runs after what made it. Needed between operations of one program that do not
        depend on each other (docs/sharp_bits.md).
      dequantize: with wire "fp8_e4m3", return tokens in `config.dtype`; False returns float8_e4m3fn values and their
        scales, and has no gradient.
      recv_capacity: rows to return (C) in this call; None = `config.num_rows`.

    Returns:
      `Received`.

    Raises:
      ValueError, TypeError: at trace time, naming the argument, what it must be, what it is and what to do.
      jax.errors.JaxRuntimeError, or ValueError from jax's quick path: when the program runs: a peer that is late, dead
        or runs another operation is named.
      NotImplementedError: under vmap.
    """
    if _ffi.kernels() == "nixl_ep":
        check_dispatch(x, scales, expert_ids, weights, config, dequantize, recv_capacity)
        return packed.dispatch(x, scales, expert_ids, weights, config, after, dequantize, recv_capacity)
    spec, operands = dispatch_call(x, scales, expert_ids, weights, config, after, dequantize, recv_capacity)
    *rows, clean_ids, row_of, peers, dropped, invalid_ids, order = _dispatch(spec, *operands)
    return received((*rows, row_of, peers, dropped, order), clean_ids, invalid_ids)


def dispatch_call(x, scales, expert_ids, weights, config, after, dequantize, recv_capacity):
    """Checks the arguments of a dispatch; returns its `OpSpec` and operands, absent ones of size 0."""
    check_dispatch(x, scales, expert_ids, weights, config, dequantize, recv_capacity)
    ordinal, rows = _order.next_ordinal("dispatch"), recv_capacity or config.num_rows
    spec = OpSpec(config, ordinal, rows, weights is not None, dequantize, scales is not None)
    absent = jnp.zeros((0,), jnp.float32)
    x, scales = (x, absent) if scales is None else quant.as_given(x, scales)
    operands = map(vary, (x, scales, expert_ids, absent if weights is None else weights))
    return spec, (*operands, _order.edge(after))


def received_structs(spec: OpSpec) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the receiving half of a dispatch returns."""
    config, rows = spec.config, spec.num_rows
    raw = config.token_wire == "fp8_e4m3" and not spec.dequantize
    f32, i32 = jnp.float32, jnp.int32
    return (
        _ffi.struct((rows, config.hidden), jnp.float8_e4m3fn if raw else config.dtype),
        _ffi.struct((rows, config.hidden // _ffi.QUANT_BLOCK if raw else 0), config.scale_dtype),
        _ffi.struct((rows,), f32),  # row_weights
        _ffi.struct((config.experts_per_rank,), i32),  # group_sizes
        _ffi.struct((config.experts_per_rank,), i32),  # demand
        _ffi.struct((config.max_ranks, config.max_tokens_per_rank, config.top_k), i32),  # row_of
        _ffi.struct((config.max_ranks,), i32),  # peers
        _ffi.struct((), i32),  # dropped
        _ffi.struct((), f32),  # order
    )


def received(results, clean_ids, invalid_ids) -> Received:
    """Of the `results` that `received_structs` describes."""
    tokens, scales, row_weights, group_sizes, demand, row_of, peers, dropped, order = results
    return Received(
        tokens,
        scales if scales.size else None,
        group_sizes,
        demand,
        Handle(clean_ids, row_of, row_weights),
        Status(peers, dropped, invalid_ids, order),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(spec: OpSpec, x, scales, expert_ids, weights, after):
    *rows, row_of, peers, dropped, order = received_structs(spec)
    clean_ids, invalid_ids = _ffi.struct(expert_ids.shape, jnp.int32), _ffi.struct((), jnp.int32)
    results = (*rows, clean_ids, row_of, peers, dropped, invalid_ids, order)
    return tuple(_ffi.call("dispatch", results, x, scales, expert_ids, weights, after, **spec.attributes()))


def _dispatch_fwd(spec, x, scales, expert_ids, weights, after):
    out = _dispatch(spec, x, scales, expert_ids, weights, after)
    return out, (out[5], out[6])


def _dispatch_bwd(spec, residuals, cotangents):
    if spec.config.token_wire == "fp8_e4m3" and not spec.dequantize and not spec.quantized:
        raise TypeError(
            "dispatch: dequantize must be True for a gradient; got False; "
            "dequantize in dispatch, or stop the gradient of its results"
        )
    clean_ids, row_of = residuals
    d_tokens, d_row_weights, d_order = cotangents[0], cotangents[2], cotangents[-1]
    d_x, d_weights, order = gather_rows(
        spec,
        None if spec.quantized else d_tokens,
        jnp.ones_like(d_row_weights),
        d_row_weights if spec.weighted else None,
        clean_ids,
        row_of,
        d_order,
    )
    return None if spec.quantized else d_x, None, None, d_weights, order


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


# --- The two linear maps that both ops and their gradients are made of; each is the other's transpose. ---


def scatter_tokens(spec: OpSpec, x, weights, expert_ids, row_of, after):
    """Sends x [t, H] and weights [t, K] (either may be None) along a handle.

    Returns rows [C, H], row weights [C] (or None) and the order edge.
    """
    t = expert_ids.shape[0]
    x = jnp.zeros((t, 0), spec.config.dtype) if x is None else x
    flat = jnp.zeros((0,), jnp.float32) if weights is None else weights
    results = (
        _ffi.struct((spec.num_rows, x.shape[1]), x.dtype),
        _ffi.struct((0 if weights is None else spec.num_rows,), jnp.float32),
        _ffi.struct((), jnp.float32),
    )
    operands = (vary(v) for v in (x, flat, expert_ids, row_of, after))
    rows, row_weights, order = _ffi.call(
        "redispatch", results, *operands, **spec.linear_attributes(weights is not None)
    )
    return rows, None if weights is None else row_weights, order


def gather_rows(spec: OpSpec, rows, row_weights, row_scalars, expert_ids, row_of, after):
    """Returns to each token the weighted sum of its rows [C, H], and to each choice its row's scalar [C].

    `rows` or `row_scalars` may be None. Returns y [t, H], scalars [t, K] ([0] if there are none) and the order edge.
    """
    t = expert_ids.shape[0]
    rows = jnp.zeros((spec.num_rows, 0), spec.config.dtype) if rows is None else rows
    scalars = jnp.zeros((0,), jnp.float32) if row_scalars is None else row_scalars
    results = (
        _ffi.struct((t, rows.shape[1]), rows.dtype),
        _ffi.struct((0,) if row_scalars is None else expert_ids.shape, jnp.float32),
        _ffi.struct((), jnp.float32),
    )
    operands = (vary(v) for v in (rows, row_weights, scalars, row_of, after))
    return _ffi.call("combine", results, *operands, **spec.linear_attributes(row_scalars is not None))
