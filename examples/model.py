"""A small decoder language model over bytes, with a mixture of experts in every layer (Flax nnx)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import jax_nixlep as nx
from jax_nixlep.flax.nnx import NixlEpMoE

BYTES = 256


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model. Nothing in here depends on where it runs."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    mlp_dim: int = 256
    window: int = 128  # a token attends to itself and to the window - 1 before it


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the model runs.

    Attributes:
      ranks: ranks over which the experts are spread, at most; it divides the number of experts unless `slots` is given.
      tokens_per_rank: tokens that a rank brings to one call, at most.
      mesh: the mesh whose axis "ep" the ranks are; None if each rank is a process by itself.
      dense: no expert parallelism: one process, one device, `ranks` is 1.
      dtype: of all parameters, and of all values outside the experts, which are float32.
      slots: experts that a rank has room for; None: each expert has one place.
      rank: whose experts a new model holds; None: this process's.
    """

    ranks: int
    tokens_per_rank: int
    mesh: jax.sharding.Mesh | None = None
    dense: bool = False
    dtype: str = "float32"
    slots: int | None = None
    rank: int | None = None

    def ep_config(self, config: ModelConfig) -> nx.EpConfig:
        if self.slots is None and config.experts % self.ranks:
            raise ValueError(f"ranks must divide the {config.experts} experts; got {self.ranks}")
        return nx.EpConfig(
            max_ranks=self.ranks,
            experts_per_rank=self.slots or config.experts // self.ranks,
            max_tokens_per_rank=self.tokens_per_rank,
            hidden=config.hidden,
            top_k=config.top_k,
            dtype=jnp.float32,
        )


class Cache(NamedTuple):
    """What a layer remembers of earlier tokens: keys and values [B, N, heads, head_dim], by position."""

    keys: jax.Array
    values: jax.Array


def empty_cache(config: ModelConfig, batch: int, length: int) -> list[Cache]:
    shape = (batch, length, config.heads, config.hidden // config.heads)
    return [Cache(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.layers)]


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding of x [B, S, heads, D] at positions [B, S]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = positions[:, :, None, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)], -1)


class Attention(nnx.Module):
    """Causal self-attention over a sliding window."""

    def __init__(self, config: ModelConfig, dtype: str, rngs: nnx.Rngs):
        self.config = config
        self.qkv = nnx.Linear(config.hidden, 3 * config.hidden, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(config.hidden, config.hidden, use_bias=False, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        """x [B, S, H], positions [B, S] -> [B, S, H], and the cache with these tokens in it."""
        batch, length, hidden = x.shape
        q, k, v = (part.reshape(batch, length, self.config.heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        q, k = rotate(q, positions), rotate(k, positions)
        if cache is None:
            cache, key_positions = Cache(k, v), positions
        else:
            rows = jnp.arange(batch)[:, None]
            cache = Cache(cache.keys.at[rows, positions].set(k), cache.values.at[rows, positions].set(v))
            key_positions = jnp.arange(cache.keys.shape[1])[None]
        distance = positions[:, :, None] - key_positions[:, None, :]
        visible = (distance >= 0) & (distance < self.config.window)
        y = jax.nn.dot_product_attention(q, cache.keys, cache.values, mask=visible[:, None])
        return self.out(y.reshape(batch, length, hidden)), cache


class Block(nnx.Module):
    """Attention, then a mixture of experts, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        self.norm_attention = nnx.RMSNorm(config.hidden, param_dtype=layout.dtype, rngs=rngs)
        self.attention = Attention(config, layout.dtype, rngs)
        self.norm_moe = nnx.RMSNorm(config.hidden, param_dtype=layout.dtype, rngs=rngs)
        self.moe = NixlEpMoE(
            config=layout.ep_config(config),
            router=nx.Router(num_experts=config.experts, top_k=config.top_k, load_balance_coef=0.01),
            mlp_dim=config.mlp_dim,
            mesh=layout.mesh,
            backend="xla" if layout.dense else "native",
            param_dtype=layout.dtype,
            rank=layout.rank,
            rngs=rngs,
        )

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        cache: Cache | None,
        live: jax.Array | None,
        placement: nx.Placement | None,
    ) -> tuple[jax.Array, Cache, nx.MoeAux]:
        y, cache = self.attention(self.norm_attention(x), positions, cache)
        x = x + y
        y, aux = self.moe(self.norm_moe(x), live, placement)
        return x + y, cache, aux


class Output(NamedTuple):
    logits: jax.Array  # [B, S, 256] float32
    cache: list[Cache]
    router_loss: jax.Array  # [] float32


class ByteLM(nnx.Module):
    """Bytes in, logits of the next byte out. The output layer is the transposed embedding."""

    def __init__(self, config: ModelConfig, layout: Layout, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.hidden**-0.5)
        self.embed = nnx.Embed(BYTES, config.hidden, param_dtype=layout.dtype, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(config, layout, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.hidden, param_dtype=layout.dtype, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: list[Cache] | None = None,
        live: jax.Array | None = None,
        placement: nx.Placement | None = None,
    ) -> Output:
        """
        Args:
          tokens: [B, S] integers, 0 to 255.
          positions: [B, S] int32, or None for 0 to S - 1 in every row.
          cache: what earlier calls returned, to which these tokens are added; None to look at these tokens only.
          live: [B, S] bool, False for padding, which goes to no expert.
          placement: where the experts are; None: expert e is in slot e.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed(tokens.astype(jnp.int32))
        caches, router_loss = [], jnp.zeros(())
        for i, block in enumerate(self.blocks):
            x, layer_cache, aux = block(x, positions, None if cache is None else cache[i], live, placement)
            caches.append(layer_cache)
            router_loss += aux.loss
        return Output(self.embed.attend(self.norm(x)), caches, router_loss)


def save_checkpoint(path: Path, config: ModelConfig, params: nnx.State) -> None:
    """Writes all parameters as float32, experts stacked [experts, ...], and the config as the file's metadata."""
    flat = nnx.to_flat_state(params)
    arrays = {".".join(map(str, where)): np.asarray(param[...], np.float32) for where, param in flat}
    save_file(arrays, path, metadata={"model": json.dumps(dataclasses.asdict(config))})


def read_config(path: Path) -> ModelConfig:
    with safe_open(path, "numpy") as file:
        return ModelConfig(**json.loads(file.metadata()["model"]))
