"""What a Hugging Face `config.json` says of a model, in the terms of this decoder: one dataclass for all families."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax_nixlep as nx

MAX_SIZE = 1 << 24  # of any one dimension or count in a config: what is larger is a damaged file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding.

    Attributes:
      dim: rotated values of a head.
      interleaved: pairs are (0, 1), (2, 3), ...; else (0, dim / 2), (1, dim / 2 + 1), ...
      factor: > 1: frequencies are interpolated by YaRN (arXiv:2309.00071) from `original_length` on.
      magnitude: of the rotated vectors (YaRN's attention factor).
    """

    dim: int
    theta: float
    interleaved: bool = False
    factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1); query_rank 0: none."""

    query_rank: int
    rank: int
    plain_dim: int  # values of a query or key head that are not rotated
    value_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model. Nothing in here depends on where it runs.

    Attributes:
      family: `model_type` of the config.
      head_dim: of queries and keys.
      attention_scale: multiplies query @ key.
      windows: for each layer the tokens that a token attends to, itself included; None = all.
      qk_norm: RMS norm of queries and keys: of each "head", or of "all" heads as one vector.
      moe_layers: for each layer, whether it has experts; the others have an MLP of `mlp_dim`.
      shared_dim: hidden size of the expert that every token visits; 0 = none.
      max_length: the longest sequence the model was made for.
      dtype: of the checkpoint's parameters once dequantised.
      quantization: "fp8": matrices in float8 with a scale for each block; "mxfp4": experts in 4 bits.
    """

    family: str
    vocab_size: int
    hidden: int
    layers: int
    norm_eps: float
    heads: int
    kv_heads: int
    head_dim: int
    attention_scale: float
    rope: Rope
    windows: tuple[int | None, ...]
    moe_layers: tuple[bool, ...]
    router: nx.Router
    expert_dim: int
    mlp_dim: int = 0
    shared_dim: int = 0
    attention_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    clip_qkv: float | None = None
    sinks: bool = False
    latent: Latent | None = None
    activation: str | Callable[..., Any] = "silu"
    expert_bias: bool = False
    gate_bias: bool = False
    score_bias: bool = False
    tie_embeddings: bool = False
    eos_ids: frozenset[int] = frozenset()
    max_length: int = 0
    dtype: str = "float32"
    quantization: Literal["fp8", "mxfp4"] | None = None
    block: tuple[int, int] = (128, 128)


class Fields:
    """The values of a JSON file, checked as they are taken."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def fail(self, name: str, must: str, remedy: str = "correct the file") -> ValueError:
        return ValueError(f"load: {name} in {self.path} must {must}; got {self.values.get(name)!r}; {remedy}")

    def size(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of things."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_SIZE:
            raise self.fail(name, f"be a whole number from {least} to {MAX_SIZE}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise self.fail(name, "be a positive number")
        return float(value)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"load: {path} must exist; got no such file; give the folder of a Hugging Face checkpoint"
        ) from None
    except ValueError as error:
        raise ValueError(f"load: {path} must be JSON; got {error}; download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"load: {path} must be a JSON object; got {type(value).__name__}; download it again")
    return value


def read_config(folder: Path) -> ModelConfig:
    """
    Raises:
      FileNotFoundError, ValueError: names the file, the field and what to do.
    """
    fields = Fields(folder / "config.json", read_json(folder / "config.json"))
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise fields.fail("model_type", f"be one of {sorted(FAMILIES)}", "use a model of these families")
    if fields.get("hidden_act", "silu") != "silu":
        raise fields.fail("hidden_act", 'be "silu"', "no model of these families has another")
    config = ModelConfig(**_common(fields) | FAMILIES[family](fields))
    if config.heads % config.kv_heads:
        raise fields.fail("num_key_value_heads", f"divide num_attention_heads = {config.heads}")
    if not len(config.windows) == len(config.moe_layers) == config.layers:
        raise fields.fail("layer_types", f"have one entry for each of {config.layers} layers")
    return config


# --- What the families have in common. ---


def _common(f: Fields) -> dict[str, Any]:
    heads, hidden, layers = f.size("num_attention_heads"), f.size("hidden_size"), f.size("num_hidden_layers")
    head_dim = f.size("head_dim", hidden // heads)
    eos = _eos(f)
    window = f.size("sliding_window") if f.get("sliding_window") and f.get("use_sliding_window", True) else None
    quantization, block = _quantization(f)
    return {
        "family": f.get("model_type"),
        "vocab_size": f.size("vocab_size"),
        "hidden": hidden,
        "layers": layers,
        "norm_eps": f.real("rms_norm_eps"),
        "heads": heads,
        "kv_heads": f.size("num_key_value_heads", heads),
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        "rope": _rope(f, head_dim),
        "windows": (window,) * layers,
        "moe_layers": (True,) * layers,
        "attention_bias": bool(f.get("attention_bias", False)),
        "tie_embeddings": bool(f.get("tie_word_embeddings", False)),
        "eos_ids": eos,
        "max_length": f.size("max_position_embeddings"),
        "dtype": f.get("dtype", f.get("torch_dtype", "float32")),
        "quantization": quantization,
        "block": block,
    }


def _eos(f: Fields) -> frozenset[int]:
    """`generation_config.json`, where there is one, knows more ids that end a text than `config.json`."""
    path = f.path.with_name("generation_config.json")
    value = read_json(path).get("eos_token_id") if path.exists() else None
    value = f.get("eos_token_id", []) if value is None else value
    return frozenset(value if isinstance(value, list) else [value])


def _quantization(f: Fields) -> tuple[Any, tuple[int, int]]:
    method = f.get("quantization_config", {}).get("quant_method")
    if method not in (None, "fp8", "mxfp4"):
        raise f.fail("quantization_config", 'have quant_method "fp8" or "mxfp4", or none', "use the original weights")
    block = f.get("quantization_config", {}).get("weight_block_size") or (128, 128)
    if len(block) != 2 or not all(isinstance(n, int) and 0 < n <= MAX_SIZE for n in block):
        raise f.fail("quantization_config", "have a weight_block_size of two positive numbers")
    return method, tuple(block)


def _rope(f: Fields, dim: int, *, interleaved: bool = False) -> Rope:
    """From `rope_parameters`, or `rope_theta` and `rope_scaling` of older files."""
    values = f.get("rope_parameters") or {"rope_theta": f.get("rope_theta", 10_000.0)} | f.get("rope_scaling", {})
    p = Fields(f.path, {"rope_theta": f.get("rope_theta", 10_000.0)} | values)
    kind = p.get("rope_type", p.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f'load: rope_type in {f.path} must be "default" or "yarn"; got {kind!r}; use another model')
    plain = Rope(dim=dim, theta=p.real("rope_theta"), interleaved=interleaved)
    if kind == "default":
        return plain
    factor = p.real("factor")
    magnitude = p.get("attention_factor")
    if magnitude is None:
        whole, part = p.get("mscale"), p.get("mscale_all_dim")
        magnitude = (
            yarn_magnitude(factor, whole) / yarn_magnitude(factor, part) if whole and part else yarn_magnitude(factor)
        )
    return dataclasses.replace(
        plain,
        factor=factor,
        original_length=p.size("original_max_position_embeddings", f.get("max_position_embeddings")),
        beta_fast=p.real("beta_fast", 32.0),
        beta_slow=p.real("beta_slow", 1.0),
        truncate=bool(p.get("truncate", True)),
        magnitude=float(magnitude),
    )


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN (arXiv:2309.00071, section 3.4): 0.1 ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


# --- The families: what differs from the above. ---


def _mixtral(f: Fields) -> dict[str, Any]:
    return {"router": _router(f, "num_local_experts"), "expert_dim": f.size("intermediate_size")}


def _qwen3_moe(f: Fields) -> dict[str, Any]:
    step, plain = f.size("decoder_sparse_step", 1), set(f.get("mlp_only_layers", []))
    layers = range(f.size("num_hidden_layers"))
    return {
        "router": _router(f, "num_experts", normalize=bool(f.get("norm_topk_prob", False))),
        "expert_dim": f.size("moe_intermediate_size"),
        "mlp_dim": f.size("intermediate_size"),
        "moe_layers": tuple(i not in plain and (i + 1) % step == 0 for i in layers),
        "qk_norm": "head",
        # Off unless asked for, other than in Mixtral.
        "windows": (f.size("sliding_window") if f.get("use_sliding_window", False) else None,) * len(layers),
    }


def _olmoe(f: Fields) -> dict[str, Any]:
    return {
        "router": _router(f, "num_experts", normalize=bool(f.get("norm_topk_prob", False))),
        "expert_dim": f.size("intermediate_size"),
        "qk_norm": "all",
        "clip_qkv": f.real("clip_qkv") if f.get("clip_qkv") is not None else None,
    }


def _deepseek_v3(f: Fields) -> dict[str, Any]:
    rope_dim, plain_dim = f.size("qk_rope_head_dim"), f.size("qk_nope_head_dim")
    rope = _rope(f, rope_dim, interleaved=bool(f.get("rope_interleave", True)))
    expert_dim, layers = f.size("moe_intermediate_size"), f.size("num_hidden_layers")
    first = f.size("first_k_dense_replace", 0, least=0)
    # Longer contexts sharpen the scores (DeepSeek-V3's own inference code, model.py, `mscale`).
    values = f.get("rope_parameters") or f.get("rope_scaling", {})
    sharpen = yarn_magnitude(rope.factor, values.get("mscale_all_dim") or 0.0) ** 2
    return {
        "router": _router(
            f,
            "n_routed_experts",
            score="sigmoid",
            normalize=bool(f.get("norm_topk_prob", True)),
            scale=f.real("routed_scaling_factor", 1.0),
            num_groups=f.size("n_group", 1),
            top_k_groups=f.size("topk_group", 1),
        ),
        "score_bias": True,
        "expert_dim": expert_dim,
        "mlp_dim": f.size("intermediate_size"),
        "shared_dim": expert_dim * f.size("n_shared_experts", 0, least=0),
        "moe_layers": tuple(i >= first for i in range(layers)),
        "head_dim": plain_dim + rope_dim,
        "kv_heads": f.size("num_attention_heads"),
        "attention_scale": (plain_dim + rope_dim) ** -0.5 * sharpen,
        "rope": rope,
        "latent": Latent(
            query_rank=f.size("q_lora_rank", 0, least=0),
            rank=f.size("kv_lora_rank"),
            plain_dim=plain_dim,
            value_dim=f.size("v_head_dim"),
        ),
    }


def _gpt_oss(f: Fields) -> dict[str, Any]:
    layers, window = f.size("num_hidden_layers"), f.size("sliding_window", 128)
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    kinds = f.get("layer_types", alternating)
    if not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise f.fail("layer_types", 'hold "sliding_attention" and "full_attention" only')
    return {
        "router": _router(f, "num_local_experts"),
        "gate_bias": True,
        "expert_bias": True,
        "attention_bias": bool(f.get("attention_bias", True)),
        "expert_dim": f.size("intermediate_size"),
        "activation": nx.ClampedSwiGLU(f.real("swiglu_alpha", 1.702), f.real("swiglu_limit", 7.0)),
        "sinks": True,
        "windows": tuple(window if kind == "sliding_attention" else None for kind in kinds),
    }


def _router(f: Fields, experts: str, **options: Any) -> nx.Router:
    # Some writers use one name for all families.
    count = f.size(experts, f.get("num_local_experts", f.get("num_experts")))
    try:
        return nx.Router(num_experts=count, top_k=f.size("num_experts_per_tok"), **options)
    except ValueError as error:
        raise ValueError(f"load: the routing of {f.path} is refused: {error}") from None


FAMILIES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
