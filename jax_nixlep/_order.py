"""The order of operations in a program: its call numbers, and the edges that make it explicit.

XLA may run two operations without data between them in either order, or at once, and differently on each rank. So
each operation has a number, carried by its messages: ranks that disagree find out (ffi/runtime/endpoint.cc). And each
operation returns a zero that a later one can take as `after=`. That zero is a float, so that its cotangent orders the
backward operations too, in reverse.

An operation and its gradient share the number that the process gives each call when it is traced. What JAX keeps of a
trace (the body of a scan) may be part of another program later, so programs count anew, when they are lowered, in the
order in which calls first appear: equal programs have equal numbers, whatever was traced before.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import core as _core  # no public name for the stack of traces

from jax_nixlep._vary import vary

_calls = itertools.count(1)


def number_in_program(module_context: Any, ordinal: int) -> int:
    """The number, from 1, of a traced call in the program that is lowered; 0 stays 0."""
    # The one thing that JAX keeps for as long as it lowers a program, and where others' keys do no harm.
    numbers = module_context.cached_primitive_lowerings.setdefault(number_in_program, {})
    return numbers.setdefault(ordinal, len(numbers) + 1) if ordinal else 0


def next_ordinal(op: str) -> int:
    """The number of this call of `op`, in this process; 0 where each operation is its own program.

    Raises:
      NotImplementedError: under vmap: a batch of exchanges has no meaning of its own.
    """
    stack = _core.unsafe_get_trace_stack(_core.trace_ctx.trace)
    kinds = [type(trace).__name__ for trace in stack]
    if "BatchTrace" in kinds:
        raise NotImplementedError(
            f"{op}: must not be called under vmap; got a batched call; fold the batch into tokens"
        )
    return next(_calls) if "DynamicJaxprTrace" in kinds else 0


def edge(after: jax.Array | None) -> jax.Array:
    """The operand that orders an operation after whatever made `after`: one float32 value, its content unused."""
    if after is None or after.size == 0:
        return vary(jnp.zeros((), jnp.float32))
    return vary(after.reshape(-1)[0].astype(jnp.float32))
