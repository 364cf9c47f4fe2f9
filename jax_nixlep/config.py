"""`EpConfig`: the capacities that fix every shape of an expert-parallel program."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jax_nixlep._ffi import AMAX_FLOOR as AMAX_FLOOR
from jax_nixlep._ffi import QUANT_BLOCK as QUANT_BLOCK

Wire = Literal["same", "bf16", "fp8_e4m3"]
ScaleFormat = Literal["float32", "ue8m0"]

ROW_ALIGN_BYTES = 16  # a token must be whole 16-byte vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpConfig:
    """Capacities of an expert-parallel group. Frozen and hashable: pass it as a static argument.

    Every array shape follows from these numbers and none from the membership, so a program compiled
    once serves every membership of the group. All members must use equal configs.

    Attributes:
      max_ranks: ranks the group can ever have (R).
      experts_per_rank: physical expert slots on each rank (E).
      max_tokens_per_rank: tokens a rank may bring to one call (T).
      hidden: values per token (H); `hidden` times the item size must be a multiple of 16 bytes.
      top_k: experts per token (K).
      dtype: float32, bfloat16 or float16; the type of tokens, expert outputs and results.
      wire: what travels in `dispatch`: "same" (dtype), "bf16", or "fp8_e4m3" with one scale per 128
        values. `combine` and both gradients travel as "same", or as bf16 when `wire` is narrower.
      scale_format: of the fp8 scales: "float32", or "ue8m0" (power-of-two exponents, one byte).
      round_scale: round fp8 scales up to powers of two; "ue8m0" implies it.
      recv_capacity: rows `dispatch` returns (C); None = `worst_case_rows()`, which never drops.
    """

    max_ranks: int
    experts_per_rank: int
    max_tokens_per_rank: int
    hidden: int
    top_k: int
    dtype: Any = jnp.bfloat16
    wire: Wire = "same"
    scale_format: ScaleFormat = "float32"
    round_scale: bool = False
    recv_capacity: int | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, must: str, remedy: str) -> None:
            if not ok:
                raise ValueError(f"EpConfig: {name} must {must}; got {getattr(self, name)!r}; {remedy}")

        for name in ("max_ranks", "experts_per_rank", "max_tokens_per_rank", "hidden", "top_k"):
            value = getattr(self, name)
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            require(whole and value > 0, name, "be a positive int", "give the capacity of the group")
            object.__setattr__(self, name, int(value))
        with contextlib.suppress(TypeError):  # refused by name below
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        require(
            self.dtype in (jnp.float32, jnp.bfloat16, jnp.float16),
            "dtype",
            "be float32, bfloat16 or float16",
            "cast the tokens before dispatch",
        )
        require(
            self.wire in ("same", "bf16", "fp8_e4m3"),
            "wire",
            'be "same", "bf16" or "fp8_e4m3"',
            "choose one of the three",
        )
        require(
            self.scale_format in ("float32", "ue8m0"),
            "scale_format",
            'be "float32" or "ue8m0"',
            "choose one of the two",
        )
        if self.scale_format == "ue8m0":
            object.__setattr__(self, "round_scale", True)
        require(
            self.hidden * self.dtype.itemsize % ROW_ALIGN_BYTES == 0,
            "hidden",
            f"be a multiple of {ROW_ALIGN_BYTES // self.dtype.itemsize} for {self.dtype.name}",
            f"pad the tokens to whole {ROW_ALIGN_BYTES}-byte vectors",
        )
        require(
            self.wire != "fp8_e4m3" or self.hidden % QUANT_BLOCK == 0,
            "hidden",
            f"be a multiple of {QUANT_BLOCK} for wire='fp8_e4m3'",
            'pad the tokens or use wire="bf16"',
        )
        if self.recv_capacity is not None:
            require(
                isinstance(self.recv_capacity, (int, np.integer)) and self.recv_capacity > 0,
                "recv_capacity",
                "be a positive int or None",
                "use None to never drop a token",
            )
            object.__setattr__(self, "recv_capacity", int(self.recv_capacity))

    @property
    def num_slots(self) -> int:
        """Physical expert slots of the whole group: `max_ranks * experts_per_rank`."""
        return self.max_ranks * self.experts_per_rank

    def worst_case_rows(self, tokens_per_rank: int | None = None) -> int:
        """Rows one rank can receive at most when every rank brings `tokens_per_rank` tokens.

        A token gives at most one row to each local expert and has `top_k` choices, hence
        `max_ranks * tokens * min(top_k, experts_per_rank)`.
        """
        tokens = self.max_tokens_per_rank if tokens_per_rank is None else tokens_per_rank
        return self.max_ranks * tokens * min(self.top_k, self.experts_per_rank)

    @property
    def num_rows(self) -> int:
        """Rows `dispatch` returns: `recv_capacity`, or the worst case."""
        return self.worst_case_rows() if self.recv_capacity is None else self.recv_capacity

    @property
    def token_wire(self) -> Wire:
        """How tokens travel; "bf16" tokens in bfloat16 are "same"."""
        return "same" if self.wire == "bf16" and self.dtype == jnp.bfloat16 else self.wire

    @property
    def sum_wire(self) -> Wire:
        """How `combine` and the gradients travel: never quantised to fp8."""
        return "same" if self.wire == "same" or self.dtype == jnp.bfloat16 else "bf16"

    @property
    def scale_dtype(self) -> Any:
        """Of the fp8 scales that `dispatch` takes with quantised tokens, and returns with `dequantize=False`."""
        return jnp.dtype(jnp.float8_e8m0fnu if self.scale_format == "ue8m0" else jnp.float32)

    @property
    def row_bytes(self) -> int:
        """Bytes of the widest row that travels; fp8 values and scales are narrower than the bfloat16 sums."""
        return self.hidden * (self.dtype.itemsize if self.wire == "same" else 2)
