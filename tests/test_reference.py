"""The plain JAX ops against numpy loops (`oracle`), closed forms, and a dense layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from test_ops import make_quantized

import jax_nixlep as nx
from jax_nixlep import quant, reference
from jax_nixlep.config import EpConfig
from jax_nixlep.routing import PEER_ABSENT, PEER_OK, Handle

if len(jax.devices()) < 8:
    pytest.skip("jax was started with fewer than 8 devices", allow_module_level=True)


def make_config(**changes):
    base = {"max_ranks": 4, "experts_per_rank": 2, "max_tokens_per_rank": 5, "hidden": 8, "top_k": 3}
    return EpConfig(**(base | {"dtype": jnp.float32} | changes))


def mapped(f, ranks, check_vma=True, **kwargs):
    """Runs f on each of `ranks` devices; arguments and results gain a leading axis of ranks."""
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("ep",))

    def body(*args):
        return jax.tree.map(lambda a: a[None], f(*jax.tree.map(lambda a: a[0], args)))

    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=check_vma, **kwargs))


@functools.cache
def dispatch_on(config, ranks, **options):
    return mapped(lambda x, ids, w: reference.dispatch(x, ids, w, config=config, **options), ranks)


@functools.cache
def combine_on(config, ranks):
    return mapped(lambda out, handle, w: reference.combine(out, handle, w, config=config), ranks)


def random_input(config, ranks, tokens, seed, kind="any"):
    rng = np.random.default_rng(seed)
    shape = (ranks, tokens, config.top_k)
    x = rng.standard_normal((ranks, tokens, config.hidden)).astype(config.dtype)
    ids = rng.integers(0, ranks * config.experts_per_rank, shape).astype(np.int32)
    if kind == "any":
        ids = np.where(rng.random(shape) < 0.3, -1, ids)
        strange = rng.choice([-2, -(2**31), 2**31 - 1, config.num_slots, config.num_slots - 1], shape)
        ids = np.where(rng.random(shape) < 0.1, strange, ids)
    elif kind == "repeated":
        ids[..., 1:] = np.where(rng.random(shape)[..., 1:] < 0.5, ids[..., :1], ids[..., 1:])
    elif kind == "one expert":
        ids = np.full(shape, rng.integers(0, ranks * config.experts_per_rank))
    elif kind == "none":
        ids = np.full(shape, -1)
    weights = rng.standard_normal(shape).astype(np.float32)
    return x, ids.astype(np.int32), weights


def assert_same_bits(got, want, what):
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    if got.dtype.itemsize == 1:
        got, want = got.view(np.uint8), want.view(np.uint8)
    np.testing.assert_array_equal(got, want, err_msg=what)


def assert_received(received, want, ranks):
    for r in range(ranks):
        got = jax.tree.map(lambda a, r=r: np.asarray(a)[r], received)
        assert_same_bits(got.tokens, want[r].tokens, "tokens")
        assert_same_bits(got.group_sizes, want[r].group_sizes, "group_sizes")
        assert_same_bits(got.demand, want[r].demand, "demand")
        for field in Handle._fields:
            assert_same_bits(getattr(got.handle, field), getattr(want[r], field), field)
        assert (got.status.dropped, got.status.invalid_ids) == (want[r].dropped, want[r].invalid_ids)
        members = np.arange(got.status.peers.shape[0]) < ranks
        assert got.status.order == 0
        np.testing.assert_array_equal(got.status.peers, np.where(members, PEER_OK, PEER_ABSENT))
        if want[r].scales is None:
            assert got.scales is None
        else:
            assert_same_bits(got.scales, want[r].scales, "scales")


CASES = {  # config, ranks, tokens of each rank, ops that get weights
    "f32": (make_config(), 4, 5, "dispatch"),
    "f32, drops": (make_config(recv_capacity=7), 4, 5, "combine"),
    "f32, fewer rows than experts": (make_config(experts_per_rank=5, recv_capacity=3), 2, 4, "both"),
    "f32 over bf16": (make_config(wire="bf16"), 3, 5, "both"),
    "bf16": (make_config(dtype=jnp.bfloat16, top_k=5, recv_capacity=20), 4, 3, "combine"),
    "f16 over bf16": (make_config(dtype=jnp.float16, wire="bf16"), 4, 5, "dispatch"),
    "f16": (make_config(dtype=jnp.float16), 1, 5, "dispatch"),
    "bf16 over fp8": (make_config(dtype=jnp.bfloat16, wire="fp8_e4m3", hidden=256), 3, 4, "combine"),
    "f32 over fp8": (make_config(wire="fp8_e4m3", hidden=128, scale_format="ue8m0"), 2, 5, "dispatch"),
    "8 ranks": (make_config(max_ranks=8, experts_per_rank=1, top_k=2), 8, 2, "none"),
    "no tokens": (make_config(), 2, 0, "both"),
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["any", "any", "repeated", "one expert", "none"]),
)
def test_same_bits_as_loops(case, seed, kind):
    config, ranks, tokens, weighted = CASES[case]
    x, ids, weights = random_input(config, ranks, tokens, seed, kind)
    first = weights if weighted in ("dispatch", "both") else None
    received = dispatch_on(config, ranks)(x, ids, first)
    want = oracle.dispatch(list(x), list(ids), None if first is None else list(first), config)
    assert_received(received, want, ranks)

    out = np.random.default_rng(seed + 1).standard_normal(received.tokens.shape).astype(config.dtype)
    second = weights[:, :, ::-1] if weighted in ("combine", "both") else None
    y = combine_on(config, ranks)(out, received.handle, second)
    want_y = oracle.combine(list(out), want, config, None if second is None else list(second))
    for r in range(ranks):
        assert_same_bits(y[r], want_y[r], "combine")


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_fp8_values_and_scales(scale_format):
    config = make_config(wire="fp8_e4m3", hidden=256, dtype=jnp.bfloat16, scale_format=scale_format)
    x, ids, weights = random_input(config, 4, 5, 0)
    received = dispatch_on(config, 4, dequantize=False)(x, ids, weights)
    assert_received(received, oracle.dispatch(list(x), list(ids), list(weights), config, dequantize=False), 4)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_quantized_input(scale_format, dequantize, as_bytes):
    if as_bytes and scale_format == "float32":
        pytest.skip("only exponents are bytes")
    config = make_config(wire="fp8_e4m3", hidden=256, dtype=jnp.bfloat16, scale_format=scale_format)
    _, ids, weights = random_input(config, 4, 5, 0)
    q, scales = (list(column) for column in zip(*(make_quantized(config, r, 5, 0) for r in range(4)), strict=True))
    given = np.stack(scales)

    def op(q, ids, weights, scales):
        return reference.dispatch(q, ids, weights, config=config, scales=scales, dequantize=dequantize)

    received = mapped(op, 4)(np.stack(q), ids, weights, given.view(np.uint8) if as_bytes else given)
    want = oracle.dispatch(q, list(ids), list(weights), config, scales=scales, dequantize=dequantize)
    assert_received(received, want, 4)


def test_capacity_of_one_call():
    config, rows = make_config(), 6
    x, ids, weights = random_input(config, 4, 5, 1)
    received = dispatch_on(config, 4, recv_capacity=rows)(x, ids, weights)
    assert_received(received, oracle.dispatch(list(x), list(ids), list(weights), config, recv_capacity=rows), 4)


@settings(max_examples=200, deadline=None)
@given(demand=st.lists(st.integers(0, 12), min_size=4, max_size=4), rows=st.integers(1, 50))
def test_water_filling(demand, rows):
    kept = np.asarray(jax.jit(reference._limit)(jnp.array(demand), rows))
    assert kept.tolist() == oracle.limits(demand, rows)
    assert kept.sum() == min(sum(demand), rows)


def test_one_rank_without_a_mesh():
    config = make_config(max_ranks=2)
    x, ids, weights = random_input(config, 1, 5, 2)
    dispatch = jax.jit(functools.partial(reference.dispatch, config=config, axis=None))
    received = dispatch(x[0], ids[0], weights[0])
    want = oracle.dispatch(list(x), list(ids), list(weights), config)
    assert_received(jax.tree.map(lambda a: a[None], received), want, 1)
    combine = jax.jit(functools.partial(reference.combine, config=config, axis=None))
    y = combine(received.tokens, received.handle, after=received.status.order)
    assert_same_bits(y, oracle.combine([want[0].tokens], want, config)[0], "combine")


# Gradients


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("where", ["dispatch", "combine"])
def test_identity_experts(where, check_vma):
    """y = x * sum(w): dx = dy * sum(w), dw[t, k] = <dy[t], x[t]>, also for repeated ids."""
    config = make_config()
    x, ids, weights = random_input(config, 4, 5, 3, "repeated")
    ids[0, 0] = [-1, 99, ids[0, 0, 2]]
    valid = (ids >= 0) & (ids < 8)
    dy = np.random.default_rng(4).standard_normal(x.shape).astype(np.float32)

    def layer(x, w, ids):
        received = reference.dispatch(x, ids, w if where == "dispatch" else None, config=config)
        return reference.combine(received.tokens, received.handle, None if where == "dispatch" else w, config=config)

    def grads(x, w, ids, dy):
        y, pull = jax.vjp(lambda x, w: layer(x, w, ids), x, w)
        return y, *pull(dy)

    y, dx, dw = mapped(grads, 4, check_vma)(x, weights, ids, dy)
    total = np.where(valid, weights, 0).sum(-1, keepdims=True)
    np.testing.assert_allclose(y, x * total, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, dy * total, rtol=1e-5, atol=1e-5)
    inner = np.where(valid, (dy * x).sum(-1, keepdims=True), 0)
    np.testing.assert_allclose(dw, inner, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wire", ["same", "bf16", "fp8_e4m3"])
def test_gradient_bits(wire):
    """Token cotangents travel like combine with unit weights, combine's like dispatch; both in the combine wire."""
    config = make_config(wire=wire, hidden=128, recv_capacity=16)
    x, ids, weights = random_input(config, 4, 5, 5)
    want = oracle.dispatch(list(x), list(ids), list(weights), config)
    rng = np.random.default_rng(6)
    d_rows = rng.standard_normal((4, 16, 128)).astype(np.float32)
    out = rng.standard_normal(d_rows.shape).astype(np.float32)
    dy = rng.standard_normal(x.shape).astype(np.float32)

    def dispatch_grad(x, ids, d_rows):
        return jax.vjp(lambda x: reference.dispatch(x, ids, config=config).tokens, x)[1](d_rows)[0]

    def combine_grad(out, handle, dy):
        def combine(out, w):
            return reference.combine(out, handle._replace(row_weights=w), config=config)

        return jax.vjp(combine, out, handle.row_weights)[1](dy)

    dx = mapped(dispatch_grad, 4)(x, ids, d_rows)
    units = [w._replace(row_weights=np.ones(16, np.float32)) for w in want]
    for got, expected in zip(dx, oracle.combine(list(d_rows), units, config), strict=True):
        assert_same_bits(got, expected, "dx")

    handles = jax.tree.map(lambda *a: np.stack(a), *[Handle(w.expert_ids, w.row_of, w.row_weights) for w in want])
    d_out, d_w = mapped(combine_grad, 4)(out, handles, dy)
    wired = [oracle.to_combine_wire(g, config).astype(np.float32) for g in dy]
    sent = oracle.dispatch(wired, list(ids), None, make_config(hidden=128, recv_capacity=16))
    for r in range(4):
        assert_same_bits(d_out[r], want[r].row_weights[:, None] * sent[r].tokens, "d expert_out")
        np.testing.assert_allclose(d_w[r], (sent[r].tokens * out[r]).sum(-1), rtol=1e-5, atol=1e-5)


def dense_layer(x, ids, weights, matrices):
    """All ranks' tokens [N, H] through tanh(x @ matrix) of their experts; matrices of all slots [S, H, H]."""
    every = jnp.tanh(jnp.einsum("nh,shd->nsd", x, matrices))
    chosen = jax.nn.one_hot(ids, matrices.shape[0])  # zeros for -1 and for ids outside
    return jnp.einsum("nks,nk,nsd->nd", chosen, weights, every)


def sparse_layer(x, ids, weights, matrices, config, **kwargs):
    received = reference.dispatch(x, ids, weights, config=config, **kwargs)
    ends = jnp.cumsum(received.group_sizes)
    expert = jnp.minimum(jnp.searchsorted(ends, jnp.arange(config.num_rows), side="right"), config.experts_per_rank - 1)
    out = jnp.tanh(jnp.einsum("ch,chd->cd", received.tokens, matrices[expert]))
    return reference.combine(out, received.handle, config=config, after=received.tokens, **kwargs)


@pytest.mark.parametrize(("how", "check_vma"), [("grad", True), ("grad", False), ("remat", True), ("scan", False)])
def test_like_a_dense_layer(how, check_vma):
    """Two layers on 4 ranks; loss and gradients of x, weights and experts."""
    config = make_config()
    x, ids, weights = random_input(config, 4, 5, 7)
    matrices = np.random.default_rng(8).standard_normal((4, 2, 8, 8)).astype(np.float32) / 3

    def sparse(x, weights, matrices, ids):
        layer = functools.partial(sparse_layer, config=config)
        if how == "remat":
            layer = jax.checkpoint(layer)
        if how == "scan":
            return jax.lax.scan(lambda x, w: (x + layer(x, ids, w, matrices), ()), x, jnp.stack([weights, -weights]))[0]
        x = x + layer(x, ids, weights, matrices)
        return x + layer(x, ids, -weights, matrices)

    def dense(x, weights, matrices):
        flat = [a.reshape(-1, a.shape[-1]) for a in (x, ids, weights)]
        all_experts = matrices.reshape(8, 8, 8)
        y = flat[0] + dense_layer(*flat, all_experts)
        return y + dense_layer(y, flat[1], -flat[2], all_experts)

    spread = mapped(sparse, 4, check_vma)
    args = x, weights, matrices
    loss, got = jax.jit(jax.value_and_grad(lambda *a: (spread(*a, ids) ** 2).sum(), (0, 1, 2)))(*args)
    want_loss, want = jax.jit(jax.value_and_grad(lambda *a: (dense(*a) ** 2).sum(), (0, 1, 2)))(*args)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


def test_two_groups_on_a_mesh():
    """ep beside dp: one group for each coordinate of dp, experts replicated over dp."""
    config = make_config(max_ranks=2)
    x, ids, weights = random_input(config, 4, 5, 9)
    ids = np.where(ids < 4, ids, -1)
    matrices = np.random.default_rng(10).standard_normal((4, 8, 8)).astype(np.float32) / 3
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "ep"))
    data = P(("dp", "ep"))
    spread = jax.shard_map(
        functools.partial(sparse_layer, config=config), mesh=mesh, in_specs=(data, data, data, P("ep")), out_specs=data
    )
    flat = [a.reshape(-1, a.shape[-1]) for a in (x, ids, weights)]

    def loss(layer, x, w, m):
        return (layer(x, flat[1], w, m) ** 2).sum()

    args = flat[0], flat[2], matrices
    got = jax.jit(jax.grad(functools.partial(loss, spread), (0, 1, 2)))(*args)
    want = jax.jit(jax.grad(functools.partial(loss, dense_layer), (0, 1, 2)))(*args)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


def test_replicated_tokens_get_the_sum_of_the_gradients():
    config = make_config()
    x, ids, weights = (a[0] for a in random_input(config, 1, 5, 11))
    mesh = Mesh(np.array(jax.devices()[:4]), ("ep",))

    def total(x, ids, w):
        received = reference.dispatch(x, ids, w, config=config)
        return jax.lax.psum(reference.combine(received.tokens, received.handle, config=config).sum(), "ep")

    spread = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=P(), out_specs=P()))
    dx, dw = jax.grad(spread, (0, 2))(x, ids, weights)
    valid = (ids >= 0) & (ids < 8)
    np.testing.assert_allclose(
        dx, np.broadcast_to(4 * np.where(valid, weights, 0).sum(-1, keepdims=True), x.shape), rtol=1e-4
    )
    np.testing.assert_allclose(dw, np.where(valid, 4 * x.sum(-1, keepdims=True), 0), rtol=1e-4)


def test_dropped_tokens_get_no_gradient():
    config = make_config(recv_capacity=1, top_k=1)
    x, _, weights = random_input(config, 4, 5, 12)
    ids = np.zeros((4, 5, 1), np.int32)

    def grads(x, w):
        def total(x, w):
            received = reference.dispatch(x, ids[0], w, config=config)
            return reference.combine(received.tokens, received.handle, config=config).sum()

        return jax.grad(total, (0, 1))(x, w)

    dx, dw = mapped(grads, 4)(x, weights)
    kept = np.zeros((4, 5, 1), bool)
    kept[0, 0] = True
    np.testing.assert_allclose(dx, np.broadcast_to(np.where(kept, weights, 0), x.shape), rtol=1e-5)
    np.testing.assert_allclose(dw, np.where(kept, x.sum(-1, keepdims=True), 0), rtol=1e-5)


# Bad input


def call_dispatch(x=None, ids=None, config=None, tokens=5, **kwargs):
    config = config or make_config()
    x = jnp.zeros((tokens, 8)) if x is None else x
    ids = jnp.zeros((tokens, 3), jnp.int32) if ids is None else ids
    return reference.dispatch(x, ids, config=config, **({"axis": None} | kwargs))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokens": 6}, "dispatch: x must have at most max_tokens_per_rank=5 tokens; got 6; dispatch in chunks"),
        ({"x": jnp.zeros((5, 9))}, r"dispatch: x must be float32 \[5, 8\]; got float32 \[5, 9\]; cast or reshape"),
        ({"x": jnp.zeros((5, 8), jnp.bfloat16)}, r"dispatch: x must be float32 \[5, 8\]; got bfloat16"),
        ({"x": jnp.zeros((5, 8, 1))}, r"dispatch: x must be .*; got float32 \[5, 8, 1\]"),
        ({"ids": jnp.zeros((5, 2), jnp.int32)}, r"dispatch: expert_ids must be int32 \[5, 3\]; got int32 \[5, 2\]"),
        ({"ids": jnp.zeros((5, 3))}, "dispatch: expert_ids must be int32 .*; got float32"),
        ({"weights": jnp.zeros((5, 3), jnp.bfloat16)}, "dispatch: weights must be float32 .*; got bfloat16"),
        ({"dequantize": False}, 'dispatch: dequantize must be True for wire="same"; got False'),
        ({"axis": "ep"}, "dispatch: axis must be a mesh axis of an enclosing shard_map; got 'ep'; call it there"),
        ({"recv_capacity": 0}, "dispatch: recv_capacity must be a positive int or None; got 0"),
    ],
)
def test_dispatch_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        call_dispatch(**kwargs)


FP8 = make_config(wire="fp8_e4m3", hidden=256)
Q, SCALES = jnp.zeros((5, 256), jnp.float8_e4m3fn), jnp.zeros((5, 2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": Q}, "dispatch: scales must be given for an x of float8_e4m3fn; got None; pass those of quantize"),
        (
            {"x": Q[:, :8], "config": make_config(), "scales": SCALES},
            'scales must be None for wire="same"; got float32',
        ),
        (
            {"x": jnp.zeros((5, 256)), "scales": SCALES},
            r"dispatch: x must be float8_e4m3fn \[5, 256\]; got float32 .*; quan",
        ),
        (
            {"x": Q, "scales": SCALES[:, :1]},
            r"dispatch: scales must be float32 \[5, 2\]; got float32 \[5, 1\]; quantise",
        ),
        (
            {"x": Q, "scales": SCALES.astype(jnp.uint8)},
            r"dispatch: scales must be float32 \[5, 2\]; got uint8 \[5, 2\]",
        ),
        (
            {"x": Q, "scales": SCALES, "config": dataclasses.replace(FP8, scale_format="ue8m0")},
            r"dispatch: scales must be float8_e8m0fnu \[5, 2\]; got float32 \[5, 2\]; quantise with the config's",
        ),
    ],
)
@pytest.mark.parametrize("dispatch", [nx.dispatch, nx.dispatch_start, call_dispatch])
def test_dispatch_refuses_quantized_input(dispatch, kwargs, message):
    arguments = {"config": FP8} | kwargs
    with pytest.raises(ValueError, match=message):
        dispatch(arguments.pop("x"), jnp.zeros((5, 3), jnp.int32), **arguments)


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("dispatch", [nx.dispatch, functools.partial(reference.dispatch, axis=None)])
def test_refuses_gradients_of_quantized_input(dispatch, scale_format):
    config = dataclasses.replace(FP8, scale_format=scale_format)
    ids, weights = jnp.zeros((5, 3), jnp.int32), jnp.ones((5, 3))

    def loss(x, weights, stop=lambda values: values):
        q, scales = stop(quant.quantize(x, scale_format=scale_format, round_scale=config.round_scale))
        received = dispatch(q, ids, weights, config=config, scales=scales)
        return received.tokens.sum() + received.handle.row_weights.sum()

    def forward(x, weights):
        return jax.jvp(lambda x: loss(x, weights), (x,), (x,))

    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(jax.jit(loss)), forward):
        with pytest.raises(TypeError, match=r"dispatch: x and scales must not be differentiated .*; got a gradient"):
            jax.eval_shape(gradient, jnp.ones((5, 256)), weights)
    stopped = functools.partial(loss, stop=jax.lax.stop_gradient)
    jax.eval_shape(jax.grad(stopped, argnums=(0, 1)), jnp.ones((5, 256)), weights)


def test_combine_refuses():
    config, received = make_config(), call_dispatch()
    combine = functools.partial(reference.combine, config=config, axis=None)
    with pytest.raises(ValueError, match=r"combine: expert_out must be float32 \[40, 8\]; got float32 \[39, 8\]"):
        combine(received.tokens[1:], received.handle)
    with pytest.raises(ValueError, match="combine: weights must be float32"):
        combine(received.tokens, received.handle, jnp.zeros((5, 3), jnp.float16))
    with pytest.raises(TypeError, match="combine: handle must be a Handle; got Received"):
        combine(received.tokens, received)
    with pytest.raises(ValueError, match=r"combine: handle.row_of must be int32 \[2, 5, 3\]; got int32 \[4, 5, 3\]"):
        combine(received.tokens, received.handle, config=make_config(max_ranks=2))


def test_refuses_too_many_ranks():
    config = make_config(max_ranks=2)
    x, ids, weights = random_input(config, 4, 5, 0)
    with pytest.raises(ValueError, match="dispatch: axis must have at most max_ranks=2 ranks; got 4; raise"):
        dispatch_on(config, 4)(x, ids, weights)


def test_refuses_gradients_of_quantised_tokens():
    config = make_config(wire="fp8_e4m3", hidden=128)

    def loss(x):
        received = call_dispatch(x, config=config, dequantize=False)
        return (received.tokens.astype(jnp.float32).sum() + received.scales.sum()).sum()

    with pytest.raises(TypeError, match="dispatch: dequantize must be True for a gradient; got False"):
        jax.grad(loss)(jnp.ones((5, 128)))


def test_oracle_by_hand():
    """Pins the oracle itself: two ranks, one row repeated, one dropped, one invalid id."""
    config = make_config(max_ranks=2, experts_per_rank=2, top_k=2, recv_capacity=2, dtype=ml_dtypes.bfloat16)
    x = [np.full((2, 8), v, ml_dtypes.bfloat16) for v in (1, 2)]
    ids = [np.array([[0, 0], [3, -1]], np.int32), np.array([[0, 1], [1, 7]], np.int32)]
    w = [np.array([[0.5, 0.25], [2, 9]], np.float32), np.array([[3, 4], [5, 6]], np.float32)]
    a, b = oracle.dispatch(x, ids, w, config)
    # rank 0: expert 0 wants (0, 0), (1, 0); expert 1 wants (1, 0), (1, 1); one row each
    assert (a.demand.tolist(), a.group_sizes.tolist(), a.dropped, a.invalid_ids) == ([2, 2], [1, 1], 2, 0)
    assert a.tokens[:, 0].tolist() == [1, 2]
    assert a.row_weights.tolist() == [0.75, 4]
    assert a.row_of[:, :2].tolist() == [[[0, 0], [-1, -1]], [[-1, 1], [-1, -1]]]
    assert (b.demand.tolist(), b.tokens[:, 0].tolist(), b.invalid_ids) == ([0, 1], [1, 0], 1)
    y = oracle.combine([a.tokens, b.tokens], [a, b], config)
    assert [v[:, 0].tolist() for v in y] == [[0.75, 2], [8, 0]]
