"""The fp8 wire format: e4m3 values with one scale per 128 values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_nixlep.config import AMAX_FLOOR, QUANT_BLOCK, ScaleFormat

E4M3_MAX = float(jnp.finfo(jnp.float8_e4m3fn).max)


def quantize(x: jax.Array, *, scale_format: ScaleFormat, round_scale: bool) -> tuple[jax.Array, jax.Array]:
    """Quantises blocks of 128 values to float8_e4m3fn; the maths of NIXL-EP and DeepEP.

    With `amax = max(1e-4, max|x|)` of a block, all in float32:
      plain:       scale = 448 / amax,  scale_inv = amax * (1 / 448)
      round_scale: scale_inv = 2**ceil(log2(amax * (1 / 448))),  scale = 1 / scale_inv
      q = e4m3(clip(x * scale, -448, 448)), rounded to nearest even.

    Args:
      x: [..., H] floating point, H a multiple of 128.
      scale_format: "float32", or "ue8m0", which stores the exponent and needs `round_scale`.
      round_scale: round scales up to powers of two.

    Returns:
      q [..., H] float8_e4m3fn and scale_inv [..., H / 128], float32 or float8_e8m0fnu.

    Raises:
      ValueError: a wrong shape, dtype or scale format.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantize: x must be floating point; got {x.dtype.name}; cast the tokens")
    if x.ndim == 0 or x.shape[-1] % QUANT_BLOCK:
        raise ValueError(f"quantize: x must have a multiple of {QUANT_BLOCK} columns; got {x.shape}; pad the tokens")
    if scale_format not in ("float32", "ue8m0"):
        raise ValueError(
            f'quantize: scale_format must be "float32" or "ue8m0"; got {scale_format!r}; choose one of the two'
        )
    if scale_format == "ue8m0" and not round_scale:
        raise ValueError('quantize: round_scale must be True for scale_format="ue8m0"; got False; set it')
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // QUANT_BLOCK, QUANT_BLOCK)
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), np.float32(AMAX_FLOOR))
    scale_inv = amax * np.float32(1 / E4M3_MAX)
    if round_scale:
        bits = lax.bitcast_convert_type(scale_inv, jnp.uint32)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)  # biased by 127; scale_inv is never subnormal
        scale_inv = lax.bitcast_convert_type(exponent << 23, jnp.float32)
        scale = lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    else:
        scale = np.float32(E4M3_MAX) / amax
    q = jnp.clip(blocks * scale[..., None], -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn).reshape(x.shape)
    if scale_format == "ue8m0":
        return q, lax.bitcast_convert_type(exponent.astype(jnp.uint8), jnp.float8_e8m0fnu)
    return q, scale_inv


@jax.custom_jvp
def as_given(q: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens that a caller quantised, and their scales, ue8m0 as bytes; refuses to be differentiated."""
    return q, scales if scales.dtype == jnp.float32 else lax.bitcast_convert_type(scales, jnp.uint8)


@as_given.defjvp
def _refuse_gradient(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "dispatch: x and scales must not be differentiated when x is quantised; got a gradient through them; pass x in "
        "config.dtype, whose gradient goes straight through the rounding, or apply jax.lax.stop_gradient to both"
    )


def dequantize(q: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """float32(q) * scale_inv, cast to `dtype`.

    Args:
      q: [..., H] float8_e4m3fn.
      scales: [..., H / 128] float32 or float8_e8m0fnu, as from `quantize`.
      dtype: of the result.

    Raises:
      ValueError: shapes that do not belong together.
    """
    if scales.shape != (*q.shape[:-1], q.shape[-1] // QUANT_BLOCK) or q.shape[-1] % QUANT_BLOCK:
        raise ValueError(
            f"dequantize: scales must have one column per {QUANT_BLOCK} of q; got {scales.shape} for {q.shape}; "
            "pass both results of quantize"
        )
    blocks = q.astype(jnp.float32).reshape(*scales.shape, QUANT_BLOCK)
    return (blocks * scales.astype(jnp.float32)[..., None]).reshape(q.shape).astype(dtype)
