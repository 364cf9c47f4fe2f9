"""Attention of all families: grouped heads, norms of queries and keys, windows, sinks, and latent keys and values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_decoder.config import ModelConfig, Rope

Make = Callable[[tuple[int, ...], tuple[str | None, ...]], nnx.Param]  # of a shape, with logical axis names


class Cache(NamedTuple):
    """What a layer remembers of earlier tokens, by position: keys [B, N, K, D] and values [B, N, K, D]; of latent
    attention [B, N, 1, rope] and [B, N, 1, rank]."""

    keys: jax.Array
    values: jax.Array


class Where(NamedTuple):
    """Of a step's tokens: positions [B, S] int32, and live [B, S], False for padding, which is not remembered."""

    positions: jax.Array
    live: jax.Array


def cache_shapes(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """(heads, values of a head) of a token's part of each half of the cache."""
    if config.latent:
        return (1, config.rope.dim), (1, config.latent.rank)
    return ((config.kv_heads, config.head_dim),) * 2


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


@functools.cache
def frequencies(rope: Rope) -> np.ndarray:
    """[dim / 2] float32 radians per position; YaRN as arXiv:2309.00071, section 3.2."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    plain = (1.0 / rope.theta**exponents).astype(np.float32)
    if not rope.original_length:
        return plain

    def pair_that_turns(times: float) -> float:  # over the original length
        return rope.dim * math.log(rope.original_length / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    share = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 1e-3), 0, 1).astype(np.float32)
    return plain * (1 - share) + plain / np.float32(rope.factor) * share


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """x [B, S, N, D] at positions [B, S]. Of interleaved pairs all firsts come out before all seconds."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies(rope)
    cos, sin = (f(angles) * rope.magnitude for f in (jnp.cos, jnp.sin))
    a, b = (x[..., ::2], x[..., 1::2]) if rope.interleaved else jnp.split(x, 2, axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def remember(cache: Cache, where: Where, keys: jax.Array, values: jax.Array) -> Cache:
    """The cache with the live tokens' keys and values [B, S, K, D] in it."""
    length = cache.keys.shape[1]
    rows = jnp.arange(keys.shape[0])[:, None]
    at = jnp.where(where.live, where.positions, length)  # past the end: dropped

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows, at].set(new.astype(old.dtype), mode="drop")

    return Cache(put(cache.keys, keys), put(cache.values, values))


def probabilities(scores: jax.Array, where: Where, window: int | None, sinks: jax.Array | None = None) -> jax.Array:
    """Softmax of scores [B, K, G, S, N] over the positions N that each of S tokens may see.

    sinks [K, G]: one more score for each head, for a position that has no value.
    """
    distance = where.positions[:, :, None] - jnp.arange(scores.shape[-1])
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, :, None, None], (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sinks], -1), axis=-1)[..., :-1]


def linear(module: nnx.Module, name: str, x: jax.Array) -> jax.Array:
    """x times the matrix of that name, plus its bias if it has one."""
    y = x @ getattr(module, name)[...]
    bias = getattr(module, f"{name}_bias", None)
    return y if bias is None else y + bias[...]


class Attention(nnx.Module):
    """Causal attention of `heads` queries to `kv_heads` keys and values."""

    def __init__(self, config: ModelConfig, window: int | None, make: Make):
        self.config, self.window = config, window
        hidden, dim = config.hidden, config.head_dim
        for name, heads, axis in (("q", config.heads, "heads"), ("k", config.kv_heads, "kv_heads")):
            setattr(self, f"{name}_proj", make((hidden, heads * dim), ("embed", axis)))
        self.v_proj = make((hidden, config.kv_heads * dim), ("embed", "kv_heads"))
        self.o_proj = make((config.heads * dim, hidden), ("heads", "embed"))
        if config.attention_bias:
            self.q_proj_bias = make((config.heads * dim,), ("heads",))
            self.k_proj_bias = make((config.kv_heads * dim,), ("kv_heads",))
            self.v_proj_bias = make((config.kv_heads * dim,), ("kv_heads",))
            self.o_proj_bias = make((hidden,), ("embed",))
        if config.qk_norm:
            whole = config.qk_norm == "all"
            self.q_norm = make((config.heads * dim if whole else dim,), ("heads" if whole else None,))
            self.k_norm = make((config.kv_heads * dim if whole else dim,), ("kv_heads" if whole else None,))
        if config.sinks:
            self.sinks = make((config.heads,), ("heads",))

    def __call__(self, x: jax.Array, where: Where, cache: Cache) -> tuple[jax.Array, Cache]:
        """x [B, S, H] -> [B, S, H], and the cache with these tokens in it."""
        config = self.config
        q, k, v = (self._project(name, x) for name in "qkv")
        q, k = rotate(q, where.positions, config.rope), rotate(k, where.positions, config.rope)
        cache = remember(cache, where, k, v)
        q = q.reshape(*q.shape[:2], config.kv_heads, -1, config.head_dim)
        scores = jnp.einsum("bskgd,bnkd->bkgsn", q, cache.keys, preferred_element_type=jnp.float32)
        sinks = self.sinks[...].reshape(config.kv_heads, -1) if config.sinks else None
        p = probabilities(scores * config.attention_scale, where, self.window, sinks).astype(x.dtype)
        y = jnp.einsum("bkgsn,bnkd->bskgd", p, cache.values).reshape(*x.shape[:2], -1)
        return linear(self, "o_proj", y), cache

    def _project(self, name: str, x: jax.Array) -> jax.Array:
        """x [B, S, H] -> queries, keys or values [B, S, N, D], before rotation."""
        config = self.config
        y = linear(self, f"{name}_proj", x)
        norm = config.qk_norm if name != "v" else None
        if norm == "all":
            y = rms_norm(y, getattr(self, f"{name}_norm")[...], config.norm_eps)
        if config.clip_qkv is not None:
            y = jnp.clip(y, -config.clip_qkv, config.clip_qkv)
        y = y.reshape(*y.shape[:2], -1, config.head_dim)
        return rms_norm(y, getattr(self, f"{name}_norm")[...], config.norm_eps) if norm == "head" else y


class LatentAttention(nnx.Module):
    """Multi-head latent attention. The cache holds a latent vector and one rotated key for each token.

    The matrices that would expand latents to keys and values are applied to the queries and to the result instead
    (DeepSeek-V2, arXiv:2405.04434, section 2.1.2), so nothing of the size of heads times positions is made of them.
    """

    EPS = 1e-6  # of the norms of the latents, whatever `rms_norm_eps` says

    def __init__(self, config: ModelConfig, window: int | None, make: Make):
        self.config, self.window, latent = config, window, config.latent
        self.latent, hidden, heads = latent, config.hidden, config.heads
        if latent.query_rank:
            self.q_a_proj = make((hidden, latent.query_rank), ("embed", None))
            self.q_a_layernorm = make((latent.query_rank,), (None,))
            self.q_b_proj = make((latent.query_rank, heads * config.head_dim), (None, "heads"))
        else:
            self.q_proj = make((hidden, heads * config.head_dim), ("embed", "heads"))
        self.kv_a_proj_with_mqa = make((hidden, latent.rank + config.rope.dim), ("embed", None))
        self.kv_a_layernorm = make((latent.rank,), (None,))
        self.kv_b_proj = make((latent.rank, heads * (latent.plain_dim + latent.value_dim)), (None, "heads"))
        self.o_proj = make((heads * latent.value_dim, hidden), ("heads", "embed"))
        if config.attention_bias:
            if latent.query_rank:
                self.q_a_proj_bias = make((latent.query_rank,), (None,))
            self.kv_a_proj_with_mqa_bias = make((latent.rank + config.rope.dim,), (None,))
            self.o_proj_bias = make((hidden,), ("embed",))

    def __call__(self, x: jax.Array, where: Where, cache: Cache) -> tuple[jax.Array, Cache]:
        config, latent = self.config, self.latent
        q = self._queries(x).reshape(*x.shape[:2], config.heads, config.head_dim)
        q, q_rotated = q[..., : latent.plain_dim], rotate(q[..., latent.plain_dim :], where.positions, config.rope)
        both = linear(self, "kv_a_proj_with_mqa", x)[:, :, None]
        values = rms_norm(both[..., : latent.rank], self.kv_a_layernorm[...], self.EPS)
        cache = remember(cache, where, rotate(both[..., latent.rank :], where.positions, config.rope), values)

        expand = self.kv_b_proj[...].reshape(latent.rank, config.heads, -1)
        expand_keys, expand_values = jnp.split(expand, [latent.plain_dim], axis=-1)
        q = jnp.einsum("bshd,rhd->bshr", q, expand_keys)
        exact: dict[str, Any] = {"preferred_element_type": jnp.float32}
        scores = jnp.einsum("bshr,bnkr->bkhsn", q, cache.values, **exact)
        scores += jnp.einsum("bshd,bnkd->bkhsn", q_rotated, cache.keys, **exact)
        p = probabilities(scores * config.attention_scale, where, self.window).astype(x.dtype)
        y = jnp.einsum("bkhsn,bnkr->bshr", p, cache.values)
        y = jnp.einsum("bshr,rhd->bshd", y, expand_values).reshape(*x.shape[:2], -1)
        return linear(self, "o_proj", y), cache

    def _queries(self, x: jax.Array) -> jax.Array:
        if not self.latent.query_rank:
            return linear(self, "q_proj", x)
        return linear(self, "q_b_proj", rms_norm(linear(self, "q_a_proj", x), self.q_a_layernorm[...], self.EPS))
