"""NVIDIA's NIXL-EP kernels as far as a machine without a GPU can tell; tests/gpu/test_nixl_ep.py runs them."""

import re
import sys
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_nixlep as nx
from jax_nixlep import _ffi, _host
from jax_nixlep.nixl_ep import library, packed


def make_config(**changes):
    fields = {"max_ranks": 3, "experts_per_rank": 4, "max_tokens_per_rank": 8, "hidden": 512, "top_k": 4,
              "dtype": jnp.bfloat16} | changes  # fmt: skip
    return nx.EpConfig(**fields)


def make_inputs(config, tokens):
    rng = np.random.default_rng(0)
    inputs = []
    for t in tokens:
        ids = np.array([rng.permutation(config.num_slots)[: config.top_k] for _ in range(t)], np.int32)
        ids = np.where(rng.random((t, config.top_k)) < 0.3, -1, ids.reshape(t, config.top_k)).astype(np.int32)
        x = np.asarray(jnp.asarray(rng.standard_normal((t, config.hidden)), config.dtype))
        inputs.append((x, ids, rng.random((t, config.top_k), np.float32)))
    return tuple(list(column) for column in zip(*inputs, strict=True))


def arrive(config, xs, ids, rank):
    """What NVIDIA's dispatch leaves on `rank`: rows in any order, garbage beside them."""
    rng = np.random.default_rng(1)
    experts, ranks, slots = config.experts_per_rank, config.max_ranks, config.max_ranks * config.max_tokens_per_rank
    fp8 = config.wire == "fp8_e4m3"
    sent = [oracle.quantize(x, config.scale_format, config.round_scale) if fp8 else (x, None) for x in xs]
    rows = np.full((experts, slots, config.hidden), np.nan, sent[0][0].dtype)
    scales = np.full((experts, slots, config.hidden // 128), 7, np.float32 if sent[0][1] is None else sent[0][1].dtype)
    source = np.full((experts, slots), 10**9, np.int32)
    ranges = np.zeros((experts, ranks, 2), np.int32)
    for e in range(experts):
        begin = 0
        for r in rng.permutation(ranks):
            tokens = np.flatnonzero((ids[r] == rank * experts + e).any(axis=1)) if r < len(ids) else np.zeros(0, int)
            for row, token in enumerate(rng.permutation(tokens), begin):
                source[e, row], rows[e, row] = token, sent[r][0][token]
                if fp8:
                    scales[e, row] = sent[r][1][token]
            ranges[e, r] = len(tokens), begin
            begin += len(tokens)
    if not fp8:
        return rows, None, source, ranges
    if config.scale_format == "ue8m0":
        scales = scales.view(np.uint8).view(np.int32)
    return rows, scales.transpose(0, 2, 1), source, ranges


@pytest.mark.parametrize("dequantize", [True, False])
@pytest.mark.parametrize(
    "wire",
    [
        {},
        {"wire": "fp8_e4m3"},
        {"wire": "fp8_e4m3", "round_scale": True},
        {"wire": "fp8_e4m3", "scale_format": "ue8m0"},
    ],
)
def test_rows_are_packed_as_dispatch_promises(wire, dequantize):
    config = make_config(**wire)
    if not wire and not dequantize:
        pytest.skip("nothing to dequantize")
    xs, ids, weights = make_inputs(config, [8, 0, 5])
    expected = oracle.dispatch(xs, ids, weights, config, dequantize=dequantize)
    pack = jax.jit(packed.pack, static_argnums=(0, 1, 2))
    for rank in range(3):
        out = pack(config, dequantize, config.num_rows, *arrive(config, xs, ids, rank))
        values, scales, source, ranges = (None if v is None else np.asarray(v) for v in out)
        want = expected[rank]
        assert values.dtype == want.tokens.dtype and values.tobytes() == want.tokens.tobytes()
        assert (scales is None) == (want.scales is None)
        if scales is not None:
            assert scales.dtype == want.scales.dtype and scales.tobytes() == want.scales.tobytes()
        for e in range(config.experts_per_rank):
            for r in range(3):
                count, first = ranges[e, r]
                at = first + e * 3 * config.max_tokens_per_rank
                tokens = [t for t in range(len(ids[r])) if (ids[r][t] == rank * config.experts_per_rank + e).any()]
                assert source[at : at + count].tolist() == tokens
                for row, token in enumerate(tokens, at):
                    assert row in want.row_of[r, token]


# --- What is refused, and how ---

LIMITS = library.Limits((2048, 4096, 7168), 16)
GOOD = {"max_ranks": 4, "hidden": 2048, "top_k": 8, "max_tokens_per_rank": 128, "experts_per_rank": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "dtype must be bfloat16 for .* got float32"),
        ({"hidden": 2304}, "hidden must be one of [2048, 4096, 7168] for .* got 2304"),
        ({"top_k": 17}, "top_k must be at most 16 for .* got 17"),
        ({"max_ranks": 9}, "max_ranks must be less than 8 or a multiple of it for .* got 9"),
        ({"max_tokens_per_rank": 1025}, "max_tokens_per_rank must be at most 1024 for .* got 1025"),
        (
            {"max_ranks": 2, "max_tokens_per_rank": 7},
            "max_ranks * max_tokens_per_rank must be a multiple of 4 for .* got 14",
        ),
        ({"max_ranks": 1, "experts_per_rank": 1}, "max_ranks * experts_per_rank must be in [2, 1848] for .* got 1"),
        ({"experts_per_rank": 500}, "max_ranks * experts_per_rank must be in [2, 1848] for .* got 2000"),
        ({"recv_capacity": 100}, "recv_capacity must be None, or at least 4096, since its kernels drop nothing"),
    ],
)
def test_configs_outside_the_limits_are_refused(changes, message):
    pattern = message.replace("[", r"\[").replace("]", r"\]").replace(" * ", r" \* ")
    with pytest.raises(ValueError, match=pattern) as refused:
        library.check_config(make_config(**(GOOD | changes)), LIMITS, 132)
    assert str(refused.value).endswith('change it, or use kernels="native"')


def test_configs_within_the_limits_are_taken():
    library.check_config(make_config(**GOOD), LIMITS, 132)
    library.check_config(make_config(**GOOD, wire="fp8_e4m3"), LIMITS, 132)
    library.check_config(make_config(**(GOOD | {"max_ranks": 16})), LIMITS, 132)


def test_limits_are_read_from_the_library(tmp_path):
    names = b"".join(b"_ZN7nixl_ep10ep_kernels7combineILb0ELi%dELi16ELi4EEEvPv\0" % h for h in (7168, 2048, 7168))
    path = tmp_path / "nixl_ep_cpp_torch212.so"
    path.write_bytes(b"\x7fELF" + names + b"_ZN7nixl_ep10ep_kernels7combineILb1ELi512ELi16ELi4EEEvPv\0")
    assert library.read_limits(path) == library.Limits((2048, 7168), 16)
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF nothing")
    with pytest.raises(nx.NixlError, match=r"other.so must hold nixl_ep::ep_kernels::combine"):
        library.read_limits(other)


def wheel(monkeypatch, tmp_path, *torches):
    """An installed nixl-cu13 with the extensions for these versions of torch."""
    package = tmp_path / "nixl_ep_cu13"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    for version in torches:
        (package / f"nixl_ep_cpp_torch{version}{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)


def test_the_library_nearest_to_torch_is_taken(monkeypatch, tmp_path):
    wheel(monkeypatch, tmp_path, "29", "212", "214")

    class Torch:
        __version__ = "2.11.0+cu130"

    monkeypatch.setitem(sys.modules, "torch", Torch)
    assert library.find_library().name.startswith("nixl_ep_cpp_torch212.")
    Torch.__version__ = "2.9.1"
    assert library.find_library().name.startswith("nixl_ep_cpp_torch29.")
    Torch.__version__ = "2.15.0"
    assert library.find_library().name.startswith("nixl_ep_cpp_torch214.")


def test_missing_torch_is_said(monkeypatch, tmp_path):
    wheel(monkeypatch, tmp_path, "212")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r'kernels="nixl_ep" must have torch.*pip install torch.*kernels="native"'):
        library.find_library()


def test_a_missing_library_is_said(monkeypatch, tmp_path):
    wheel(monkeypatch, tmp_path)
    with pytest.raises(nx.NixlError, match=r"must find nixl_ep_cpp_torch\*.*it is not in .*nixl_ep_cu13;.*native"):
        library.find_library()


def test_initialize_refuses_other_names_and_cpus(monkeypatch, tmp_path):
    config = make_config(max_ranks=2, hidden=2048)
    with pytest.raises(ValueError, match='kernels must be "native" or "nixl_ep"; got \'other\''):
        nx.initialize(config, rank=0, members=[0], kernels="other")
    with pytest.raises(ValueError, match=r'store must be a URL without kernels="nixl_ep"'):
        nx.initialize(config, rank=0, members=[0, 1], store=object())
    with pytest.raises(ValueError, match=r'elastic must be False with kernels="nixl_ep"'):
        nx.initialize(config, rank=0, members=[0], store="tcp://127.0.0.1:1", kernels="nixl_ep", elastic=True)
    with pytest.raises(ValueError, match=r"mesh must have one device of each process along 'ep' .*; got 2 here; start"):
        nx.initialize(config, mesh=jax.make_mesh((2,), ("ep",), devices=jax.devices()[:2]), kernels="nixl_ep")
    if jax.default_backend() == "cpu":
        with pytest.raises(RuntimeError, match=r'kernels="nixl_ep" must be on an NVIDIA GPU.*got cpu'):
            nx.initialize(config, rank=0, members=[0], kernels="nixl_ep")


@pytest.mark.skipif(not _ffi.cuda_built(), reason="built without CUDA")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nowhere.so", "nixl_ep: cannot load /nowhere.so: .*No such file"),
        (
            _host.__file__,
            r"must export nixl_ep::ep_kernels::dispatch as _ZN7nixl_ep10ep_kernels8dispatchEPv\w+ \(so do",
        ),
    ],
)
def test_a_library_without_the_functions_is_named(path, message):
    with pytest.raises(nx.EpError, match=message):
        _ffi._cuda.NixlEpEndpoint(
            library=path, device=0, rank=0, max_ranks=2, experts_per_rank=1, max_tokens=4, top_k=1, hidden=2048,
            num_hosts=1, timeout_s=1.0, mask_late_peers=False,
        )  # fmt: skip


# --- Programs ---


@pytest.fixture
def nixl_ep_kernels():
    _ffi.use_kernels("nixl_ep")
    yield
    _ffi.use_kernels("native")


def test_operations_lower_to_the_handlers_of_nvidias_kernels(nixl_ep_kernels):
    config = make_config(max_ranks=2, hidden=2048)
    (x, *_), (ids, *_), (weights, *_) = make_inputs(config, [5, 8])

    def layer(x, ids, weights):
        received = nx.dispatch(x, ids, weights, config=config)
        return nx.combine(received.tokens, received.handle, config=config, after=received.status.order)

    text = jax.jit(layer).trace(x, ids, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"@jax_nixlep_(\w+)", text)) == {"nixl_ep_dispatch", "nixl_ep_combine"}
    with pytest.raises(NotImplementedError, match="nixl_ep_dispatch: the program must be for an NVIDIA GPU"):
        jax.jit(layer).trace(x, ids, weights).lower(lowering_platforms=("cpu",))


def test_a_rank_without_tokens_takes_part(nixl_ep_kernels):
    config = make_config(max_ranks=2, hidden=2048)

    def layer(x, ids):
        received = nx.dispatch(x, ids, config=config)
        return nx.combine(received.tokens, received.handle, config=config)

    arguments = jnp.zeros((0, 2048), jnp.bfloat16), jnp.zeros((0, 4), jnp.int32)
    text = jax.jit(layer).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"@jax_nixlep_(\w+)", text)) == {"nixl_ep_dispatch", "nixl_ep_combine"}


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_gradients_are_refused_when_traced(nixl_ep_kernels, op):
    config = make_config(max_ranks=2, hidden=2048)
    (x, *_), (ids, *_), (weights, *_) = make_inputs(config, [5, 8])

    def loss(x, scale):
        received = nx.dispatch(x, ids, weights, config=config)
        return nx.combine(received.tokens * scale, received.handle, config=config).sum()

    arguments = (jnp.asarray(x), jnp.ones((), jnp.bfloat16))
    with pytest.raises(NotImplementedError, match=f'{op}: a gradient must be of kernels="native"'):
        jax.jit(jax.grad(loss, argnums=("dispatch", "combine").index(op))).trace(*arguments)


def test_other_operations_are_refused_when_compiled(nixl_ep_kernels):
    config = make_config(max_ranks=2, hidden=2048)
    (x, *_), (ids, *_), _ = make_inputs(config, [5, 8])

    def halves(x):
        return nx.dispatch_finish(nx.dispatch_start(x, ids, config=config)).tokens

    with pytest.raises(NotImplementedError, match=r'dispatch_start: the group must have kernels="native"'):
        jax.jit(halves).trace(x).lower(lowering_platforms=("cuda",))


def test_quantized_tokens_are_refused(nixl_ep_kernels):
    config = make_config(max_ranks=2, hidden=2048, wire="fp8_e4m3")
    x, scales, ids = jnp.zeros((3, 2048), jnp.float8_e4m3fn), jnp.ones((3, 16)), jnp.zeros((3, 4), jnp.int32)
    with pytest.raises(ValueError, match=r'scales must be None with kernels="nixl_ep".*got float32 \[3, 16\]'):
        nx.dispatch(x, ids, config=config, scales=scales)


def test_dropping_is_refused(nixl_ep_kernels):
    config = make_config(max_ranks=2, hidden=2048)
    (x, *_), (ids, *_), _ = make_inputs(config, [5, 8])
    with pytest.raises(ValueError, match=r"recv_capacity must be at least 64 .*drop nothing; got 63"):
        jax.eval_shape(lambda: nx.dispatch(x, ids, config=config, recv_capacity=63))


def test_other_handles_and_shapes_are_refused():
    config = make_config(max_ranks=2, hidden=2048)
    ids = jnp.zeros((3, 4), jnp.int32)
    handle = nx.PackedHandle(ids, jnp.ones((3, 4)), jnp.zeros(64, jnp.int32), jnp.zeros((4, 2, 2), jnp.int32))
    rows = jnp.zeros((64, 2048), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"expert_out must be bfloat16 \[64, 2048\]; got bfloat16 \[63, 2048\]"):
        nx.combine(rows[:63], handle, config=config)
    with pytest.raises(ValueError, match=r"handle.ranges must be int32 \[4, 2, 2\]"):
        nx.combine(rows, handle._replace(ranges=handle.ranges[:3]), config=config)
    with pytest.raises(ValueError, match=r"low_latency_dispatch: x must be bfloat16 \[3, 2048\]; got float32"):
        nx.nixl_ep.low_latency_dispatch(jnp.zeros((3, 2048)), ids, config=config)
