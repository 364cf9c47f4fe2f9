"""The experts' MLP on the packed rows that `dispatch` returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nixlep._vary import vary_alike

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,  # tanh approximation
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU:
    """The gated activation of gpt-oss: `g * sigmoid(alpha * g) * (u + 1)` of clamped g and u.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, `swiglu`. Equal values are equal activations, so that programs which
    take one as a static argument are compiled once.

    Attributes:
      alpha: gain of the sigmoid.
      limit: the gate is clamped from above, the up projection on both sides.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


# On CPU ragged_dot multiplies every row with every expert and reserves memory to match; the loop below touches only the
# blocks that hold rows. This MLP on two cores, jax 0.10.2, milliseconds, forward / forward + backward, E = 8:
#   rows (used)  H     F     dtype     ragged_dot   blocks of 64   blocks of 128
#   4096 (1024)  2048  1024  bfloat16  793 / 4156     136 / 576      125 / 503
#   2048 (2048)   256   512  float32    79 /  246      17 /  70       14 /  56
#   2048  (512)   256   512  float32    57 /  247       6 /  31        8 /  35
_BLOCK_ROWS = 64


def grouped_mlp(
    tokens: jax.Array,
    group_sizes: jax.Array,
    wi_0: jax.Array,
    wi_1: jax.Array | None,
    wo: jax.Array,
    *,
    activation: str | Callable[..., jax.Array] = "silu",
    bi_0: jax.Array | None = None,
    bi_1: jax.Array | None = None,
    bo: jax.Array | None = None,
) -> jax.Array:
    """Each expert's MLP on its rows: `(act(x @ wi_0 + bi_0) * (x @ wi_1 + bi_1)) @ wo + bo`.

    Without `wi_1`: `act(x @ wi_0 + bi_0) @ wo + bo`. Products accumulate in float32, weights are cast
    to the tokens' dtype, the activation is float32, the hidden values are cast to the tokens' dtype.

    Args:
      tokens: [C, H], expert-major rows as in `Received.tokens`.
      group_sizes: [E] int32, rows of each expert; their sum is at most C.
      wi_0, wi_1: [E, H, F], gate and up projection; `wi_1` None for an MLP that is not gated.
      wo: [E, F, H], down projection.
      activation: "silu", "gelu" (tanh approximation), "relu", or a function of float32 arrays:
        `f(gate, up)` when `wi_1` is given, as `ClampedSwiGLU`, else `f(hidden)`.
      bi_0, bi_1: [E, F] or None; bo: [E, H] or None.

    Returns:
      [C, H] in the tokens' dtype. Rows past `sum(group_sizes)` are zero and get no gradient.

    Raises:
      ValueError: shapes that do not belong together, group_sizes not int32, an unknown activation.
    """
    if tokens.ndim != 2 or wi_0.ndim != 3:
        raise ValueError(
            "grouped_mlp: tokens, wi_0 must be [C, H], [E, H, F]; "
            f"got {tokens.shape}, {wi_0.shape}; pass the rows of dispatch"
        )
    (rows, hidden), (experts, _, features) = tokens.shape, wi_0.shape
    shapes: tuple[tuple[str, jax.Array | None, tuple[int, ...]], ...] = (
        ("group_sizes", group_sizes, (experts,)),
        ("wi_0", wi_0, (experts, hidden, features)),
        ("wi_1", wi_1, (experts, hidden, features)),
        ("wo", wo, (experts, features, hidden)),
        ("bi_0", bi_0, (experts, features)),
        ("bi_1", bi_1, (experts, features)),
        ("bo", bo, (experts, hidden)),
    )
    for name, value, shape in shapes:
        if value is not None and value.shape != shape:
            raise ValueError(f"grouped_mlp: {name} must have shape {shape}; got {value.shape}; stack it per expert")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"grouped_mlp: group_sizes must be int32; got {group_sizes.dtype}; pass those of dispatch")
    if bi_1 is not None and wi_1 is None:
        raise ValueError("grouped_mlp: bi_1 must be None without wi_1; got an array; give wi_1 too")
    if isinstance(activation, str) and activation not in _ACTIVATIONS:
        raise ValueError(
            f"grouped_mlp: activation must be one of {sorted(_ACTIVATIONS)} or a function; got {activation!r}; "
            "pass the function itself"
        )

    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows)
    used = (row < ends[-1])[:, None]
    expert_of_row = jnp.minimum(jnp.searchsorted(ends, row, side="right"), experts - 1)

    def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = _grouped_dot(jnp.where(used, x, 0), weight.astype(x.dtype), group_sizes)
        if bias is not None:
            y = y + jnp.asarray(bias, jnp.float32)[expert_of_row]
        return jnp.where(used, y, 0)  # also keeps what ragged_dot leaves in unused rows out of the gradient

    gate = linear(tokens, wi_0, bi_0)
    act: Callable[..., jax.Array] = _ACTIVATIONS[activation] if isinstance(activation, str) else activation
    if wi_1 is None:
        inner = act(gate)
    else:
        up = linear(tokens, wi_1, bi_1)
        inner = act(gate) * up if isinstance(activation, str) else act(gate, up)
    return linear(inner.astype(tokens.dtype), wo, bo).astype(tokens.dtype)


def _grouped_dot(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """[C, K] rows times their expert's [K, N] of [E, K, N] -> [C, N] float32; unused rows are undefined."""
    lhs, rhs, group_sizes = vary_alike(lhs, rhs, group_sizes)
    return lax.platform_dependent(
        lhs,
        rhs,
        group_sizes,
        cpu=_block_dot,
        default=lambda x, w, sizes: lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32),
    )


def _for_blocks(group_sizes: jax.Array, block: int, body: Callable[..., jax.Array], init: jax.Array) -> jax.Array:
    """Loops over the blocks of rows that hold any, in order: carry = body(carry, expert, first row, end of expert)."""
    ends = jnp.cumsum(group_sizes)
    blocks = (group_sizes + block - 1) // block
    block_ends = jnp.cumsum(blocks)

    def step(i: jax.Array, carry: jax.Array) -> jax.Array:
        e = jnp.searchsorted(block_ends, i, side="right")
        first = ends[e] - group_sizes[e] + (i - block_ends[e] + blocks[e]) * block
        return body(carry, e, first, ends[e])

    return lax.fori_loop(0, block_ends[-1], step, vary_alike(init, group_sizes)[0])


@jax.custom_vjp
def _block_dot(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    rows, block = lhs.shape[0], min(_BLOCK_ROWS, lhs.shape[0])
    padded = jnp.pad(lhs, ((0, block), (0, 0)))  # a last block may reach past the last row

    def body(out: jax.Array, e: jax.Array, first: jax.Array, _: jax.Array) -> jax.Array:
        x, w = (lax.dynamic_slice_in_dim(padded, first, block), lax.dynamic_index_in_dim(rhs, e, keepdims=False))
        y = jnp.dot(x, w, preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(out, y, first, 0)  # rows past the expert's end: overwritten later

    return _for_blocks(group_sizes, block, body, jnp.zeros((rows + block, rhs.shape[2]), jnp.float32))[:rows]


def _block_dot_fwd(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    return _block_dot(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _block_dot_bwd(residuals: tuple[Any, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    lhs, rhs, group_sizes = residuals
    dy = dy.astype(lhs.dtype)
    block = min(_BLOCK_ROWS, lhs.shape[0])
    x_padded, dy_padded = (jnp.pad(a, ((0, block), (0, 0))) for a in (lhs, dy))

    def body(out: jax.Array, e: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
        mine = (first + jnp.arange(block) < end)[:, None]
        x = jnp.where(mine, lax.dynamic_slice_in_dim(x_padded, first, block), 0)
        g = jnp.where(mine, lax.dynamic_slice_in_dim(dy_padded, first, block), 0)
        d = lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return lax.dynamic_update_index_in_dim(out, lax.dynamic_index_in_dim(out, e, keepdims=False) + d, e, 0)

    d_rhs = _for_blocks(group_sizes, block, body, jnp.zeros(rhs.shape, jnp.float32))
    return (_block_dot(dy, rhs.swapaxes(1, 2), group_sizes).astype(lhs.dtype), d_rhs.astype(rhs.dtype), None)


_block_dot.defvjp(_block_dot_fwd, _block_dot_bwd)
