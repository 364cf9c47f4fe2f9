"""`combine`: bring each token the weighted sum of what its experts made of it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_nixlep import _order
from jax_nixlep._check import check_combine
from jax_nixlep._vary import vary
from jax_nixlep.config import EpConfig
from jax_nixlep.dispatch import OpSpec, gather_rows, scatter_tokens
from jax_nixlep.nixl_ep import packed
from jax_nixlep.routing import Handle, PackedHandle


def combine(
    expert_out: jax.Array,
    handle: Handle | PackedHandle,
    weights: jax.Array | None = None,
    *,
    config: EpConfig,
    after: jax.Array | None = None,
) -> jax.Array:
    """Adds up the expert outputs of each token. Collective: every member must call.

    On each rank the rows of one token are summed with their weights, in float32 and in the order of the choices; the
    sums travel in `config.dtype` (bfloat16 for the narrower wires) and are added in float32 in the order of ranks, with
    no renormalisation. A token without experts gives zeros.

    Differentiable in `expert_out` and in the weights, wherever they were given.

    Args:
      expert_out: [C, H] in `config.dtype`, one row for each row of `Received.tokens`. Padding rows are not read.
      handle: `Received.handle` of the dispatch.
      weights: [t, K] float32: use these instead of the weights that `dispatch` got; costs an exchange of their own.
      config: the group's `EpConfig`.
      after: any array; this operation runs after what made it, and after its dispatch in any case.

    Returns:
      [t, H] in `config.dtype`.

    Raises:
      ValueError, TypeError: at trace time.
      jax.errors.JaxRuntimeError, ValueError, NotImplementedError: as `dispatch`.
    """
    return combine_ordered(expert_out, handle, weights, config=config, after=after)[0]


def combine_ordered(expert_out, handle, weights=None, *, config, after=None):
    """`combine`, and the order edge that a later operation can take as `after`."""
    if isinstance(handle, PackedHandle):
        return packed.combine(expert_out, handle, weights, config, after)
    check_combine(expert_out, handle, weights, config)
    expert_ids, row_of, row_weights = handle
    spec = OpSpec(config, _order.next_ordinal("combine"), row_weights.shape[0])
    order = _order.edge(after)
    expert_out, expert_ids, row_of, row_weights = map(vary, (expert_out, expert_ids, row_of, row_weights))
    if weights is not None:
        row_weights, order = _route_weights(spec, vary(weights), expert_ids, row_of, order)
    return _combine(spec, expert_out, row_weights, expert_ids, row_of, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(spec: OpSpec, expert_out, row_weights, expert_ids, row_of, after):
    y, _, order = gather_rows(spec, expert_out, row_weights, None, expert_ids, row_of, after)
    return y, order


def _combine_fwd(spec, expert_out, row_weights, expert_ids, row_of, after):
    return _combine(spec, expert_out, row_weights, expert_ids, row_of, after), (
        expert_out,
        row_weights,
        expert_ids,
        row_of,
    )


def _combine_bwd(spec, residuals, cotangents):
    expert_out, row_weights, expert_ids, row_of = residuals
    d_y, d_order = cotangents
    rows, _, order = scatter_tokens(spec, d_y, None, expert_ids, row_of, d_order)
    rows = rows.astype(jnp.float32)
    d_out = (row_weights[:, None] * rows).astype(expert_out.dtype)
    d_weights = jnp.sum(rows * expert_out.astype(jnp.float32), axis=-1)
    return d_out, d_weights, None, None, order


_combine.defvjp(_combine_fwd, _combine_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route_weights(spec: OpSpec, weights, expert_ids, row_of, after):
    _, row_weights, order = scatter_tokens(spec, None, weights, expert_ids, row_of, after)
    return row_weights, order


def _route_weights_fwd(spec, weights, expert_ids, row_of, after):
    return _route_weights(spec, weights, expert_ids, row_of, after), (expert_ids, row_of)


def _route_weights_bwd(spec, residuals, cotangents):
    d_row_weights, d_order = cotangents
    expert_ids, row_of = residuals
    _, d_weights, order = gather_rows(
        spec, None, jnp.ones_like(d_row_weights), d_row_weights, expert_ids, row_of, d_order
    )
    return d_weights, None, None, order


_route_weights.defvjp(_route_weights_fwd, _route_weights_bwd)
