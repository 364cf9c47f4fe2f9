"""Dispatch and combine as numpy loops: the contract of the ops, written without looking at any implementation.

One call computes all ranks at once. Float32 operations are done in the contract's order, one at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

BLOCK = 128


class Result(NamedTuple):
    """What one rank gets; `expert_ids`, `row_of`, `row_weights` are the fields of its `Handle`."""

    tokens: np.ndarray  # [C, H] dtype, or float8_e4m3fn with dequantize=False
    scales: np.ndarray | None  # [C, H / 128]
    group_sizes: np.ndarray  # [E] int32
    demand: np.ndarray  # [E] int32
    expert_ids: np.ndarray  # [t, K] int32
    row_of: np.ndarray  # [R, T, K] int32
    row_weights: np.ndarray  # [C] float32
    dropped: int
    invalid_ids: int


def quantize(x, scale_format="float32", round_scale=False):
    """[N, H] -> q [N, H] float8_e4m3fn, scale_inv [N, H / 128] float32 or float8_e8m0fnu."""
    x = np.asarray(x).astype(np.float32)
    q = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros((x.shape[0], x.shape[1] // BLOCK), np.float32)
    for n in range(x.shape[0]):
        for b in range(scales.shape[1]):
            block = x[n, b * BLOCK : (b + 1) * BLOCK]
            amax = np.float32(max(np.float32(1e-4), np.abs(block).max()))
            inverse = np.float32(amax * np.float32(1 / 448))
            scale = np.float32(448) / amax
            if round_scale or scale_format == "ue8m0":
                mantissa, exponent = np.frexp(inverse)  # inverse = mantissa * 2**exponent, 0.5 <= mantissa < 1
                exponent = int(exponent) - (mantissa == 0.5)
                inverse, scale = np.float32(2.0**exponent), np.float32(2.0**-exponent)
            scaled = np.clip(block * scale, np.float32(-448), np.float32(448))
            q[n, b * BLOCK : (b + 1) * BLOCK] = scaled.astype(ml_dtypes.float8_e4m3fn)
            scales[n, b] = inverse
    return q, scales.astype(ml_dtypes.float8_e8m0fnu) if scale_format == "ue8m0" else scales


def dequantize_blocks(q, scales):
    return q.astype(np.float32) * np.repeat(scales.astype(np.float32), BLOCK, axis=1)


def limits(demand, rows):
    """Rows each expert keeps when `rows` are to be had."""
    level = 0
    while sum(min(d, level + 1) for d in demand) <= rows and level < max(demand):
        level += 1
    kept = [min(d, level) for d in demand]
    for e, d in enumerate(demand):
        if d > level and sum(kept) < rows:
            kept[e] += 1
    return kept


def dispatch(xs, ids, weights, config, *, scales=None, dequantize=True, recv_capacity=None):
    """All ranks' `dispatch`.

    Args:
      xs: per rank [t, H] in config.dtype; ids: per rank [t, K] int32; weights: per rank [t, K] float32, or None.
        t may differ between ranks. Ranks that are not members are None in `xs` and `ids` (or missing at the end).
      scales: per rank [t, H / 128], if `xs` are float8_e4m3fn already.

    Returns:
      A list of `Result`, None for ranks that are not members.
    """
    experts, top_k = config.experts_per_rank, config.top_k
    capacity = config.num_rows if recv_capacity is None else recv_capacity
    xs = [None if x is None else np.asarray(x) for x in xs]
    given = [None] * len(xs) if scales is None else scales
    wired = [None if x is None else _wire(x, s, config, dequantize) for x, s in zip(xs, given, strict=True)]
    clean, invalid = [], []
    for i in ids:
        i = None if i is None else np.array(i)
        bad = None if i is None else ((i < 0) | (i >= config.max_ranks * experts))
        invalid.append(0 if i is None else int((bad & (i != -1)).sum()))
        clean.append(None if i is None else np.where(bad, -1, i).astype(np.int32))

    results = []
    for rank, x in enumerate(xs):
        if x is None:
            results.append(None)
            continue
        wanted = [[] for _ in range(experts)]  # per expert: (source, token, weight), in (source, token) order
        for e in range(experts):
            for source, rows in enumerate(clean):
                for t in range(0 if rows is None else rows.shape[0]):
                    weight, hit = np.float32(0), False
                    for k in range(top_k):
                        if rows[t, k] == rank * experts + e:
                            hit = True
                            if weights is not None:
                                weight = np.float32(weight + np.float32(weights[source][t, k]))
                    if hit:
                        wanted[e].append((source, t, np.float32(1) if weights is None else weight))
        demand = [len(w) for w in wanted]
        sizes = limits(demand, capacity)
        values, of_row = next(w for w in wired if w is not None)
        tokens = np.zeros((capacity, config.hidden), values.dtype)
        out_scales = None if of_row is None else _zero_bytes((capacity, of_row.shape[1]), of_row.dtype)
        row_weights = np.zeros(capacity, np.float32)
        row_of = np.full((config.max_ranks, config.max_tokens_per_rank, top_k), -1, np.int32)
        row = 0
        for e in range(experts):
            for source, t, weight in wanted[e][: sizes[e]]:
                values, of_row = wired[source]
                tokens[row] = values[t]
                if of_row is not None:
                    out_scales[row] = of_row[t]
                row_weights[row] = weight
                for k in range(top_k):
                    if clean[source][t, k] == rank * experts + e:
                        row_of[source, t, k] = row
                row += 1
        counts = np.array(sizes, np.int32), np.array(demand, np.int32)
        results.append(
            Result(
                tokens, out_scales, *counts, clean[rank], row_of, row_weights, sum(demand) - sum(sizes), invalid[rank]
            )
        )
    return results


def combine(expert_outs, handles, config, weights=None):
    """All ranks' `combine`.

    Args:
      expert_outs: per rank [C, H] in config.dtype, None for ranks that are not members.
      handles: per rank a `Result` or a `Handle` (anything with expert_ids, row_of, row_weights).
      weights: per rank [t, K] float32, or None for the weights of the handles.

    Returns:
      A list of y [t, H] in config.dtype, None for ranks that are not members.
    """
    row_weights = [None if h is None else np.asarray(h.row_weights) for h in handles]
    if weights is not None:
        row_weights = [None if h is None else _reweigh(h, weights) for h in handles]
    results = []
    for me, handle in enumerate(handles):
        if handle is None:
            results.append(None)
            continue
        y = np.zeros((np.asarray(handle.expert_ids).shape[0], config.hidden), config.dtype)
        for t in range(y.shape[0]):
            total = np.zeros(config.hidden, np.float32)
            for rank, theirs in enumerate(handles):
                if theirs is None:
                    continue
                rows = list(dict.fromkeys(int(r) for r in np.asarray(theirs.row_of)[me, t] if r >= 0))
                if not rows:
                    continue
                partial = np.zeros(config.hidden, np.float32)
                for row in rows:
                    value = np.asarray(expert_outs[rank])[row].astype(np.float32)
                    partial = partial + row_weights[rank][row] * value
                total = total + to_combine_wire(partial, config).astype(np.float32)
            y[t] = total.astype(config.dtype)
        results.append(y)
    return results


def to_combine_wire(values, config):
    """The form in which partial sums and cotangents travel."""
    return values.astype(config.dtype if config.wire == "same" else ml_dtypes.bfloat16)


def _reweigh(handle, weights):
    row_of = np.asarray(handle.row_of)
    result = np.zeros(np.asarray(handle.row_weights).shape, np.float32)
    for source, w in enumerate(weights):
        for t in range(0 if w is None else w.shape[0]):
            for k in range(row_of.shape[2]):
                if row_of[source, t, k] >= 0:
                    result[row_of[source, t, k]] += np.float32(w[t, k])
    return result


def _wire(x, scales, config, dequantize):
    if config.wire == "same":
        return x, None
    if config.wire == "bf16":
        return x.astype(ml_dtypes.bfloat16).astype(x.dtype), None
    q, scales = quantize(x, config.scale_format, config.round_scale) if scales is None else (x, scales)
    return (dequantize_blocks(q, scales).astype(config.dtype), None) if dequantize else (q, scales)


def _zero_bytes(shape, dtype):
    return np.zeros((*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
