"""Greedy texts of examples/moe_decoder, by ranks that import neither torch nor transformers, which take long."""

import jax
import moe_decoder
import numpy as np

from jax_nixlep.placement import identity_placement

NEW_TOKENS = 32
CACHE = 48
PROMPTS = [np.random.default_rng(0).integers(3, 90, n).tolist() for n in (11, 3, 8, 1, 6)]
WIDTH = max(map(len, PROMPTS))


def advance(model, step, weights, prompts, num_rows):
    """Greedy texts of `prompts` in the first of `num_rows` rows -> logits [prompts, NEW_TOKENS, V], tokens."""
    lengths = np.array([len(p) for p in prompts] + [0] * (num_rows - len(prompts)), np.int32)
    tokens = np.zeros((num_rows, WIDTH), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    start, live, cache = np.zeros_like(lengths), lengths, model.empty_cache(num_rows, CACHE)
    logits, chosen = [], []
    for _ in range(NEW_TOKENS):
        out, cache = step(*weights, tokens, start, live, cache)
        logits.append(np.asarray(out)[: len(prompts)])
        chosen.append(logits[-1].argmax(-1))
        start, live = start + live, np.minimum(lengths, 1)
        tokens = np.zeros((num_rows, 1), np.int32)
        tokens[: len(prompts), 0] = chosen[-1]
    return np.stack(logits, 1), np.stack(chosen, 1)


def rank_texts(job, folder, dtype=None):
    """Greedy texts of this rank's prompts, by its own experts and those of the other ranks."""
    model = moe_decoder.load(folder, dtype=dtype)
    rows = -(-len(PROMPTS) // job.num_ranks)
    per_rank = -(-model.num_experts // job.num_ranks)
    config = model.ep_config(job.num_ranks, per_rank, rows * WIDTH)
    group = job.initialize(config, timeout_s=120)  # ranks wait for each other's compilation
    first = job.rank * per_rank
    mine = [e if e < model.num_experts else -1 for e in range(first, first + per_rank)]
    placement = identity_placement(model.num_experts, group.members, per_rank)
    weights = model.place(model.load_dense()), model.place(model.load_experts(mine)), placement
    step = jax.jit(model.forward)
    out = advance(model, step, weights, PROMPTS[job.rank :: job.num_ranks], rows)
    assert step._cache_size() == 2, "prefill and decode, once each"
    return out


def on_ranks(pools, num_ranks, folder, dtype=None):
    parts = pools(num_ranks).run(rank_texts, folder, dtype, timeout_s=240)
    out = []
    for each in zip(*parts, strict=True):
        whole = np.empty((len(PROMPTS), *each[0].shape[1:]), each[0].dtype)
        for rank, part in enumerate(each):
            whole[rank::num_ranks] = part
        out.append(whole)
    return out
