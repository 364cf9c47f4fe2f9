"""The only importer of the compiled modules: constants, endpoints, and the custom calls."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_nixlep import _host
from jax_nixlep._host import Endpoint, EpError, NixlError, Region, RegionAgent, set_endpoint
from jax_nixlep._vary import vary

__all__ = ["Endpoint", "EpError", "NixlError", "Region", "RegionAgent", "set_endpoint", "call", "attributes"]

WIRE_VERSION: int = _host.WIRE_VERSION
QUANT_BLOCK: int = _host.QUANT_BLOCK
PEER_OK: int = _host.PEER_OK
PEER_ABSENT: int = _host.PEER_ABSENT
PEER_TIMED_OUT: int = _host.PEER_TIMED_OUT

_TARGET = "jax_nixlep_{}"


def _check_abi() -> None:
    """A handler built on a newer FFI than the running jaxlib's loads, and fails at its first call: say so now."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    running = tuple(int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0]) for part in ("MAJOR", "MINOR"))
    built = _host.XLA_FFI_API_VERSION
    if built[0] != running[0] or built[1] > running[1]:
        raise ImportError(
            f"jax_nixlep: the running jaxlib must have XLA FFI {built[0]}.{built[1]} or newer; got "
            f"{running[0]}.{running[1]}; upgrade jax, or reinstall jax_nixlep against this one"
        )


_check_abi()
for _name, _handler in _host.handlers().items():
    jax.ffi.register_ffi_target(_TARGET.format(_name), _handler, platform="cpu")


def attributes(
    ordinal: int, wire: str, scale_format: str = "float32", round_scale: bool = False, *, weighted: bool
) -> dict[str, np.int64]:
    """The static part of an operation, as `OpAttributes` in ffi/host/handlers.cc decodes it."""
    return {
        "ordinal": np.int64(ordinal),
        "wire": np.int64(_host.WIRES[wire]),
        "scale_format": np.int64(_host.SCALE_FORMATS[scale_format]),
        "round_scale": np.int64(round_scale),
        "weighted": np.int64(weighted),
    }


# A primitive of our own instead of jax.ffi.ffi_call, for one reason: XLA must not drop the exchange of a rank that does
# not look at the result (one with zero tokens has none to look at), since its peers wait for it. ffi_call can only say
# so through a JAX effect, and effects are refused by jax.checkpoint before jax 0.12.
_call_p = Primitive("jax_nixlep")
_call_p.multiple_results = True
_call_p.def_abstract_eval(lambda *_, results, **__: [jax.core.ShapedArray(r.shape, r.dtype) for r in results])


def _lower(ctx, *operands, name, results, attrs):
    del results
    return jax.ffi.ffi_lowering(_TARGET.format(name), has_side_effect=True)(ctx, *operands, **dict(attrs))


mlir.register_lowering(_call_p, _lower)


@functools.cache
def _compiled(**params: Any) -> Any:
    return jax.jit(lambda *args: _call_p.bind(*args, **params))


_call_p.def_impl(lambda *args, **params: _compiled(**params)(*args))


def call(name: str, results: Sequence[jax.ShapeDtypeStruct], *args: jax.Array, **attrs: np.int64) -> list[jax.Array]:
    """Emits custom call `jax_nixlep_<name>`. No JAX effect, so that remat, scan and grad accept it."""
    out = _call_p.bind(*args, name=name, results=tuple(results), attrs=tuple(sorted(attrs.items())))
    return [vary(o) for o in out]


def struct(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
