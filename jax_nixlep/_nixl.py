"""Finds the C library of the installed nixl wheel, without importing nixl (which would import torch where it is)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from jax_nixlep._ffi import NixlError

MINIMUM_VERSION = (1, 5)  # the first with memory views and this C API in its wheels
_WHEELS = ("nixl_cu13", "nixl_cu12")


def find_library() -> Path:
    """Path of libnixl_capi.so.

    Raises:
      NixlError: nixl is absent, older than 1.5, or its wheel lacks the library; says which and what to do.
    """
    wanted = ".".join(map(str, MINIMUM_VERSION))
    remedy = "install it with `pip install --no-deps nixl nixl-cu13` (torch, which it declares, is not needed)"
    for name in _WHEELS:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        version = importlib.metadata.version(name.replace("_", "-"))
        if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_VERSION:
            raise NixlError(f"nixl: version must be >= {wanted}; got {name} {version}; {remedy}")
        library = Path(spec.origin).parent.parent / f".{name}.mesonpy.libs" / "libnixl_capi.so"
        if not library.is_file():
            raise NixlError(f"nixl: {name} {version} must contain {library.name}; it does not; re{remedy}")
        return library
    raise NixlError(f"nixl: version >= {wanted} must be installed; got none; {remedy}")
