"""What `dispatch` and `combine` refuse at trace time; the same for every backend."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_nixlep.config import QUANT_BLOCK, EpConfig
from jax_nixlep.routing import Handle


def check_dispatch(
    x: Any, scales: Any, expert_ids: Any, weights: Any, config: EpConfig, dequantize: bool, recv_capacity: int | None
) -> None:
    """Refuses at trace time what `dispatch` cannot take."""
    tokens, k = x.shape[0] if x.ndim else 0, config.top_k
    if tokens > config.max_tokens_per_rank:
        raise ValueError(
            f"dispatch: x must have at most max_tokens_per_rank={config.max_tokens_per_rank} tokens; got {tokens}; "
            "dispatch in chunks or raise max_tokens_per_rank"
        )
    if scales is None and x.dtype == jnp.float8_e4m3fn:
        raise ValueError("dispatch: scales must be given for an x of float8_e4m3fn; got None; pass those of quantize")
    if scales is None:
        check_array("dispatch", "x", x, (tokens, config.hidden), config.dtype)
    else:
        _check_quantized(x, scales, (tokens, config.hidden), config)
    check_array("dispatch", "expert_ids", expert_ids, (tokens, k), jnp.int32)
    if weights is not None:
        check_array("dispatch", "weights", weights, (tokens, k), jnp.float32)
    if not dequantize and config.wire != "fp8_e4m3":
        raise ValueError(f'dispatch: dequantize must be True for wire="{config.wire}"; got False; leave it out')
    if recv_capacity is not None and not (isinstance(recv_capacity, (int, np.integer)) and recv_capacity > 0):
        raise ValueError(
            f"dispatch: recv_capacity must be a positive int or None; got {recv_capacity!r}; use None for the config's"
        )


def _check_quantized(x: Any, scales: Any, shape: tuple[int, int], config: EpConfig) -> None:
    if config.wire != "fp8_e4m3":
        raise ValueError(
            f'dispatch: scales must be None for wire="{config.wire}"; got {scales.dtype} {list(scales.shape)}; '
            'use EpConfig(wire="fp8_e4m3")'
        )
    check_array("dispatch", "x", x, shape, jnp.float8_e4m3fn, "quantise it, or leave scales out")
    as_bytes = config.scale_format == "ue8m0" and scales.dtype == jnp.uint8
    check_array(
        "dispatch",
        "scales",
        scales,
        (shape[0], shape[1] // QUANT_BLOCK),
        jnp.uint8 if as_bytes else config.scale_dtype,
        "quantise with the config's scale_format",
    )


def check_combine(expert_out: Any, handle: Handle, weights: Any, config: EpConfig) -> None:
    """Refuses at trace time what `combine` cannot take."""
    if not isinstance(handle, Handle):
        raise TypeError(f"combine: handle must be a Handle; got {type(handle).__name__}; pass received.handle")
    tokens, k = handle.expert_ids.shape
    shape = (config.max_ranks, config.max_tokens_per_rank, k)
    check_array("combine", "handle.row_of", handle.row_of, shape, jnp.int32)
    check_array("combine", "expert_out", expert_out, (handle.row_weights.shape[0], config.hidden), config.dtype)
    if weights is not None:
        check_array("combine", "weights", weights, (tokens, k), jnp.float32)


def check_array(
    op: str,
    name: str,
    value: Any,
    shape: tuple[int, ...],
    dtype: Any,
    remedy: str = "cast or reshape it, or change EpConfig",
) -> None:
    """Refuses an argument of `op` that is not of this shape and dtype."""
    if value.shape != shape or value.dtype != dtype:
        raise ValueError(
            f"{op}: {name} must be {jnp.dtype(dtype).name} {list(shape)}; got {value.dtype} {list(value.shape)}; "
            f"{remedy}"
        )
