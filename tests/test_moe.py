"""The layer: independent processes, meshes of one process, and a jax.distributed mesh over four."""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ranks import child_env

import jax_nixlep as nx
from jax_nixlep.placement import Placement, identity_placement, to_slots
from jax_nixlep.router import route

EXPERTS, HIDDEN, FEATURES, TOP_K = 8, 32, 16, 2


def make_config(ranks, **changes):
    base = {"max_ranks": ranks, "experts_per_rank": EXPERTS // ranks, "max_tokens_per_rank": 16, "hidden": HIDDEN}
    return nx.EpConfig(**(base | {"top_k": TOP_K, "dtype": jnp.float32} | changes))


def make_params(shared=True, biases=False):
    rng = np.random.default_rng(0)
    shapes = {"gate": (HIDDEN, EXPERTS), "wi_0": (EXPERTS, HIDDEN, FEATURES), "wi_1": (EXPERTS, HIDDEN, FEATURES)}
    shapes["wo"] = (EXPERTS, FEATURES, HIDDEN)
    if shared:
        shapes |= {"shared_wi_0": (HIDDEN, FEATURES), "shared_wo": (FEATURES, HIDDEN)}
    if biases:
        shapes |= {"gate_bias": (EXPERTS,), "score_bias": (EXPERTS,), "bi_0": (EXPERTS, FEATURES)}
        shapes |= {"bi_1": (EXPERTS, FEATURES), "bo": (EXPERTS, HIDDEN)}
    return {name: (rng.standard_normal(shape) / 5).astype(np.float32) for name, shape in shapes.items()}


def make_tokens(batch=8, length=12):
    return np.random.default_rng(1).standard_normal((batch, length, HIDDEN)).astype(np.float32)


ROUTER = nx.Router(num_experts=EXPERTS, top_k=TOP_K, load_balance_coef=0.1, z_loss_coef=0.01)


def dense(x, params, mask=None):
    """The layer's definition: every expert on every token, weighted by the router. x [t, H]."""
    routing = route(
        ROUTER, x @ params["gate"] + params.get("gate_bias", 0), bias=params.get("score_bias"), token_mask=mask
    )
    gate = jnp.einsum("th,ehf->etf", x, params["wi_0"]) + params.get("bi_0", np.zeros((1, 1)))[:, None]
    up = jnp.einsum("th,ehf->etf", x, params["wi_1"]) + params.get("bi_1", np.zeros((1, 1)))[:, None]
    out = jnp.einsum("etf,efh->eth", jax.nn.silu(gate) * up, params["wo"])
    out += params.get("bo", np.zeros((1, 1)))[:, None]
    chosen = jax.nn.one_hot(routing.expert_ids, EXPERTS) * routing.weights[..., None]  # [t, K, L]
    y = jnp.einsum("tkl,lth->th", chosen, out)
    if "shared_wi_0" in params:
        shared = jax.nn.silu(x @ params["shared_wi_0"]) @ params["shared_wo"]
        y += shared if mask is None else jnp.where(mask[:, None], shared, 0)
    return y, routing


# --- Independent processes. ---


def rank_layer(job, biases, chunk_tokens):
    config = make_config(job.num_ranks)
    job.initialize(config)
    mine = slice(job.rank * config.experts_per_rank, (job.rank + 1) * config.experts_per_rank)
    stacked = ("wi_0", "wi_1", "wo", "bi_0", "bi_1", "bo")
    params = {k: v[mine] if k in stacked else v for k, v in make_params(biases=biases).items()}
    x = make_tokens()[2 * job.rank : 2 * job.rank + 2]  # 24 tokens: two chunks

    @functools.partial(jax.jit, static_argnames="remat")
    def run(x, params, placement, remat):
        def loss(x, params):
            y, aux = nx.nixlep_moe(
                x, params, config=config, router=ROUTER, placement=placement, chunk_tokens=chunk_tokens
            )
            return (y**2).sum(), (y, aux)

        return jax.value_and_grad(jax.checkpoint(loss) if remat else loss, argnums=(0, 1), has_aux=True)(x, params)

    placement = nx.current_group().placement
    results = [jax.tree.map(np.asarray, run(x, params, placement, remat)) for remat in (False, True)]
    assert run._cache_size() == 2
    return results


# Each number of ranks, either transport, and the layer with and without biases and chunks on several ranks.
@pytest.mark.parametrize(
    ("num_ranks", "transport", "biases", "chunk_tokens"),
    [(1, "shared", True, 5), (4, "shared", False, None), (4, "shared", True, 5), (2, "nixl", True, 5)],
)
def test_independent_processes(pools, num_ranks, transport, biases, chunk_tokens):
    answers = pools(num_ranks, transport).run(rank_layer, biases, chunk_tokens)
    params = make_params(biases=biases)
    tokens = make_tokens()[: 2 * num_ranks].reshape(-1, HIDDEN)
    want, _ = jax.jit(dense)(tokens, params)
    x_bar, p_bar = jax.jit(jax.grad(lambda x, p: (dense(x, p)[0] ** 2).sum(), argnums=(0, 1)))(tokens, params)
    for plain, remat in answers:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), plain, remat)
    got = np.concatenate([plain[0][1][0].reshape(-1, HIDDEN) for plain, _ in answers])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    got = np.concatenate([plain[1][0].reshape(-1, HIDDEN) for plain, _ in answers])
    np.testing.assert_allclose(got, x_bar, rtol=1e-4, atol=1e-4)
    for name, gradient in p_bar.items():
        parts = [plain[1][1][name] for plain, _ in answers]
        stacked = name in ("wi_0", "wi_1", "wo", "bi_0", "bi_1", "bo")
        total = np.concatenate(parts) if stacked else sum(parts)
        np.testing.assert_allclose(total, gradient, rtol=1e-4, atol=1e-4, err_msg=name)


# --- Meshes. ---


def mesh_job(shape, names, chunks=False, explicit=False, **options):
    """In a process with 8 fake devices: the native layer must equal plain JAX collectives and the dense formula."""
    tensor_axis = "tp" if "tp" in names else None
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, names, axis_types=(kind,) * len(names))
    config = make_config(mesh.shape["ep"], **options.pop("config", {}))
    group = nx.initialize(config, mesh=mesh, axis="ep", timeout_s=30)
    params, x = make_params(biases=True), make_tokens()
    mask = np.random.default_rng(2).random(x.shape[:2]) < 0.8

    def run(backend, **more):
        def loss(x, params):
            y, aux = nx.nixlep_moe(
                x, params, config=config, router=ROUTER, mesh=mesh, tensor_axis=tensor_axis, token_mask=mask,
                backend=backend, **options, **more,
            )  # fmt: skip
            return (y**2).mean() + aux.loss, (y, aux)

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return jax.tree.map(np.asarray, jax.block_until_ready(program(x, params)))

    plain, native = run("xla"), run("native")
    # Where partial sums travel as bfloat16, another order of additions can round to a neighbour.
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if config.wire == "same" else {"rtol": 1e-2, "atol": 4e-3}
    close = functools.partial(np.testing.assert_allclose, **tolerance)
    for other in (native, run("native", chunk_tokens=5)) if chunks else (native,):
        jax.tree.map(close, other, plain)
    np.testing.assert_array_equal(native[0][1][0], plain[0][1][0])  # the same bits
    want, routing = jax.jit(dense)(x.reshape(-1, HIDDEN), params, mask.reshape(-1))
    close(native[0][1][0].reshape(-1, HIDDEN), want, atol=5 * tolerance["atol"])
    aux = native[0][1][1]
    np.testing.assert_array_equal(aux.load, routing.load)
    close(aux.loss, routing.aux_loss)
    assert (aux.dropped == 0) == ("recv_capacity" not in options)
    assert group.health().operations > 0
    nx.shutdown()


@pytest.mark.parametrize(
    ("shape", "names", "options"),
    [
        ((4,), ("ep",), {}),
        ((2, 2), ("dp", "ep"), {"chunks": True}),
        ((2, 2), ("ep", "tp"), {"chunks": True}),
        ((1, 2), ("dp", "ep"), {"config": {"wire": "bf16"}}),
        ((2, 2), ("pp", "ep"), {"token_axes": ("ep",)}),
        ((2, 2), ("dp", "ep"), {"explicit": True}),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_mesh_of_one_process(on_fake_devices, shape, names, options):
    on_fake_devices(mesh_job, shape, names, **options)


def other_mesh_job():
    """The group is of 2 x 2 devices, the last axis the experts'; layers speak of other meshes, configs and experts."""
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    config = make_config(4, experts_per_rank=4)
    mesh = jax.sharding.Mesh(devices, ("dp", "ep"))
    nx.initialize(config, mesh=mesh, timeout_s=30)
    params, x = make_params(), make_tokens()

    def layer(mesh=mesh, config=config, router=ROUTER, x=x, **options):
        y, _ = nx.nixlep_moe(x, params, config=config, router=router, mesh=mesh, **options)
        np.testing.assert_allclose(y.reshape(-1, HIDDEN), dense(x.reshape(-1, HIDDEN), params)[0], rtol=2e-5, atol=1e-5)

    layer()
    layer(jax.sharding.Mesh(devices, ("data", "expert")), axis="expert")  # the same by other names
    layer(jax.sharding.Mesh(devices.T, ("ep", "dp")))
    layer(jax.sharding.Mesh(devices, ("ep", "dp")), backend="xla")  # needs no group
    for wrong, words in (
        ({"mesh": jax.sharding.Mesh(devices, ("ep", "dp"))}, "mesh must place devices along ('ep',) as the mesh"),
        ({"mesh": jax.sharding.Mesh(devices[:, ::-1], ("dp", "ep"))}, "at 1 of dp=0, rank 0 of dp=0"),
        ({"mesh": jax.sharding.Mesh(np.array(jax.devices()[4:]).reshape(2, 2), ("dp", "ep"))}, "which is in no group"),
        ({"config": dataclasses.replace(config, max_tokens_per_rank=8)}, "config.max_tokens_per_rank must be"),
        ({"x": x[:6]}, "x must have a first axis that can be cut in 4, for the mesh axes ('dp', 'ep'); got (6,"),
        ({"placement": identity_placement(7, [0, 1], 4)}, "placement must be of 8 experts; got 7"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            layer(**wrong)
        assert words in str(caught.value)
    nx.shutdown()


def test_a_layer_of_another_mesh_than_the_groups(on_fake_devices):
    on_fake_devices(other_mesh_job)


def rank_with_few_slots(job):
    config = make_config(4, experts_per_rank=2)
    job.initialize(config)
    params = make_params() | {"gate": np.zeros((HIDDEN, 16), np.float32)}
    mine = {name: value[:2] if name in ("wi_0", "wi_1", "wo") else value for name, value in params.items()}
    router = nx.Router(num_experts=16, top_k=2)
    with pytest.raises(
        ValueError, match=r"num_experts must have slots on the ranks \[0, 1\], from rank 0 on; got 16, 2"
    ):
        nx.nixlep_moe(np.zeros((4, HIDDEN), np.float32), mine, config=config, router=router)


def test_more_experts_than_the_members_have_slots(pools):
    pools(2).run(rank_with_few_slots)


def own_shard_map_job():
    """A user's own shard_map over ("dp", "ep"), with other work in it, check_vma on and off."""
    from jax.sharding import PartitionSpec as P

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "ep"))
    config = make_config(2)
    nx.initialize(config, mesh=mesh, timeout_s=30)
    params, x = make_params(), make_tokens()
    specs = nx.param_specs(params)

    def block(x, params):
        crowded = params | {"gate": jnp.zeros((HIDDEN, 9))}
        with pytest.raises(ValueError, match="num_experts must be at most the 8 slots of 2 members; got 9"):
            nx.nixlep_moe(x, crowded, config=config, router=nx.Router(num_experts=9, top_k=TOP_K))
        y, aux = nx.nixlep_moe(2 * x, params, config=config, router=ROUTER, token_axes=("dp", "ep"))
        return x + y, jax.lax.psum(y.sum(), ("dp", "ep")) + aux.loss

    want = jax.jit(dense)(2 * x.reshape(-1, HIDDEN), params)[0].reshape(x.shape) + x
    for check_vma in (True, False):
        tokens = P(("dp", "ep"))
        mapped = jax.shard_map(block, mesh=mesh, in_specs=(tokens, specs), out_specs=(tokens, P()), check_vma=check_vma)
        np.testing.assert_allclose(jax.jit(mapped)(x, params)[0], want, rtol=2e-5, atol=1e-5)
        gradient = jax.jit(jax.grad(lambda p, mapped=mapped: mapped(x, p)[1]))(params)
        wanted = jax.jit(jax.grad(lambda p: dense(2 * x.reshape(-1, HIDDEN), p)[0].sum() + loss_of(x, p)))(params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient, wanted)


def loss_of(x, params):
    return route(ROUTER, 2 * x.reshape(-1, HIDDEN) @ params["gate"]).aux_loss


def test_own_shard_map(on_fake_devices):
    on_fake_devices(own_shard_map_job)


def scan_and_order_job():
    """Layers in lax.scan, and two layers without data between them ordered by aux.order, forward and backward."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("ep",))
    config = make_config(2)
    nx.initialize(config, mesh=mesh, timeout_s=30)
    params, x = make_params(), make_tokens(4, 4)
    layer = functools.partial(nx.nixlep_moe, config=config, router=ROUTER, mesh=mesh)

    def deep(x, params):
        return jax.lax.scan(lambda h, _: (h + layer(h, params)[0], None), x, length=3)[0].sum()

    def flat(x, params):
        for _ in range(3):
            x = x + layer(x, params)[0]
        return x.sum()

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, jax.jit(jax.grad(deep, (0, 1)))(x, params), jax.jit(jax.grad(flat, (0, 1)))(x, params))

    def two(x, after):
        first, aux = layer(x, params)
        second, _ = layer(-x, params, after={"order": aux.order, "result": first}[after])
        return (first * second).sum()

    for after in ("order", "result"):
        both = jax.jit(jax.value_and_grad(functools.partial(two, after=after)))
        for _ in range(5):
            jax.block_until_ready(both(x))


crashes_in_shardy = pytest.mark.skipif(
    jax.__version__.startswith("0.11."), reason="XLA of jax 0.11 crashes when it compiles this (docs/sharp_bits.md)"
)


@crashes_in_shardy
def test_scan_and_order(on_fake_devices):
    on_fake_devices(scan_and_order_job)


def test_equal_programs_have_equal_numbers():
    """Whatever was traced before: JAX keeps the traced body of a scan for the next program that has it."""
    config, x, ids = make_config(1), jnp.ones((4, HIDDEN)), jnp.zeros((4, TOP_K), jnp.int32)

    def body(x, _):
        received = nx.dispatch(x, ids, config=config)
        return nx.combine(received.tokens, received.handle, config=config), None

    def numbers():
        text = jax.jit(lambda x: jax.lax.scan(body, body(x, None)[0], length=3)).lower(x).as_text()
        return re.findall(r"ordinal = (\d+)", text)

    assert numbers() == ["1", "2", "3", "4"]
    jax.eval_shape(lambda x: jax.lax.scan(body, body(body(x, None)[0], None)[0], length=7), x)
    assert numbers() == ["1", "2", "3", "4"]


def test_padding_may_be_nan():
    config, params, x = make_config(1), make_params(), make_tokens(2, 4)
    mask = np.arange(4) < np.array([[2], [4]])

    def loss(x, params):
        y, aux = nx.nixlep_moe(x, params, config=config, router=ROUTER, token_mask=mask, backend="xla")
        return (y**2).sum() + aux.loss

    grad = jax.jit(jax.grad(loss, (0, 1)))
    want = grad(np.where(mask[..., None], x, 0).astype(np.float32), params)
    got = grad(np.where(mask[..., None], x, np.nan).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_distributed_mesh():
    """Four processes of one jax.distributed job, ep beside dp: one group for each dp coordinate."""
    program = str(Path(__file__).parent / "distributed.py")
    command = [sys.executable, "-m", "jax_nixlep.launch", "-n", "4", "--timeout", "240", program]
    done = subprocess.run(command, env=child_env(), capture_output=True, text=True, timeout=270, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("groups of 2 over shared memory: right") == 4


# --- Refused. ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": nx.Router(num_experts=8, top_k=3)}, "router.top_k must be config.top_k = 2; got 3"),
        ({"backend": "nccl"}, 'backend must be "native" or "xla"; got \'nccl\''),
        ({"x": np.zeros((4, 16), np.float32)}, "x must be [..., 32]; got (4, 16)"),
        ({"gate": np.zeros((32, 4), np.float32)}, 'params["gate"] must be (32, 8); got (32, 4)'),
        ({"wi_0": np.zeros((2, 32, 16), np.float32)}, "params['wi_0'] must have 8 slots in front; got (2, 32, 16)"),
        ({"wi_2": np.zeros((8, 32, 16), np.float32)}, "params must only contain"),
        ({"wo": np.zeros((2, 16, 32), np.float32)}, "got (2, 16, 32); stack one expert per slot, or pass mesh="),
        ({"chunk_tokens": 17}, "chunk_tokens must be in [1, 16]; got 17"),
    ],
)
def test_layer_refuses(changes, words):
    options = {"config": make_config(1), "router": ROUTER} | changes
    x = options.pop("x", np.zeros((4, HIDDEN), np.float32))
    arrays = {name: options.pop(name) for name in list(options) if name in ("gate", "wi_0", "wi_2", "wo")}
    with pytest.raises(ValueError) as caught:
        nx.nixlep_moe(x, make_params() | arrays, **options)
    assert words in str(caught.value)


# --- Placement. ---


def test_identity_placement():
    placement = identity_placement(5, [0, 2], 3)
    np.testing.assert_array_equal(placement.slots[:, 0], [0, 1, 2, 6, 7])
    with pytest.raises(ValueError, match=r"num_experts must be at most the 6 slots of 2 members; got 7"):
        identity_placement(7, [0, 2], 3)


def test_replicas_take_turns():
    placement = Placement(jnp.array([[4, 9], [5, 0], [0, 0]], jnp.int32), jnp.array([2, 1, 0], jnp.int32))
    ids = jnp.array([[0, 1], [0, 1], [2, -1], [0, 7]], jnp.int32)
    np.testing.assert_array_equal(to_slots(placement, ids), [[4, 5], [9, 5], [-1, -1], [9, 7]])
