"""The CUDA module as far as a machine without a GPU can tell: it loads, and every operation lowers to its handlers."""

import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from test_ops import make_config, make_input, make_quantized

import jax_nixlep as nx
from jax_nixlep import _ffi, _host

REQUIRED = os.environ.get("JAX_NIXLEP_REQUIRE_CUDA") == "1"
needs_cuda = pytest.mark.skipif(not _ffi.cuda_built() and not REQUIRED, reason="built without CUDA")
CONFIG = make_config()


def names_of_stub(module):
    """What a .pyi file says a class or module has: {"Endpoint": {"close", ...}, "": {"handlers", ...}}."""
    found, scope = {"": set()}, ""
    for line in (Path(nx.__file__).parent / f"{module}.pyi").read_text().splitlines():
        if match := re.match(r"class (\w+)", line):
            scope = match[1]
            found[scope] = set()
            found[""].add(scope)
        elif match := re.match(r"(    )?(?:def )?(\w+)[(:]", line):
            found[scope if match[1] else ""].add(match[2])
    return found


@pytest.mark.parametrize("module", ["_host", pytest.param("_cuda", marks=needs_cuda)])
def test_the_stub_has_the_names_of_the_module(module):
    compiled = getattr(_ffi, module)
    for scope, names in names_of_stub(module).items():
        real = set(dir(getattr(compiled, scope) if scope else compiled)) - set(dir(Exception))
        assert {name for name in names ^ real if not name.startswith("_")} == set(), scope


@needs_cuda
def test_loads_and_has_every_handler():
    assert _ffi._cuda.WIRE_VERSION == _host.WIRE_VERSION
    assert set(_host.handlers()) < set(_ffi._cuda.handlers())


def every_operation(x, ids, weights):
    received = nx.dispatch(x, ids, weights, config=CONFIG)
    y = nx.combine(received.tokens, received.handle, config=CONFIG, after=received.status.order)
    pending = nx.dispatch_start(x, ids, weights, config=CONFIG, after=y)
    again = nx.dispatch_finish(pending)
    return y + nx.combine_finish(nx.combine_start(again.tokens, again.handle, config=CONFIG))


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_quantized_input_reaches_the_handlers_as_it_is(scale_format):
    config = make_config(wire="fp8_e4m3", hidden=256, scale_format=scale_format)
    q, scales = make_quantized(config, 0, 6, 0)

    def operations(q, scales, ids):
        received = nx.dispatch(q, ids, config=config, scales=scales)
        pending = nx.dispatch_start(q, ids, config=config, scales=scales, after=received.status.order)
        return received, nx.dispatch_finish(pending)

    text = jax.jit(operations).trace(q, scales, make_input(config, 0, 6, 0)[1]).lower(lowering_platforms=("cuda",))
    calls = re.findall(r"@jax_nixlep_dispatch(?:_start)?\(.*: \(([^)]*)\)", text.as_text())
    sent = "tensor<6x256xf8E4M3FN>, tensor<6x2x" + ("ui8>" if scale_format == "ue8m0" else "f32>")
    assert len(calls) == 2 and all(call.startswith(sent) for call in calls), calls


def test_operations_lower_to_the_handlers_of_cuda():
    arguments = make_input(CONFIG, 0, 6, 0)

    def text(function):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    def gradient(x, ids, weights):
        def loss(x, weights):
            received = nx.dispatch(x, ids, weights, config=CONFIG)
            return nx.combine(received.tokens, received.handle, config=CONFIG).sum()

        return jax.grad(loss, argnums=(0, 1))(x, weights)

    emitted = set(re.findall(r"@jax_nixlep_(\w+)", text(every_operation) + text(gradient)))
    assert emitted == {
        "dispatch", "combine", "redispatch", "dispatch_start", "dispatch_finish", "combine_start", "combine_finish",
    }  # fmt: skip
    if _ffi.cuda_built():
        assert emitted | {"mark", "nixl_ep_dispatch", "nixl_ep_combine"} == set(_ffi._cuda.handlers())


def test_profilers_see_names():
    """The scopes of what is compiled, forward and backward."""

    def loss(x, params):
        y, aux = nx.nixlep_moe(x, params, config=CONFIG, router=nx.Router(num_experts=4, top_k=CONFIG.top_k))
        return y.sum() + aux.loss

    hidden = CONFIG.hidden
    params = {"gate": np.ones((hidden, 4), np.float32), "wi_0": np.ones((2, hidden, 8), np.float32)}
    params["wo"] = np.ones((2, 8, hidden), np.float32)
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(np.ones((4, hidden), np.float32), params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert set(re.findall(r"jax_nixlep\.(\w+)", text)) == {"route", "dispatch", "experts", "combine", "redispatch"}
    assert re.search(r"jvp\([^\n]*jax_nixlep\.dispatch", text), "the forward operation of a gradient"


@needs_cuda
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_an_endpoint_without_a_gpu_says_so():
    with pytest.raises((nx.EpError, RuntimeError), match="CUDA"):
        _ffi._cuda.Endpoint(
            device=0, rank=0, max_ranks=2, experts_per_rank=1, max_tokens=4, top_k=1, row_bytes=64, timeout_s=1.0,
            mask_late_peers=False,
        )  # fmt: skip


def test_unbuilt_platforms_are_refused_by_name(monkeypatch):
    class Gpu:
        platform = "gpu"

    monkeypatch.setattr(_ffi, "_cuda", None)
    with pytest.raises(RuntimeError, match="devices must be of a platform that was built; got gpu; cpu only"):
        _ffi.make_endpoint(Gpu())
    assert not _ffi.cuda_built()
