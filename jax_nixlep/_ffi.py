"""The only importer of the compiled modules: constants, endpoints, and the custom calls."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_nixlep import _host, _order
from jax_nixlep._host import Endpoint as Endpoint
from jax_nixlep._host import EpError as EpError
from jax_nixlep._host import NixlError as NixlError
from jax_nixlep._host import Region as Region
from jax_nixlep._host import RegionAgent as RegionAgent
from jax_nixlep._vary import vary

# Not built is one thing, and fine; built and broken is another, and its error is let through.
_cuda = importlib.import_module("jax_nixlep._cuda") if importlib.util.find_spec("jax_nixlep._cuda") else None

WIRE_VERSION: int = _host.WIRE_VERSION
QUANT_BLOCK: int = _host.QUANT_BLOCK
AMAX_FLOOR: float = _host.AMAX_FLOOR
PEER_OK: int = _host.PEER_OK
PEER_ABSENT: int = _host.PEER_ABSENT
PEER_TIMED_OUT: int = _host.PEER_TIMED_OUT

_TARGET = "jax_nixlep_{}"


def shared_memory_allowed() -> bool:
    """Whether ranks may reach each other by pointer: JAX_NIXLEP_P2P=0 forces NIXL's transfers on one machine too."""
    return os.environ.get("JAX_NIXLEP_P2P", "1") != "0"


def _check_abi() -> None:
    """A handler built on a newer FFI than the running jaxlib's loads, and fails at its first call: say so now."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    running = tuple(int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0]) for part in ("MAJOR", "MINOR"))
    built = max(module.XLA_FFI_API_VERSION for module in (_host, _cuda) if module)
    if built[0] != running[0] or built[1] > running[1]:
        raise ImportError(
            f"jax_nixlep: the running jaxlib must have XLA FFI {built[0]}.{built[1]} or newer; got "
            f"{running[0]}.{running[1]}; upgrade jax, or reinstall jax_nixlep against this one"
        )


_check_abi()
for _name, _handler in _host.handlers().items():
    jax.ffi.register_ffi_target(_TARGET.format(_name), _handler, platform="cpu")
for _name, _handler in _cuda.handlers().items() if _cuda else ():
    jax.ffi.register_ffi_target(_TARGET.format(_name), _handler, platform="CUDA")


def cuda_built() -> bool:
    """Whether this installation has kernels for NVIDIA GPUs."""
    return _cuda is not None


def make_endpoint(device: jax.Device, **options: Any) -> Endpoint:
    """The endpoint of a rank on `device`; keywords as `Endpoint`. Endpoints of all platforms look alike.

    Raises:
      RuntimeError: there is no module for the device's platform.
    """
    if device.platform == "cpu":
        return Endpoint(**options)
    if device.platform != "gpu" or _cuda is None:
        built = "cpu and CUDA" if _cuda else "cpu only; set JAX_NIXLEP_CUDA=ON and reinstall"
        raise RuntimeError(f"initialize: devices must be of a platform that was built; got {device.platform}; {built}")
    return _cuda.Endpoint(device=device.local_hardware_id, **options)


def check_nixl_ep_device(device: jax.Device) -> None:
    """Refuses what NVIDIA's NIXL-EP kernels cannot run on.

    Raises:
      RuntimeError: no NVIDIA GPU, or built without CUDA.
    """
    if device.platform != "gpu" or _cuda is None:
        built = "with" if _cuda else "without"
        raise RuntimeError(
            f'initialize: kernels="nixl_ep" must be on an NVIDIA GPU, by a build with CUDA; got {device.platform}, '
            f'built {built} CUDA; set JAX_NIXLEP_CUDA=ON and reinstall, or use kernels="native"'
        )


def make_nixl_ep_endpoint(device: jax.Device, **options: Any) -> Any:
    """A rank's end of a group that uses those kernels; `options`: see _cuda.pyi."""
    assert _cuda is not None  # check_nixl_ep_device refused otherwise
    return _cuda.NixlEpEndpoint(device=device.local_hardware_id, **options)


def num_launches() -> int:
    """Of our handlers on this process's GPUs, captures included, replays not; 0 without CUDA."""
    return _cuda.num_launches() if _cuda else 0


def set_endpoint(device: jax.Device, endpoint: Endpoint | None) -> None:
    """Operations on local `device` use `endpoint` (or none)."""
    if device.platform == "cpu":  # XLA shows a custom call the global id of a CPU device, the local number of a GPU
        _host.set_endpoint(device.id, endpoint)
        return
    assert _cuda is not None  # make_endpoint refused otherwise
    nvidia = isinstance(endpoint, _cuda.NixlEpEndpoint)
    _cuda.set_endpoint(device.local_hardware_id, None if nvidia else endpoint)
    _cuda.set_nixl_ep_endpoint(device.local_hardware_id, endpoint if nvidia else None)


_kernels = "native"


def kernels() -> str:
    """Which kernels programs are traced for: "native", or "nixl_ep" in a group of those."""
    return _kernels


def use_kernels(name: str) -> None:
    """Programs are traced for these kernels from now on; those traced for others before are traced again."""
    global _kernels
    if name != _kernels:
        _kernels = name
        jax.clear_caches()


def attributes(
    ordinal: int, wire: str, scale_format: str = "float32", round_scale: bool = False, *, weighted: bool
) -> dict[str, np.int64]:
    """The static part of an operation, as `OpAttributes` in ffi/attributes.h decodes it."""
    return {
        "ordinal": np.int64(ordinal),
        "wire": np.int64(_host.WIRES[wire]),
        "scale_format": np.int64(_host.SCALE_FORMATS[scale_format]),
        "round_scale": np.int64(round_scale),
        "weighted": np.int64(weighted),
    }


# A primitive of our own instead of jax.ffi.ffi_call, for one reason: XLA must not drop the exchange of a rank that has
# no use for its content (one with zero tokens), since its peers wait for it. ffi_call can only say so through a JAX
# effect, and effects are refused by jax.checkpoint before jax 0.12. So JAX itself still drops what no result of the
# program depends on (docs/sharp_bits.md).
_call_p = Primitive("jax_nixlep")
_call_p.multiple_results = True
_call_p.def_abstract_eval(lambda *_, results, **__: [jax.core.ShapedArray(r.shape, r.dtype) for r in results])


def _lower(ctx, *operands, name, results, attrs):
    del results
    if "cpu" in ctx.module_context.platforms and name not in _host.handlers():
        raise NotImplementedError(
            f"{name}: the program must be for an NVIDIA GPU; got cpu; use dispatch and combine, which run on both"
        )
    if kernels() == "nixl_ep" and not name.startswith("nixl_ep_") and name != "mark":
        raise NotImplementedError(
            f'{name}: the group must have kernels="native"; got kernels="nixl_ep", which know only dispatch and '
            'combine; initialize with kernels="native"'
        )
    attributes = dict(attrs)
    if "ordinal" in attributes:
        attributes["ordinal"] = np.int64(_order.number_in_program(ctx.module_context, int(attributes["ordinal"])))
    return jax.ffi.ffi_lowering(_TARGET.format(name), has_side_effect=True)(ctx, *operands, **attributes)


mlir.register_lowering(_call_p, _lower)


@functools.cache
def _compiled(**params: Any) -> Any:
    return jax.jit(lambda *args: _call_p.bind(*args, **params))


def _run(*args: jax.Array, attrs: tuple[tuple[str, np.int64], ...], **params: Any) -> Any:
    alone = tuple((name, np.int64(0) if name == "ordinal" else value) for name, value in attrs)  # a program of its own
    return _compiled(attrs=alone, **params)(*args)


_call_p.def_impl(_run)


def call(name: str, results: Sequence[jax.ShapeDtypeStruct], *args: jax.Array, **attrs: np.int64) -> list[jax.Array]:
    """Emits custom call `jax_nixlep_<name>`, which profilers show as jax_nixlep.<name>: by the named scope, and on GPUs
    by the NVTX range of its handler. No JAX effect, so that remat, scan and grad accept it."""
    with jax.named_scope(f"jax_nixlep.{name}"):
        out = _call_p.bind(*args, name=name, results=tuple(results), attrs=tuple(sorted(attrs.items())))
    return [vary(o) for o in out]


def mark(index: int, after: jax.Array) -> jax.Array:
    """For measurements on a GPU: remembers when the program comes here; see `elapsed_us` of the CUDA module."""
    return call("mark", [struct((), jnp.float32)], after, index=np.int64(index))[0]


def struct(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
