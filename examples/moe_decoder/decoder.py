"""The decoder: embedding, layers of attention and of experts (or one MLP), norm, output."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nixlep as nx
from jax_nixlep.flax.nnx import NixlEpMoE, logical_axis_rules
from jax_nixlep.moe import Backend
from moe_decoder.attention import Attention, Cache, LatentAttention, Where, cache_shapes, rms_norm
from moe_decoder.config import ModelConfig

Rules = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the model runs. Hashable.

    Attributes:
      mesh: global arrays over a mesh with an axis "ep"; None: this process is a rank by itself.
      tensor_axis: mesh axis that splits attention heads, the vocabulary and the MLPs, instead of the tokens.
      backend: see `nixlep_moe`.
      dtype: of parameters, cache and all values between layers.
    """

    mesh: jax.sharding.Mesh | None = None
    tensor_axis: str | None = None
    backend: Backend = "native"
    dtype: str = "float32"

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes over which rows of a batch are spread."""
        return tuple(name for name in self.mesh.axis_names if name != self.tensor_axis) if self.mesh else ()

    def rules(self, config: ModelConfig) -> Rules:
        """Logical axis names -> mesh axes. What the tensor axis does not divide is whole everywhere."""
        size = self.mesh.shape[self.tensor_axis] if self.mesh and self.tensor_axis else 1
        split = {"heads": config.heads, "kv_heads": config.kv_heads, "vocab": config.vocab_size}
        mine = tuple((name, None if count % size else self.tensor_axis) for name, count in split.items())
        return logical_axis_rules("ep", self.tensor_axis) + mine

    def spread(self, x: jax.Array) -> jax.Array:
        """x [B, ...] with its rows over the token axes."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(self.token_axes)))


class Mlp(nnx.Module):
    """The gated MLP of a layer without experts."""

    def __init__(self, config: ModelConfig, make: Any):
        self.gate_proj = make((config.hidden, config.mlp_dim), ("embed", "mlp"))
        self.up_proj = make((config.hidden, config.mlp_dim), ("embed", "mlp"))
        self.down_proj = make((config.mlp_dim, config.hidden), ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ self.gate_proj[...]) * (x @ self.up_proj[...])) @ self.down_proj[...]


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, i: int, ep: nx.EpConfig, layout: Layout, make: Any, rngs: nnx.Rngs):
        self.eps = config.norm_eps
        self.input_layernorm = make((config.hidden,), ("embed",))
        attention = LatentAttention if config.latent else Attention
        self.self_attn = attention(config, config.windows[i], make)
        self.post_attention_layernorm = make((config.hidden,), ("embed",))
        if not config.moe_layers[i]:
            self.mlp = Mlp(config, make)
            return
        self.moe = NixlEpMoE(
            ep,
            config.router,
            config.expert_dim,
            shared_mlp_dim=config.shared_dim,
            activation=config.activation,
            use_bias=config.expert_bias,
            use_gate_bias=config.gate_bias,
            use_score_bias=config.score_bias,
            param_dtype=layout.dtype,
            mesh=layout.mesh,
            rank=0,  # whose experts these are is for the caller to say: `forward` gets them as arguments
            tensor_axis=layout.tensor_axis,
            backend=layout.backend,
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, where: Where, cache: Cache, placement: nx.Placement | None
    ) -> tuple[jax.Array, Cache]:
        y, cache = self.self_attn(rms_norm(x, self.input_layernorm[...], self.eps), where, cache)
        x = x + y
        y = rms_norm(x, self.post_attention_layernorm[...], self.eps)
        if hasattr(self, "mlp"):
            return x + self.mlp(y), cache
        return x + self.moe(y, token_mask=where.live, placement=placement)[0].astype(x.dtype), cache


class Decoder(nnx.Module):
    """Tokens in, logits of the next token out."""

    def __init__(self, config: ModelConfig, ep: nx.EpConfig, layout: Layout, rngs: nnx.Rngs):
        self.config, self.layout = config, layout

        def make(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
            init = nnx.initializers.lecun_normal() if len(shape) > 1 else nnx.initializers.ones
            metadata = {"out_sharding": axes, "sharding_rules": layout.rules(config), "eager_sharding": False}
            if layout.mesh is not None:
                metadata |= {"eager_sharding": True, "mesh": layout.mesh}
            return nnx.Param(init(rngs.params(), shape, layout.dtype), **metadata)

        self.embed_tokens = make((config.vocab_size, config.hidden), ("vocab", "embed"))
        self.layers = nnx.List([Layer(config, i, ep, layout, make, rngs) for i in range(config.layers)])
        self.norm = make((config.hidden,), ("embed",))
        if not config.tie_embeddings:
            self.lm_head = make((config.hidden, config.vocab_size), ("embed", "vocab"))

    def __call__(
        self,
        tokens: jax.Array,
        where: Where,
        last: jax.Array,
        cache: list[Cache],
        placement: nx.Placement | None = None,
    ) -> tuple[jax.Array, list[Cache]]:
        """
        Args:
          tokens: [B, S] int32.
          where: their positions, and which are live.
          last: [B] int32, the token of each row whose logits are wanted.
          cache: of each layer; the result has the live tokens in it.
          placement: see `nixlep_moe`.

        Returns:
          Logits [B, vocab_size] float32, and the cache.
        """
        x = self.layout.spread(self.embed_tokens[...][tokens])
        caches = []
        for layer, old in zip(self.layers, cache, strict=True):
            x, new = layer(x, where, old, placement)
            x = self.layout.spread(x)
            caches.append(new)
        x = rms_norm(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0], self.norm[...], self.config.norm_eps)
        head = self.embed_tokens[...].T if self.config.tie_embeddings else self.lm_head[...]
        return jnp.dot(x, head, preferred_element_type=jnp.float32), caches


def empty_cache(config: ModelConfig, layout: Layout, batch: int, length: int) -> list[Cache]:
    """Zeros for `batch` rows of at most `length` tokens; with a mesh, rows over the token axes, heads over the tensor
    axis where it divides them."""
    dtype = jnp.dtype(layout.dtype)

    def zeros(heads: int, dim: int) -> jax.Array:
        shape = (batch, length, heads, dim)
        if layout.mesh is None:
            return jnp.zeros(shape, dtype)
        axis = None if config.latent else dict(layout.rules(config))["kv_heads"]
        return jnp.zeros(shape, dtype, device=NamedSharding(layout.mesh, P(layout.token_axes, None, axis)))

    return [Cache(*(zeros(*shape) for shape in cache_shapes(config))) for _ in range(config.layers)]
