"""`grouped_mlp` against one dense MLP per expert, through the blocks of the CPU and through ragged_dot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_nixlep import experts

C, E, H, F = 150, 4, 16, 24  # rows for more than two blocks
SIZES = {
    "uneven": [70, 0, 66, 3],
    "full": [0, 150, 0, 0],
    "empty": [0, 0, 0, 0],
    "last": [0, 0, 0, 1],
    "all": [40, 64, 1, 45],
}


def parameters(seed=0, biases=True):
    rng = np.random.default_rng(seed)
    shapes = {"wi_0": (E, H, F), "wi_1": (E, H, F), "wo": (E, F, H)}
    if biases:
        shapes |= {"bi_0": (E, F), "bi_1": (E, F), "bo": (E, H)}
    return {n: (rng.standard_normal(s) / 4).astype(np.float32) for n, s in shapes.items()}


def tokens_of(sizes, dtype=np.float32):
    rows = np.random.default_rng(1).standard_normal((C, H)).astype(dtype)
    rows[sum(sizes) :] = 0
    return rows


def chosen(sizes, rows=C):
    """[rows, E] float32, one-hot expert of each row; zeros on padding."""
    return np.pad(np.eye(E, dtype=np.float32)[np.repeat(np.arange(E), sizes)], ((0, rows - sum(sizes)), (0, 0)))


def dense(x, expert, p, act):
    """Every expert on every row; `expert` from `chosen` picks."""

    def linear(spec, x, w, b):
        return jnp.einsum(spec, x, p[w]) + p.get(b, np.zeros((E, 1)))

    gate = linear("ch,ehf->cef", x, "wi_0", "bi_0")
    up = linear("ch,ehf->cef", x, "wi_1", "bi_1") if "wi_1" in p else None
    return jnp.einsum("ce,ceh->ch", expert, linear("cef,efh->ceh", act(gate, up), "wo", "bo"))


def silu_gate(gate, up):
    return jax.nn.silu(gate) * up


def clamped_swiglu(gate, up):
    """By its definition, alpha 1.5 and limit 0.4."""
    gate = jnp.where(gate > 0.4, 0.4, gate)
    up = jnp.where(up > 0.4, 0.4, jnp.where(up < -0.4, -0.4, up))
    return (up + 1) * gate / (1 + jnp.exp(-1.5 * gate))


@pytest.fixture(params=["blocks", "ragged_dot"])
def backend(request, monkeypatch):
    if request.param == "ragged_dot":
        choose = jax.lax.platform_dependent
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, cpu, default: choose(*a, default=default))
    return request.param


@functools.cache
def value_and_gradients(name):
    """`name` is that of the backend, as what is compiled depends on it, or "dense"."""

    def run(x, p, rows, cotangent):
        def mlp(x, p):
            return dense(x, rows, p, silu_gate) if name == "dense" else experts.grouped_mlp(x, rows, **p)

        y, pull = jax.vjp(mlp, x, p)
        return y, *pull(cotangent)

    return jax.jit(run)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("case", SIZES)
def test_values_and_gradients(backend, case, biases):
    sizes, p = SIZES[case], parameters(biases=biases)
    x = tokens_of(sizes)
    cotangent = np.random.default_rng(2).standard_normal((C, H)).astype(np.float32)
    got = value_and_gradients(backend)(x, p, np.array(sizes, np.int32), cotangent)
    want = value_and_gradients("dense")(x, p, chosen(sizes), cotangent)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)
    used = sum(sizes)
    assert not np.asarray(got[0])[used:].any()
    assert not np.asarray(got[1])[used:].any()


@pytest.mark.parametrize(
    ("activation", "gated", "act"),
    [
        ("gelu", True, lambda g, u: jax.nn.gelu(g) * u),
        ("gelu", False, lambda g, u: jax.nn.gelu(g)),
        ("relu", False, lambda g, u: jnp.maximum(g, 0)),
        (jnp.tanh, False, lambda g, u: jnp.tanh(g)),
        (experts.ClampedSwiGLU(1.5, 0.4), True, clamped_swiglu),
    ],
)
def test_activations(activation, gated, act):
    p = parameters()
    if not gated:
        del p["wi_1"], p["bi_1"]
    sizes = SIZES["uneven"]
    x = tokens_of(sizes)
    got = experts.grouped_mlp(x, jnp.array(sizes), activation=activation, **({"wi_1": None} | p))
    np.testing.assert_allclose(got, dense(x, chosen(sizes), p, act or activation), rtol=2e-5, atol=2e-5)


def test_bfloat16_accumulates_in_float32(backend):
    sizes, p = SIZES["uneven"], parameters(biases=False)
    x = tokens_of(sizes, jnp.bfloat16)
    got = jax.jit(experts.grouped_mlp)(x, jnp.array(sizes), **p)
    assert got.dtype == jnp.bfloat16
    rounded = {n: np.asarray(v.astype(jnp.bfloat16), np.float32) for n, v in p.items()}
    want = dense(x.astype(np.float32), chosen(sizes), rounded, silu_gate)
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=2**-6, atol=2**-8)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 37), min_size=E, max_size=E))
def test_any_sizes(sizes):
    args = tokens_of(sizes), parameters()
    got, *_ = value_and_gradients("blocks")(*args, np.array(sizes, np.int32), tokens_of(sizes))
    want, *_ = value_and_gradients("dense")(*args, chosen(sizes), tokens_of(sizes))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert not np.asarray(got)[sum(sizes) :].any()


def test_fewer_rows_than_a_block():
    p = parameters()
    x = tokens_of([150])[:5]
    sizes = [2, 0, 1, 2]
    got = experts.grouped_mlp(x, jnp.array(sizes), **p)
    np.testing.assert_allclose(got, dense(x, chosen(sizes, 5), p, silu_gate), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map(check_vma):
    """Experts over ep, replicated over dp: their gradients are summed over dp; remat and scan as well."""
    if len(jax.devices()) < 4:
        pytest.skip("jax was started with fewer than 4 devices")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "ep"))
    p = {n: np.concatenate([v, v * 0.5]) for n, v in parameters().items()}  # 4 experts on each of 2 ranks
    sizes = [SIZES[c] for c in ("uneven", "all", "full", "last")]
    x = np.concatenate([tokens_of(s) for s in sizes])

    def layers(x, sizes, p):
        @jax.checkpoint
        def layer(x, _):
            return x + experts.grouped_mlp(x, sizes, **p), ()

        return jax.lax.scan(layer, x, length=2)[0]

    both = P(("dp", "ep"))
    spread = jax.shard_map(layers, mesh=mesh, in_specs=(both, both, P("ep")), out_specs=both, check_vma=check_vma)

    def loss(x, p):
        return (spread(x, np.concatenate(sizes).astype(np.int32), p) ** 2).sum()

    def dense_loss(x, p):
        total = 0.0
        for i, s in enumerate(sizes):
            local = {n: v[i % 2 * E : (i % 2 + 1) * E] for n, v in p.items()}
            y = x[i * C : (i + 1) * C]
            for _ in range(2):
                y = y + dense(y, chosen(s), local, silu_gate)
            total += (y**2).sum()
        return total

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, p) for f in (loss, dense_loss))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), got, want)


def test_only_ragged_dot_off_the_cpu():
    """The loop is the CPU's alone: a program lowered for GPUs has the ragged product and no loop."""
    args = tokens_of([150]), np.array(SIZES["all"], np.int32)
    traced = jax.jit(functools.partial(experts.grouped_mlp, **parameters())).trace(*args)
    assert "stablehlo.while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "ragged_dot" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wi_0": np.zeros((E, H))}, r"grouped_mlp: tokens, wi_0 must be \[C, H\], \[E, H, F\]; got"),
        ({"wi_1": np.zeros((E, H, 1))}, r"grouped_mlp: wi_1 must have shape \(4, 16, 24\); got \(4, 16, 1\); stack"),
        ({"wo": np.zeros((E, H, F))}, r"grouped_mlp: wo must have shape \(4, 24, 16\)"),
        ({"bo": np.zeros(H)}, r"grouped_mlp: bo must have shape \(4, 16\); got \(16,\)"),
        ({"group_sizes": np.zeros(3, np.int32)}, r"grouped_mlp: group_sizes must have shape \(4,\); got \(3,\)"),
        ({"group_sizes": np.zeros(4)}, "grouped_mlp: group_sizes must be int32; got float64"),
        ({"wi_1": None}, "grouped_mlp: bi_1 must be None without wi_1"),
        ({"activation": "swish"}, "grouped_mlp: activation must be one of .*; got 'swish'; pass the function itself"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        experts.grouped_mlp(
            **({"tokens": tokens_of([0]), "group_sizes": np.zeros(E, np.int32)} | parameters() | changes)
        )
