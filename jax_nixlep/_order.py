"""The order of operations in a program: its call numbers, and the edges that make it explicit.

XLA may run two operations without data between them in either order, or at once, and differently on each rank. So
each operation has a number, counted while the program is traced and carried by its messages: ranks that disagree find
out (ffi/runtime/endpoint.cc). And each operation returns a zero that a later one can take as `after=`. That zero is a
float, so that its cotangent orders the backward operations too, in reverse.
"""

from __future__ import annotations

import weakref

import jax
import jax.numpy as jnp
from jax._src import core as _core  # no public name for the stack of traces

from jax_nixlep._vary import vary

_counts: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()


def next_ordinal(op: str) -> int:
    """The number of this call of `op` within the program being traced; 0 where each operation is its own program.

    Raises:
      NotImplementedError: under vmap: a batch of exchanges has no meaning of its own.
    """
    stack = _core.unsafe_get_trace_stack(_core.trace_ctx.trace)
    kinds = [type(trace).__name__ for trace in stack]
    if "BatchTrace" in kinds:
        raise NotImplementedError(
            f"{op}: must not be called under vmap; got a batched call; fold the batch into tokens"
        )
    if "DynamicJaxprTrace" not in kinds:
        return 0
    program = stack[kinds.index("DynamicJaxprTrace")]
    _counts[program] = ordinal = _counts.get(program, 0) + 1
    return ordinal


def edge(after: jax.Array | None) -> jax.Array:
    """The operand that orders an operation after whatever made `after`: one float32 value, its content unused."""
    if after is None or after.size == 0:
        return vary(jnp.zeros((), jnp.float32))
    return vary(after.reshape(-1)[0].astype(jnp.float32))
