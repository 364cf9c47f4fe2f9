"""What a rank runs in a step: the model on the tokens of its rows, and the choice of each row's next token."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_nixlep as nx
from serving.model import Model


class Batch(NamedTuple):
    """Input of one step, numpy arrays with one entry for each row.

    Attributes:
      tokens: [B, S] int32; `start` and `lengths` [B] int32: see `Model.forward`.
      temperature: [B] float32; 0 takes the likeliest token.
      top_p: [B] float32, in (0, 1]: chooses among the likeliest tokens that together have this probability.
      seeds: [B] uint32. Equal seeds and logits at equal positions give equal tokens, on any rank.
    """

    tokens: np.ndarray
    start: np.ndarray
    lengths: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray
    seeds: np.ndarray

    @staticmethod
    def empty(rows: int, width: int) -> Batch:
        """A batch in which no row takes part."""
        zeros = np.zeros(rows, np.int32)
        ones, reals = np.ones(rows, np.float32), np.zeros(rows, np.float32)
        return Batch(np.zeros((rows, width), np.int32), zeros, zeros.copy(), reals, ones, np.zeros(rows, np.uint32))


def compile_steps(model: Model, config: nx.EpConfig, rows: int, widths: tuple[int, ...], length: int) -> dict[int, Any]:
    """A program for each S of `widths`: step(dense, experts, placement, cache, batch) -> ([B] int32 tokens, cache).

    Needs no group and no weights: a rank compiles before it joins. The programs take what they were compiled for and
    cannot be compiled again.
    """

    def step(dense, experts, placement, cache, batch: Batch):
        logits, cache = model.forward(dense, experts, placement, batch.tokens, batch.start, batch.lengths, cache)
        return choose(logits, batch, batch.start + batch.lengths), cache

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)

    slots = jax.ShapeDtypeStruct((model.num_experts, config.max_ranks), jnp.int32)
    placement = nx.Placement(slots, jax.ShapeDtypeStruct((model.num_experts,), jnp.int32))
    weights = shapes(model.load_dense()), shapes(model.load_experts([-1] * config.experts_per_rank))
    cache = jax.eval_shape(lambda: model.empty_cache(rows, length))
    compiled = {}
    for width in widths:
        batch = shapes(Batch.empty(rows, width))
        compiled[width] = jax.jit(step).lower(*weights, placement, cache, batch).compile()
    return compiled


def choose(logits: jax.Array, batch: Batch, positions: jax.Array) -> jax.Array:
    """logits [B, V] float32 -> [B] int32, the token at `positions` [B] of each row."""

    def sample() -> jax.Array:
        scaled = logits / jnp.maximum(batch.temperature, 1e-6)[:, None]
        scaled = jax.lax.cond((batch.top_p < 1).any(), lambda: _keep_top(scaled, batch.top_p), lambda: scaled)
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
            batch.seeds, positions
        )
        return jnp.where(batch.temperature > 0, jax.vmap(jax.random.categorical)(keys, scaled), likeliest)

    likeliest = logits.argmax(-1)
    return jax.lax.cond((batch.temperature > 0).any(), sample, lambda: likeliest).astype(jnp.int32)


def _keep_top(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf for tokens outside the smallest set of likeliest tokens with probability `top_p`; the first stays."""
    ordered = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(probability, -1) - probability
    least = jnp.where(before < top_p[:, None], ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
