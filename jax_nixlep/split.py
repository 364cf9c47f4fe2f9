"""`dispatch` and `combine` in two halves, so that other work of the program runs while the tokens travel. CUDA only.

`*_start` makes this rank's part visible; it waits for peers at most until they have begun the operation before, or read
what was in the memory that it writes to. `*_finish` waits for the peers. Every member calls the same halves in the same
order; they may be in different programs. An operation that was started must be finished once, in the same epoch, and
before the second one after it begins, halves or not: there is memory for two.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_nixlep import _ffi, _order
from jax_nixlep._check import check_combine
from jax_nixlep._vary import vary
from jax_nixlep.config import EpConfig
from jax_nixlep.dispatch import OpSpec, dispatch_call, received, received_structs
from jax_nixlep.routing import Handle, Received


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["clean_ids", "invalid_ids", "ticket", "order"],
    meta_fields=["spec"],
)
@dataclasses.dataclass(frozen=True)
class PendingDispatch:
    """A dispatch that was started. Pass it to `dispatch_finish`, once; `order` can be `after=` of another operation."""

    spec: OpSpec
    clean_ids: jax.Array
    invalid_ids: jax.Array
    ticket: jax.Array
    order: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ticket", "order"], meta_fields=["spec", "num_tokens"]
)
@dataclasses.dataclass(frozen=True)
class PendingCombine:
    """A combine that was started. Pass it to `combine_finish`, once."""

    spec: OpSpec
    num_tokens: int
    ticket: jax.Array
    order: jax.Array


def dispatch_start(
    x: jax.Array,
    expert_ids: jax.Array,
    weights: jax.Array | None = None,
    *,
    config: EpConfig,
    scales: jax.Array | None = None,
    after: jax.Array | None = None,
    dequantize: bool = True,
    recv_capacity: int | None = None,
) -> PendingDispatch:
    """The sending half of `dispatch`; arguments and errors as there. Collective: every member must call. Not
    differentiable.

    Raises:
      NotImplementedError: when a program is compiled for CPUs.
    """
    spec, operands = dispatch_call(x, scales, expert_ids, weights, config, after, dequantize, recv_capacity)
    results = (
        _ffi.struct(expert_ids.shape, jnp.int32),  # clean ids
        _ffi.struct((), jnp.int32),  # invalid_ids
        _ffi.struct((2,), jnp.int32),  # ticket
        _ffi.struct((), jnp.float32),  # order
    )
    return PendingDispatch(spec, *_ffi.call("dispatch_start", results, *operands, **spec.attributes()))


def dispatch_finish(pending: PendingDispatch, *, after: jax.Array | None = None) -> Received:
    """The receiving half: what `dispatch` returns. Collective: every member must call."""
    spec, operands = pending.spec, (pending.ticket, _order.edge(after))
    out = _ffi.call("dispatch_finish", received_structs(spec), *operands, **spec.attributes())
    return received(out, pending.clean_ids, pending.invalid_ids)


def combine_start(
    expert_out: jax.Array, handle: Handle, *, config: EpConfig, after: jax.Array | None = None
) -> PendingCombine:
    """The sending half of `combine`, with the weights that `dispatch` got. Collective: every member must call. Not
    differentiable.

    Raises:
      NotImplementedError: when a program is compiled for CPUs.
    """
    check_combine(expert_out, handle, None, config)
    spec = OpSpec(config, _order.next_ordinal("combine"), handle.row_weights.shape[0])
    results = (_ffi.struct((2,), jnp.int32), _ffi.struct((), jnp.float32))  # ticket, order
    operands = (*map(vary, (expert_out, handle.row_weights, handle.row_of)), _order.edge(after))
    out = _ffi.call("combine_start", results, *operands, **spec.linear_attributes(False))
    return PendingCombine(spec, handle.expert_ids.shape[0], *out)


def combine_finish(pending: PendingCombine, *, after: jax.Array | None = None) -> jax.Array:
    """The receiving half: what `combine` returns. Collective: every member must call."""
    return combine_finish_ordered(pending, after=after)[0]


def combine_finish_ordered(pending, *, after=None):
    """`combine_finish`, and the order edge that a later operation can take as `after`."""
    config = pending.spec.config
    results = (_ffi.struct((pending.num_tokens, config.hidden), config.dtype), _ffi.struct((), jnp.float32))
    operands = (pending.ticket, _order.edge(after))
    return _ffi.call("combine_finish", results, *operands, **pending.spec.linear_attributes(False))
