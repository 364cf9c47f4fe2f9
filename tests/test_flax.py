"""The Flax modules: the parameters of `nixlep_moe`, its results, and where the parameters live."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_nixlep as nx
from jax_nixlep.flax import linen as ep_linen
from jax_nixlep.flax import nnx as ep_nnx
from jax_nixlep.placement import identity_placement

EXPERTS = 8
ROUTER = nx.Router(num_experts=EXPERTS, top_k=2, load_balance_coef=0.1, z_loss_coef=0.01)
PLAIN = {"router": ROUTER, "mlp_dim": 12}
ALL = PLAIN | {"shared_mlp_dim": 4, "use_bias": True, "use_gate_bias": True, "use_score_bias": True}
MLP = ALL | {"gated": False, "activation": "gelu"}
AXES = {
    "gate": ("embed", "exp_router"),
    "gate_bias": ("exp_router",),
    "score_bias": ("exp_router",),
    "wi_0": ("exp", "embed", "mlp"),
    "wi_1": ("exp", "embed", "mlp"),
    "wo": ("exp", "mlp", "embed"),
    "bi_0": ("exp", "mlp"),
    "bi_1": ("exp", "mlp"),
    "bo": ("exp", "embed"),
    "shared_wi_0": ("embed", "mlp"),
    "shared_wi_1": ("embed", "mlp"),
    "shared_wo": ("mlp", "embed"),
}


def make_config(ranks, dtype=jnp.float32):
    return nx.EpConfig(
        max_ranks=ranks, experts_per_rank=EXPERTS // ranks, max_tokens_per_rank=24, hidden=8, top_k=2, dtype=dtype
    )


def make_mesh(ranks):
    return Mesh(np.array(jax.devices()[:ranks]), ("ep",))


def tokens(seed=0, shape=(4, 6, 8), dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def make_nnx(config, options, **where):
    return nnx.jit(lambda: ep_nnx.NixlEpMoE(config=config, rngs=nnx.Rngs(7), **options, **where))()


def init_linen(module, seed=7):
    return jax.jit(module.init)(jax.random.key(seed), tokens())


def nnx_params(layer):
    return {name: np.asarray(getattr(layer, name)[...]) for name in layer.param_names}


def linen_params(variables):
    variables = nn.unbox(variables)
    return {k: np.asarray(v) for tree in variables.values() for k, v in tree.items()}


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(PLAIN, jnp.float32), (MLP, jnp.float32), (ALL, jnp.bfloat16)],
    ids=["plain", "mlp", "all-bfloat16"],
)
def test_the_modules_are_nixlep_moe(options, dtype):
    config = make_config(1, dtype)
    x, mask = tokens(), jax.random.bernoulli(jax.random.key(1), 0.8, (4, 6))
    placement = identity_placement(EXPERTS, [0], EXPERTS)
    static = {"config": config, "router": ROUTER, "backend": "xla", "activation": options.get("activation", "silu")}

    @jax.jit
    def functional(params, x, mask):
        return nx.nixlep_moe(x.astype(dtype), params, token_mask=mask, placement=placement, **static)

    layer = make_nnx(config, options, backend="xla")
    got = nnx.jit(lambda layer, x, mask: layer(x, mask, placement))(layer, x, mask)
    assert_same(got, functional(nnx_params(layer), x, mask))
    assert got[0].dtype == dtype and not np.asarray(got[0])[~np.asarray(mask)].any()

    module = ep_linen.NixlEpMoE(config, backend="xla", **options)
    variables = init_linen(module)
    got = jax.jit(module.apply)(variables, x, mask, placement)
    assert_same(got, functional(linen_params(variables), x, mask))
    shapes = jax.tree.map(jnp.shape, nnx_params(layer))
    assert shapes == jax.tree.map(jnp.shape, linen_params(variables))


@pytest.mark.parametrize("gated", [True, False])
def test_parameters_have_logical_axes(gated):
    options = ALL | {"gated": gated, "param_dtype": jnp.bfloat16}
    names = {name for name in AXES if gated or not name.endswith("_1")}
    layer = make_nnx(make_config(1), options, backend="xla")
    assert set(layer.param_names) == names
    boxed = init_linen(ep_linen.NixlEpMoE(config=make_config(1), backend="xla", **options))
    assert set(boxed) == {"params", "router_state"} and set(boxed["router_state"]) == {"score_bias"}
    boxed = boxed["params"] | boxed["router_state"]
    assert set(boxed) == names
    for name in names:
        variable = getattr(layer, name)
        assert variable.get_metadata("out_sharding") == AXES[name] == boxed[name].names
        assert isinstance(variable, ep_nnx.RouterState if name == "score_bias" else nnx.Param)
        assert variable.dtype == boxed[name].unbox().dtype == (jnp.float32 if name == "score_bias" else jnp.bfloat16)


def test_initial_experts_do_not_depend_on_the_number_of_ranks():
    config = make_config(1)
    whole = nnx_params(ep_nnx.NixlEpMoE(config, ROUTER, 12, backend="xla", rngs=nnx.Rngs(7)))  # not under jit
    linen_whole = linen_params(init_linen(ep_linen.NixlEpMoE(config=config, backend="xla", **PLAIN)))
    assert not np.array_equal(whole["wi_0"][0], whole["wi_0"][1])
    for ranks in (2, 4):
        config, mesh = make_config(ranks), make_mesh(ranks)
        assert_same(nnx_params(make_nnx(config, PLAIN, mesh=mesh)), whole)
        module = ep_linen.NixlEpMoE(config=config, mesh=mesh, backend="xla", **PLAIN)
        assert_same(linen_params(init_linen(module)), linen_whole)
        for rank in (0, ranks - 1):
            mine = slice(rank * config.experts_per_rank, (rank + 1) * config.experts_per_rank)
            expected = {k: v[mine] if AXES[k][0] == "exp" else v for k, v in whole.items()}
            assert_same(nnx_params(make_nnx(config, PLAIN, rank=rank)), expected)


def test_nnx_parameters_are_made_where_they_live():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("ep", "tp"))
    layer = make_nnx(make_config(4), ALL, mesh=mesh, tensor_axis="tp", backend="xla")
    specs = {name: getattr(layer, name)[...].sharding.spec for name in layer.param_names}
    assert specs["wi_0"] == P("ep", None, "tp") and specs["wo"] == P("ep", "tp") and specs["bi_1"] == P("ep", "tp")
    assert specs["shared_wo"] == P("tp") and specs["gate"] == P() and specs["bo"] == P("ep")
    abstract = nnx.get_partition_spec(nnx.state(layer))
    assert abstract["wi_1"].get_value() == P("ep", None, "tp")

    with nnx.logical_axis_rules((("embed", "tp"), ("mlp", None))):
        layer = make_nnx(make_config(4), PLAIN, mesh=mesh, backend="xla")
    assert layer.wi_0[...].sharding.spec == P("ep", "tp")


def test_linen_parameters_can_be_placed_by_the_rules():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("ep", "tp"))
    module = ep_linen.NixlEpMoE(config=make_config(4), mesh=mesh, tensor_axis="tp", backend="xla", **PLAIN)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens())
    rules = ep_linen.logical_axis_rules("ep", "tp")
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), mesh, rules)
    variables = jax.jit(module.init, out_shardings=shardings)(jax.random.key(0), tokens())
    assert nn.unbox(variables)["params"]["wo"].sharding.spec == P("ep", "tp", None)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.remat], ids=["plain", "remat"])
def test_gradients_of_nnx(wrap):
    config, x = make_config(1), tokens()
    layer = make_nnx(config, ALL, backend="xla")

    @wrap
    def loss(layer, x):
        y, aux = layer(x)
        return jnp.sum(y**2) + aux.loss

    def functional(params, x):
        y, aux = nx.nixlep_moe(x, params, config=config, router=ROUTER, backend="xla")
        return jnp.sum(y**2) + aux.loss

    grads = nnx.jit(nnx.grad(loss))(layer, x)
    want = jax.jit(jax.grad(functional))(nnx_params(layer), x)
    assert set(grads) == set(want) - {"score_bias"}
    for name in grads:
        np.testing.assert_allclose(grads[name][...], want[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.abs(want[name]).max() > 0
    assert not np.asarray(want["score_bias"]).any()


def test_gradients_of_linen_under_remat_and_scan_of_layers():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.remat(ep_linen.NixlEpMoE)(config=make_config(1), backend="xla", **ALL)
            for _ in range(2):  # the same layer twice
                y, aux = layer(x)
                x = x + y
            return jnp.sum(x**2) + aux.loss

    x = tokens()
    variables = nn.unbox(init_linen(Stack()))
    state = {"router_state": variables["router_state"]}
    grads = jax.jit(jax.grad(lambda params: Stack().apply({"params": params} | state, x)))(variables["params"])
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_a_training_step_keeps_parameters_in_their_place():
    mesh, x = make_mesh(4), tokens()

    def create():
        layer = make_nnx(make_config(4), ALL, mesh=mesh, backend="xla")
        return layer, nnx.Optimizer(layer, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda layer: jnp.mean((layer(x)[0] - x) ** 2))(layer)
        optimizer.update(layer, grads)
        return loss

    layer, optimizer = nnx.jit(create)()
    losses = [float(step(layer, optimizer, x)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert layer.wi_0[...].sharding.spec == P("ep")
    assert optimizer.opt_state[0].mu["wi_0"][...].sharding.spec == P("ep")
    assert not layer.score_bias[...].any()


def test_inside_the_users_own_shard_map():
    mesh, x = make_mesh(4), tokens()
    layer = make_nnx(make_config(4), ALL, mesh=mesh, backend="xla")
    graph, state = nnx.split(make_nnx(make_config(4), ALL, rank=0, backend="xla", token_axes=("ep",)))
    state = nnx.merge_state(state, nnx.state(layer))
    specs = nnx.get_partition_spec(nnx.state(layer))

    def body(state, x):
        return nnx.merge(graph, state)(x)[0]

    mapped = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(specs, P("ep")), out_specs=P("ep")))
    assert_same(mapped(state, x), nnx.jit(lambda layer, x: layer(x)[0])(layer, x))


def test_native_over_virtual_devices_is_the_xla_backend():
    mesh, x = make_mesh(2), tokens()
    config = make_config(2)
    nx.initialize(config, mesh=mesh, axis="ep", timeout_s=20)
    try:
        native, xla = make_nnx(config, ALL, mesh=mesh), make_nnx(config, ALL, mesh=mesh, backend="xla")
        run = nnx.jit(nnx.value_and_grad(lambda layer, x: jnp.sum(layer(x)[0] ** 2)))
        got = jax.block_until_ready(run(native, x))
        assert_same(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, run(xla, x)))
    finally:
        nx.shutdown()


def test_native_needs_a_group():
    with pytest.raises(RuntimeError, match="initialize"):
        make_nnx(make_config(2), PLAIN)


# --- Independent processes. ---


def rank_layers(job):
    job.initialize(make_config(job.num_ranks))
    x = tokens(seed=job.rank)
    layer = make_nnx(make_config(job.num_ranks), ALL)
    module = ep_linen.NixlEpMoE(config=make_config(job.num_ranks), **ALL)
    variables = init_linen(module)
    y, aux = nnx.jit(lambda layer, x: layer(x))(layer, x)
    z, _ = jax.jit(module.apply)(variables, x, after=aux.order)
    return np.asarray(y), np.asarray(z)


def test_independent_processes_hold_one_model(pools):
    got = pools(2).run(rank_layers)
    layer = make_nnx(make_config(1), ALL, backend="xla")
    module = ep_linen.NixlEpMoE(config=make_config(1), backend="xla", **ALL)
    variables, whole, apply = init_linen(module), nnx.jit(lambda layer, x: layer(x)[0]), jax.jit(module.apply)
    for rank, (y, z) in enumerate(got):
        x = tokens(seed=rank)
        np.testing.assert_allclose(y, whole(layer, x), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(z, apply(variables, x)[0], rtol=1e-5, atol=1e-6)
