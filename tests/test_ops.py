"""dispatch and combine between processes, against numpy loops (`oracle`) and closed forms, on both transports."""

import contextlib
import functools
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_nixlep import PEER_OK, EpConfig

TRANSPORTS = ["shared", "nixl"]


def make_config(**changes):
    base = {"max_ranks": 2, "experts_per_rank": 2, "max_tokens_per_rank": 6, "hidden": 16, "top_k": 3}
    return EpConfig(**(base | {"dtype": jnp.float32} | changes))


def make_input(config, rank, tokens, seed, ids="any"):
    """Tokens, ids and weights of one rank; every process can make those of every rank."""
    rng = np.random.default_rng([seed, rank])
    shape = (tokens, config.top_k)
    x = (rng.standard_normal((tokens, config.hidden)) * 10 ** rng.uniform(-3, 2)).astype(config.dtype)
    if ids == "distinct":
        chosen = (
            np.stack([rng.permutation(config.num_slots)[: config.top_k] for _ in range(tokens)]) if tokens else None
        )
        chosen = np.zeros(shape) if chosen is None else chosen
    else:
        chosen = rng.integers(0, config.num_slots, shape)
        chosen = np.where(rng.random(shape) < 0.2, -1, chosen)
        chosen = np.where(rng.random(shape) < 0.05, rng.choice([-7, config.num_slots, 2**31 - 1]), chosen)
    return x, chosen.astype(np.int32), rng.standard_normal(shape).astype(np.float32)


def make_quantized(config, rank, tokens, seed):
    """What no quantisation here would give: any finite e4m3 values with any scales. [t, H] and [t, H / 128]."""
    rng = np.random.default_rng([seed, rank, 1])
    q = rng.integers(0, 256, (tokens, config.hidden), np.uint8)
    q = np.where(q & 0x7F == 0x7F, 0, q).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    shape = (tokens, config.hidden // 128)
    if config.scale_format == "ue8m0":
        return q, rng.integers(112, 124, shape, np.uint8).view(ml_dtypes.float8_e8m0fnu)
    return q, rng.standard_normal(shape, np.float32) / 8


def expert_outputs(tokens, rank):
    """Not the identity: each expert row is changed in a way that depends on where it was computed."""
    out = np.asarray(tokens).astype(np.float32) * (1 + rank) + np.float32(0.5)
    return out.astype(tokens.dtype)


# --- What the ranks run. ---


def rank_round_trip(job, cases):
    """For each (config, tokens per rank, seed, options): dispatch, then combine in the three ways."""
    import jax

    import jax_nixlep as nx

    results = []
    for config, tokens, seed, options in cases:
        job.initialize(config, members=options.get("members", range(job.num_ranks)))
        x, ids, weights = make_input(config, job.rank, tokens[job.rank], seed, options.get("ids", "any"))
        dequantize = options.get("dequantize", True)
        chosen = {"dequantize": dequantize, "recv_capacity": options.get("recv_capacity")}
        scales = None
        if options.get("quantized"):
            x, scales = make_quantized(config, job.rank, tokens[job.rank], seed)
        send = jax.jit(functools.partial(nx.dispatch, config=config, **chosen))
        received = send(x, ids, weights if options.get("weigh_at_dispatch", True) else None, scales=scales)
        row = {"received": jax.tree.map(np.asarray, received)}
        if dequantize:
            out = expert_outputs(np.asarray(received.tokens), job.rank)
            back = jax.jit(functools.partial(nx.combine, config=config))
            row["y"] = np.asarray(back(out, received.handle, None))
            row["y_reweighed"] = np.asarray(back(out, received.handle, 2 * weights[::-1]))
        row["health"] = nx.current_group().health()
        results.append(row)
        nx.shutdown()
    return results


def check_round_trip(pool, cases):
    answers = pool.run(rank_round_trip, cases)
    for i, (config, tokens, seed, options) in enumerate(cases):
        inputs = [make_input(config, r, tokens[r], seed, options.get("ids", "any")) for r in range(pool.num_ranks)]
        xs, ids, weights = (list(column) for column in zip(*inputs, strict=True))
        scales = None
        if options.get("quantized"):
            given = [make_quantized(config, r, tokens[r], seed) for r in range(pool.num_ranks)]
            xs, scales = (list(column) for column in zip(*given, strict=True))
        expected = oracle.dispatch(
            xs,
            ids,
            weights if options.get("weigh_at_dispatch", True) else None,
            config,
            scales=scales,
            dequantize=options.get("dequantize", True),
            recv_capacity=options.get("recv_capacity"),
        )
        outs = (
            [expert_outputs(e.tokens, r) for r, e in enumerate(expected)] if options.get("dequantize", True) else None
        )
        for rank, (want, answer) in enumerate(zip(expected, answers, strict=True)):
            got = answer[i]["received"]
            same_bits(got.tokens, want.tokens)
            if want.scales is not None:
                same_bits(got.scales, want.scales)
            np.testing.assert_array_equal(got.group_sizes, want.group_sizes)
            np.testing.assert_array_equal(got.demand, want.demand)
            np.testing.assert_array_equal(got.handle.expert_ids, want.expert_ids)
            np.testing.assert_array_equal(got.handle.row_of, want.row_of)
            same_bits(got.handle.row_weights, want.row_weights)
            assert (got.status.dropped, got.status.invalid_ids) == (want.dropped, want.invalid_ids)
            np.testing.assert_array_equal(got.status.peers[: pool.num_ranks], PEER_OK)
            if outs is not None:
                same_bits(answer[i]["y"], oracle.combine(outs, expected, config)[rank])
                reweighed = [2 * w[::-1] for w in weights]
                same_bits(answer[i]["y_reweighed"], oracle.combine(outs, expected, config, reweighed)[rank])
    return answers


def same_bits(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_array_equal(got.view(f"u{got.dtype.itemsize}"), want.view(f"u{want.dtype.itemsize}"))


# --- Round trips. ---

WIRES = [
    {"wire": "same"},
    {"wire": "bf16"},
    {"wire": "fp8_e4m3", "hidden": 256},
    {"wire": "fp8_e4m3", "hidden": 256, "round_scale": True},
    {"wire": "fp8_e4m3", "hidden": 128, "scale_format": "ue8m0"},
]


def quantized_cases(num_ranks):
    """Tokens that come quantised: every type to come out as, both kinds of scales, drops, idle ranks, no weights."""
    plain, bytes_ = ({"max_ranks": num_ranks, "experts_per_rank": 3} | wire for wire in (WIRES[2], WIRES[4]))
    cases = [(make_config(dtype=dtype, **plain), [5] * num_ranks, 1, {}) for dtype in ("float32", "float16")]
    cases += [(make_config(dtype="bfloat16", **wire), [5] * num_ranks, 1, {"dequantize": dequantize})
              for wire in (plain, bytes_) for dequantize in (True, False)]  # fmt: skip
    wide = bytes_ | {"hidden": 384, "max_tokens_per_rank": 20}
    cases += [(make_config(**wide), [20 - r for r in range(num_ranks)], 2, {"recv_capacity": 9, "dequantize": False})]
    cases += [(make_config(**bytes_), [r % 3 for r in range(num_ranks)], 3, {})]
    cases += [(make_config(**plain), [0] * num_ranks, 4, {})]
    cases += [(make_config(**plain), [6] * num_ranks, 5, {"weigh_at_dispatch": False, "ids": "distinct"})]
    return [(config, tokens, seed, options | {"quantized": True}) for config, tokens, seed, options in cases]


@pytest.mark.parametrize(("num_ranks", "transport"), [(1, "shared"), (3, "shared"), (3, "nixl")])
def test_quantized_input_equals_oracle(pools, num_ranks, transport):
    check_round_trip(pools(num_ranks, transport), quantized_cases(num_ranks))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_equals_oracle(pools, num_ranks, transport):
    base = make_config(max_ranks=num_ranks, experts_per_rank=3)
    cases = [(base, [6] * num_ranks, 0, {})]
    cases += [(make_config(max_ranks=num_ranks, dtype=dtype, **wire), [5] * num_ranks, 1, {})
              for dtype in ("float32", "bfloat16", "float16") for wire in WIRES]  # fmt: skip
    cases += [(make_config(max_ranks=num_ranks, dtype="bfloat16", **wire), [5] * num_ranks, 2, {"dequantize": False})
              for wire in WIRES if "hidden" in wire]  # fmt: skip
    cases += [(base, [r % 3 for r in range(num_ranks)], 3, {}), (base, [0] * num_ranks, 4, {})]  # idle ranks
    cases += [(base, [6] * num_ranks, 5, {"weigh_at_dispatch": False, "ids": "distinct"})]
    cases += [(base, [6] * num_ranks, 6, {"recv_capacity": capacity}) for capacity in (1, 4, 7)]
    cases += [(make_config(max_ranks=num_ranks, hidden=4, top_k=9, max_tokens_per_rank=17), [17] * num_ranks, 7, {})]
    cases += [(make_config(max_ranks=num_ranks + 2, hidden=4), [3] * num_ranks, 8, {})]  # room for two more ranks
    check_round_trip(pools(num_ranks, transport), cases)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_larger_than_a_page(pools, transport):
    config = make_config(dtype="bfloat16", hidden=1024, experts_per_rank=8, max_tokens_per_rank=64, top_k=8)
    answers = check_round_trip(pools(2, transport), [(config, [64, 50], 0, {"ids": "distinct"})])
    path = "shared memory" if transport == "shared" else "nixl"
    health = answers[0][0]["health"]
    assert health.peers[1].path == path and health.peers[1].bytes_in > 0
    assert (health.peers[1].bytes_out > 0) == (transport == "nixl")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(pools, data):
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    num_ranks = integers(1, 3)
    wire = data.draw(st.sampled_from(WIRES))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    config = make_config(**{
        "max_ranks": num_ranks + integers(0, 1),
        "experts_per_rank": integers(1, 4),
        "max_tokens_per_rank": integers(1, 9),
        "hidden": 8 * integers(1, 9),
        "top_k": integers(1, 6),
        "dtype": dtype,
        "recv_capacity": data.draw(st.none() | st.integers(1, 40)),
    } | wire)  # fmt: skip
    tokens = [integers(0, config.max_tokens_per_rank) for _ in range(num_ranks)]
    check_round_trip(pools(num_ranks), [(config, tokens, integers(0, 2**31), {})])


# --- Gradients. ---


def rank_gradients(job, config, tokens, seed, where):
    """Gradients of sum(dy * y) for y = combine(gain_e * row), with the weights given in either place."""
    import jax

    import jax_nixlep as nx

    job.initialize(config)
    x, ids, weights = make_input(config, job.rank, tokens, seed)
    dy = make_input(config, job.rank, tokens, seed + 100)[0]

    def loss(x, weights, gain):
        received = nx.dispatch(x, ids, weights if where == "dispatch" else None, config=config)
        expert = jnp.searchsorted(jnp.cumsum(received.group_sizes), jnp.arange(config.num_rows), side="right")
        out = received.tokens * gain[jnp.minimum(expert, config.experts_per_rank - 1)][:, None]
        y = nx.combine(
            out.astype(config.dtype), received.handle, None if where == "dispatch" else weights, config=config
        )
        return (y.astype(jnp.float32) * dy.astype(np.float32)).sum()

    gain = jnp.arange(1, config.experts_per_rank + 1, dtype=jnp.float32) + 10 * job.rank
    plain = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weights, gain)
    remat = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)))(x, weights, gain)
    return jax.tree.map(np.asarray, (plain, remat))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("where", ["dispatch", "combine"])
def test_gradients_are_the_closed_forms(pools, where, transport):
    config = make_config(max_ranks=3, top_k=4)
    pool = pools(3, transport)
    answers = pool.run(rank_gradients, config, 6, 0, where)
    gains = [np.arange(1, 3) + 10.0 * r for r in range(3)]
    for rank, (plain, remat) in enumerate(answers):
        x, ids, weights = make_input(config, rank, 6, 0)
        dy = make_input(config, rank, 6, 100)[0].astype(np.float64)
        valid = (ids >= 0) & (ids < config.num_slots)
        gain = np.where(
            valid, np.concatenate(gains)[np.where(valid, ids, 0)], 0
        )  # [t, K], of the expert of each choice
        np.testing.assert_allclose(plain[0], dy * (weights * gain).sum(1, keepdims=True), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(plain[1], gain * (dy * x).sum(1, keepdims=True), rtol=1e-4, atol=2e-2)
        for a, b in zip(plain, remat, strict=True):
            same_bits(a, b)


def rank_wire_gradients(job, config):
    """Cotangents of y = combine(dispatch(x)) with unit weights and every token sent to one expert of each rank."""
    import jax

    import jax_nixlep as nx

    job.initialize(config)
    x = make_input(config, job.rank, 4, 0)[0]
    ids = np.tile(np.arange(job.num_ranks, dtype=np.int32) * config.experts_per_rank, (4, 1))

    def loss(x):
        received = nx.dispatch(x, ids, config=config)
        return nx.combine(received.tokens, received.handle, config=config).astype(jnp.float32).sum()

    return np.asarray(jax.jit(jax.grad(loss))(x))


def rank_quantized_gradients(job, config, dequantize):
    """Gradients of sum(dy * y) in the weights, for y = combine(gain of the rank * row) and quantised tokens."""
    import jax

    import jax_nixlep as nx
    from jax_nixlep import quant

    job.initialize(config)
    _, ids, weights = make_input(config, job.rank, 6, 0)
    q, scales = make_quantized(config, job.rank, 6, 0)
    dy = make_input(config, job.rank, 6, 100)[0].astype(ml_dtypes.bfloat16).astype(np.float32)  # as cotangents travel

    def loss(weights):
        received = nx.dispatch(q, ids, weights, config=config, scales=scales, dequantize=dequantize)
        rows = received.tokens if dequantize else quant.dequantize(received.tokens, received.scales, config.dtype)
        return (nx.combine(rows * (1 + job.rank), received.handle, config=config) * dy).sum()

    return np.asarray(jax.jit(jax.grad(loss))(weights))


def check_quantized_gradients(pool):
    for dequantize, scale_format in ((True, "float32"), (False, "float32"), (False, "ue8m0")):
        config = make_config(wire="fp8_e4m3", hidden=128, scale_format=scale_format)
        for rank, gradient in enumerate(pool.run(rank_quantized_gradients, config, dequantize)):
            _, ids, _ = make_input(config, rank, 6, 0)
            x = oracle.dequantize_blocks(*make_quantized(config, rank, 6, 0)).astype(np.float64)
            dy = make_input(config, rank, 6, 100)[0].astype(ml_dtypes.bfloat16).astype(np.float64)
            gain = np.where((ids >= 0) & (ids < config.num_slots), 1 + ids // config.experts_per_rank, 0)
            want = gain * (dy * x).sum(1, keepdims=True)
            np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_weights_have_gradients_beside_quantized_input(pools, transport):
    check_quantized_gradients(pools(2, transport))


def rank_strange_values(job, config):
    """NaN values and NaN scales, and scales given as bytes."""
    import jax

    import jax_nixlep as nx

    job.initialize(config)
    q = np.full((3, 128), 0x3A, np.uint8)
    q[0, 5] = 0xFF
    scales = np.array([[127], [255], [130]], np.uint8)
    send = jax.jit(functools.partial(nx.dispatch, config=config))
    return np.asarray(send(q.view(ml_dtypes.float8_e4m3fn), np.zeros((3, 1), np.int32), scales=scales).tokens)


def check_strange_values(pool):
    config = make_config(max_ranks=1, wire="fp8_e4m3", hidden=128, scale_format="ue8m0", top_k=1)
    tokens = pool.run(rank_strange_values, config)[0]
    nan = np.zeros((3, 128), bool)
    nan[0, 5] = nan[1] = True
    np.testing.assert_array_equal(np.isnan(tokens[:3]), nan)
    assert tokens[0, 0] == 1.25 and tokens[2, 0] == 10


def test_quantized_input_may_hold_nan(pools):
    check_strange_values(pools(1))


def test_gradients_pass_straight_through_fp8(pools):
    config = make_config(wire="fp8_e4m3", hidden=128, top_k=2, dtype="bfloat16")
    for gradient in pools(2).run(rank_wire_gradients, config):
        np.testing.assert_array_equal(gradient, np.full((4, 128), 2, ml_dtypes.bfloat16))


# --- In programs. ---


def rank_programs(job, config):
    """scan over layers, two layers in one jit, repeated calls: all must equal the same steps done one by one."""
    import jax

    import jax_nixlep as nx

    job.initialize(config)
    x, ids, weights = make_input(config, job.rank, 6, 0)
    other = make_input(config, job.rank, 6, 1)[1]

    def layer(x, ids):
        received = nx.dispatch(x, ids, weights, config=config)
        return nx.combine(received.tokens * 0.5, received.handle, config=config)

    one = jax.jit(layer)
    eager = layer(x, ids)
    same_bits(np.asarray(one(x, ids)), np.asarray(eager))
    same_bits(np.asarray(one(x, ids)), np.asarray(eager))

    stepwise = x
    for _ in range(5):
        stepwise = one(stepwise, ids)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda h, _: (layer(h, ids), None), x, length=5)[0])(x)
    same_bits(np.asarray(scanned), np.asarray(stepwise))

    both = jax.jit(lambda x: layer(layer(x, ids), other))
    same_bits(np.asarray(both(x)), np.asarray(one(one(x, ids), other)))

    unrolled = jax.jit(jax.grad(lambda x: layer(jax.checkpoint(lambda h: layer(h, other))(x), ids).sum()))(x)
    plain = jax.jit(jax.grad(lambda x: layer(layer(x, other), ids).sum()))(x)
    same_bits(np.asarray(unrolled), np.asarray(plain))
    return nx.current_group().health().operations


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_programs(pools, transport):
    operations = pools(2, transport).run(rank_programs, make_config(hidden=4))
    assert operations[0] == operations[1] > 40


def rank_micro_batches(job, config, runs, ordered):
    """Two independent micro-batches in one jit. Returns how many runs were right, and the first error."""
    import jax

    import jax_nixlep as nx

    job.initialize(config, timeout_s=20)
    x1, ids1, w1 = make_input(config, job.rank, 6, 0)
    x2, ids2, w2 = make_input(config, job.rank, 6, 1)

    def half(x, ids, w, gain, after):
        received = nx.dispatch(x, ids, w, config=config, after=after)
        return nx.combine(received.tokens * gain, received.handle, config=config), received.status.order

    @jax.jit
    def both(x1, x2):
        # Unequal work before each, so that neither is always ready first.
        y1, order = half(jnp.tanh(x1 @ jnp.ones((x1.shape[1],) * 2)) * 0 + x1, ids1, w1, 1.0, None)
        y2, _ = half(x2, ids2, w2, 3.0, order if ordered else None)
        return y1, y2

    want = [None, None]
    right, error = 0, None
    for _ in range(runs):
        try:
            y1, y2 = both(x1, x2)
            got = np.asarray(y1), np.asarray(y2)
        except (jax.errors.JaxRuntimeError, ValueError) as raised:
            error = str(raised)
            break
        want = got if want[0] is None else want
        same_bits(got[0], want[0])
        same_bits(got[1], want[1])
        right += 1
    return right, error, want


@pytest.mark.parametrize("ordered", [True, False])
def test_independent_micro_batches_are_right_or_refused(pools, ordered):
    config = make_config(max_ranks=4)
    answers = pools(4).run(rank_micro_batches, config, 1000, ordered)
    inputs = [[make_input(config, r, 6, seed) for r in range(4)] for seed in (0, 1)]
    for half, gain in ((0, 1.0), (1, 3.0)):
        xs, ids, weights = (list(column) for column in zip(*inputs[half], strict=True))
        received = oracle.dispatch(xs, ids, weights, config)
        expected = oracle.combine([(r.tokens * np.float32(gain)) for r in received], received, config)
        for rank, (right, error, want) in enumerate(answers):
            if ordered:
                assert error is None
            if error is None:
                assert right == 1000
                same_bits(want[half], expected[rank])
            else:
                assert "same order" in error or "failed" in error or "has left" in error, error


def rank_begins_anew(job, config):
    """Rank 1 is so late that its words to the first group come when rank 0 has begun a second one."""
    import jax

    import jax_nixlep as nx

    send = jax.jit(functools.partial(nx.dispatch, config=config))
    back = jax.jit(functools.partial(nx.combine, config=config))

    def step(seed):
        received = send(*make_input(config, job.rank, 6, seed, "distinct"))
        return np.asarray(back(received.tokens, received.handle))

    job.initialize(config, timeout_s=1)
    step(0)
    if job.rank == 1:
        time.sleep(3)
    with contextlib.suppress(jax.errors.JaxRuntimeError, ValueError):  # the latter: jax's quick path for compiled calls
        step(1)
    failure = nx.current_group().health().failure
    nx.shutdown()
    job.initialize(config)
    out = []
    for seed in (2, 3):
        if job.rank == 1:
            time.sleep(0.5)  # meanwhile rank 0 sees no word but the late ones, whose numbers are what it waits for
        out.append(step(seed))
    return failure, out


def check_begins_anew(pool):
    config = make_config()
    answers = pool.run(rank_begins_anew, config)
    assert all(failure for failure, _ in answers)  # of the first group
    for i, seed in enumerate((2, 3)):
        inputs = [make_input(config, r, 6, seed, "distinct") for r in range(2)]
        expected = oracle.dispatch(*(list(column) for column in zip(*inputs, strict=True)), config)
        ys = oracle.combine([e.tokens for e in expected], expected, config)
        for rank, (_, out) in enumerate(answers):
            same_bits(out[i], ys[rank])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_late_words_of_an_earlier_group_count_for_nothing(pools, transport):
    check_begins_anew(pools(2, transport))


def test_no_collective_and_no_membership_in_the_program(pools):
    texts = pools(2).run(rank_lower)
    assert texts[0] == texts[1]  # both ranks would share one entry of the compilation cache
    for word in ("all-gather", "all_gather", "all-to-all", "all_to_all", "collective", "all-reduce", "all_reduce"):
        assert word not in texts[0][0]
    assert texts[0][0].count("jax_nixlep_dispatch") == 1 and texts[0][0].count("jax_nixlep_combine") == 2
    assert "jax_nixlep_dispatch" in texts[0][1]  # the CUDA lowering, made on a machine without one


def rank_lower(job):
    import jax

    import jax_nixlep as nx

    config = make_config()
    job.initialize(config)
    x, ids, weights = make_input(config, 0, 6, 0)

    def loss(x, weights):
        received = nx.dispatch(x, ids, weights, config=config)
        return nx.combine(received.tokens, received.handle, config=config).sum()

    traced = jax.jit(jax.value_and_grad(loss)).trace(x, weights)
    return traced.lower().as_text(), traced.lower(lowering_platforms=("cuda",)).as_text()
