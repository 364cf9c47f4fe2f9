"""`route` against each family's own formula, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_nixlep.router import Router
from jax_nixlep.router import route as eager_route

route = jax.jit(eager_route, static_argnums=0, static_argnames="axis_names")
LOGITS = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
BIAS = np.random.default_rng(1).standard_normal(16).astype(np.float32) / 4


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def best(scores, k):
    return np.argsort(-scores, axis=-1, kind="stable")[:, :k]


def check(router, ids, weights, **kwargs):
    got = route(router, LOGITS, **kwargs)
    assert (got.expert_ids.dtype, got.weights.dtype, got.load.dtype) == (jnp.int32, jnp.float32, jnp.int32)
    np.testing.assert_array_equal(got.expert_ids, ids)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-5)
    np.testing.assert_array_equal(got.load, np.bincount(ids.ravel(), minlength=16))


def test_mixtral_and_gpt_oss():
    """Both are a softmax over the chosen logits."""
    ids = best(LOGITS, 2)
    check(Router(num_experts=16, top_k=2), ids, softmax(np.take_along_axis(LOGITS, ids, 1)))


def test_qwen3_moe():
    ids = best(LOGITS, 8)
    weights = np.take_along_axis(softmax(LOGITS), ids, 1)
    check(Router(num_experts=16, top_k=8), ids, weights / weights.sum(-1, keepdims=True))


def test_olmoe():
    ids = best(LOGITS, 8)
    check(Router(num_experts=16, top_k=8, normalize=False), ids, np.take_along_axis(softmax(LOGITS), ids, 1))


def test_llama4():
    ids = best(LOGITS, 1)
    weights = 1 / (1 + np.exp(-np.take_along_axis(LOGITS, ids, 1)))
    check(Router(num_experts=16, top_k=1, score="sigmoid", normalize=False), ids, weights)


@pytest.mark.parametrize("bias", [BIAS, BIAS - 3])  # with the second all biased scores are negative
def test_deepseek_v3(bias):
    router = Router(num_experts=16, top_k=4, score="sigmoid", scale=2.5, num_groups=4, top_k_groups=2)
    scores = 1 / (1 + np.exp(-LOGITS))
    biased = (scores + bias).reshape(9, 4, 4)
    groups = best(np.sort(biased, axis=-1)[..., -2:].sum(-1), 2)
    for t in range(9):
        biased[t, [g for g in range(4) if g not in groups[t]]] = -np.inf
    ids = best(biased.reshape(9, 16), 4)
    weights = np.take_along_axis(scores, ids, 1)
    check(router, ids, 2.5 * weights / weights.sum(-1, keepdims=True), bias=bias)


def test_deepseek_v2():
    router = Router(
        num_experts=16, top_k=3, normalize=False, scale=16.0, num_groups=8, top_k_groups=3, group_score_experts=1
    )
    scores = softmax(LOGITS)
    kept = best(scores.reshape(9, 8, 2).max(-1), 3)
    allowed = np.zeros((9, 8), bool)
    np.put_along_axis(allowed, kept, True, 1)
    ids = best(np.where(np.repeat(allowed, 2, 1), scores, -1), 3)
    check(router, ids, 16 * np.take_along_axis(scores, ids, 1))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_ties_go_to_the_lowest_id(score):
    router = Router(num_experts=16, top_k=4, score=score, num_groups=4, top_k_groups=2)
    routing = route(router, jnp.zeros((2, 16)))
    assert routing.expert_ids.tolist() == [[0, 1, 2, 3]] * 2
    np.testing.assert_allclose(routing.weights, 0.25, rtol=1e-6)


def test_masked_tokens_go_nowhere():
    router = Router(num_experts=16, top_k=3, load_balance_coef=0.5, z_loss_coef=0.25)
    mask = np.arange(9) % 3 > 0
    spoiled = np.where(mask[:, None], LOGITS, np.nan)

    def loss(logits):
        got = route(router, logits, token_mask=jnp.asarray(mask))
        return got.aux_loss + (got.weights * jnp.arange(3.0)).sum(), got

    (_, got), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(spoiled)
    want = route(router, LOGITS[mask])
    assert (np.asarray(got.expert_ids)[~mask] == -1).all()
    assert (np.asarray(got.weights)[~mask] == 0).all()
    np.testing.assert_array_equal(got.expert_ids[mask], want.expert_ids)
    np.testing.assert_array_equal(got.load, want.load)
    np.testing.assert_allclose(got.aux_loss, want.aux_loss, rtol=1e-6)
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[~mask] == 0).all()


def test_all_tokens_masked():
    got = route(Router(num_experts=16, top_k=3, z_loss_coef=1.0), LOGITS, token_mask=jnp.zeros(9, bool))
    assert (got.aux_loss, got.load.sum()) == (0, 0)


def test_losses():
    router = Router(num_experts=16, top_k=3, load_balance_coef=0.01, z_loss_coef=0.001)
    got = route(router, LOGITS)
    fraction = np.bincount(np.asarray(got.expert_ids).ravel(), minlength=16) / 9
    balance = 16 * (fraction * softmax(LOGITS).mean(0)).sum()
    z = (np.log(np.exp(LOGITS).sum(-1)) ** 2).mean()
    np.testing.assert_allclose(got.load_balance_loss, balance, rtol=1e-5)
    np.testing.assert_allclose(got.z_loss, z, rtol=1e-5)
    np.testing.assert_allclose(got.aux_loss, 0.01 * balance + 0.001 * z, rtol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_perfect_balance_costs_top_k(score):
    logits = jnp.tile(jnp.eye(4), (3, 1))
    got = route(Router(num_experts=4, top_k=1, score=score), logits)
    np.testing.assert_allclose(got.load_balance_loss, 1, rtol=1e-6)


def test_gradients_of_weights():
    router = Router(num_experts=16, top_k=3)
    ids = best(LOGITS, 3)
    cotangent = np.random.default_rng(2).standard_normal((9, 3)).astype(np.float32)
    grad = jax.grad(lambda logits: (route(router, logits).weights * cotangent).sum())(LOGITS)
    weights = softmax(np.take_along_axis(LOGITS, ids, 1))
    want = np.zeros_like(LOGITS)
    inner = weights * (cotangent - (weights * cotangent).sum(-1, keepdims=True))
    np.put_along_axis(want, ids, inner, 1)
    np.testing.assert_allclose(grad, want, atol=1e-6)


def test_bias_chooses_but_gets_no_gradient():
    router = Router(num_experts=16, top_k=3, score="sigmoid", load_balance_coef=1.0)

    def loss(bias):
        got = route(router, LOGITS, bias=bias)
        return got.weights[0, 0] + got.aux_loss

    assert not np.asarray(jax.grad(loss)(BIAS)).any()


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_losses_of_a_spread_batch(check_vma, masked):
    """The mean over ranks of losses and gradients is that of the whole batch, also with unequal counts."""
    if len(jax.devices()) < 4:
        pytest.skip("jax was started with fewer than 4 devices")
    router = Router(num_experts=16, top_k=3, load_balance_coef=0.3, z_loss_coef=0.1)
    logits = np.random.default_rng(3).standard_normal((20, 16)).astype(np.float32)
    mask = np.random.default_rng(4).random(20) < 0.5 if masked else None
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "ep"))
    axes = ("dp", "ep")

    def local(logits, mask=None):
        def loss_and_load(logits):
            got = eager_route(router, logits, token_mask=mask, axis_names=axes)
            return got.aux_loss, got.load

        (loss, load), grad = jax.value_and_grad(loss_and_load, has_aux=True)(logits)
        return jax.lax.pmean(loss, axes), load, grad / 4

    args = (logits,) if mask is None else (logits, mask)
    spread = jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=(P(), P(), P(axes)), check_vma=check_vma)
    loss, load, grad = jax.jit(spread)(*args)
    want = route(router, logits, token_mask=mask)
    np.testing.assert_allclose(loss, want.aux_loss, rtol=1e-5)
    np.testing.assert_array_equal(load, want.load)
    want_grad = jax.grad(lambda x: route(router, x, token_mask=mask).aux_loss)(logits)
    np.testing.assert_allclose(grad, want_grad, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), score=st.sampled_from(["softmax", "sigmoid"]), groups=st.sampled_from([1, 2, 4]))
def test_always_distinct_experts_of_the_best_scores(seed, score, groups):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal((5, 8)) * 2).astype(np.float32)  # many ties
    router = Router(num_experts=8, top_k=2, score=score, num_groups=groups, top_k_groups=1)
    got = route(router, logits)
    for ids, weights in zip(np.asarray(got.expert_ids), np.asarray(got.weights), strict=True):
        assert len(set(ids)) == 2
        assert len({i // (8 // groups) for i in ids}) == 1 or groups == 1
        assert weights[0] >= weights[1] > 0
    np.testing.assert_allclose(got.weights.sum(-1), 1, rtol=1e-5)
    assert got.load.sum() == 10


def test_is_static():
    assert hash(Router(num_experts=8, top_k=2)) == hash(Router(num_experts=8, top_k=2))


def test_no_tokens():
    got = route(Router(num_experts=8, top_k=2), jnp.zeros((0, 8)))
    assert got.expert_ids.shape == got.weights.shape == (0, 2)
    assert got.aux_loss == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 9}, "Router: top_k must be at most 8, the eligible experts; got 9; choose fewer"),
        ({"top_k": 5, "num_groups": 2}, "Router: top_k must be at most 4, the eligible experts; got 5"),
        ({"top_k": 0}, "Router: top_k must be positive; got 0"),
        ({"num_groups": 3}, "Router: num_groups must divide num_experts; got 3"),
        ({"num_groups": 2, "top_k_groups": 3}, "Router: top_k_groups must be at most num_groups; got 3"),
        ({"score": "tanh"}, 'Router: score must be "softmax" or "sigmoid"; got \'tanh\'; choose'),
    ],
)
def test_router_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Router(**({"num_experts": 8, "top_k": 2} | kwargs))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((jnp.zeros((3, 7)),), {}, r"route: logits must be float32 \(3, 8\); got float32 \(3, 7\); reshape or cast"),
        ((jnp.zeros((3, 8), jnp.bfloat16),), {}, r"route: logits must be float32 \(3, 8\); got bfloat16 \(3, 8\)"),
        ((jnp.zeros(8),), {}, r"route: logits must be float32"),
        ((jnp.zeros((3, 8)),), {"bias": jnp.zeros(7)}, r"route: bias must be float32 \(8,\); got float32 \(7,\)"),
        ((jnp.zeros((3, 8)),), {"token_mask": jnp.ones(3)}, r"route: token_mask must be bool \(3,\); got float32"),
    ],
)
def test_route_refuses(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        eager_route(Router(num_experts=8, top_k=2), *args, **kwargs)
