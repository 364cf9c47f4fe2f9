"""What all members of a group must have alike: compared when they meet, and when one joins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_nixlep import _ffi
from jax_nixlep.config import EpConfig

Described = dict[str, Any]  # JSON


def described(config: EpConfig, **more: Any) -> Described:
    """The config, this build's wire version, and `more`."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | more
    return {name: _plain(value) for name, value in fields.items()} | {"wire version": _ffi.WIRE_VERSION}


def check_alike(own: Described, rank: int, theirs: Mapping[str, Any], whose: str) -> None:
    """
    Raises:
      ValueError: names the first field that differs, and both values.
    """
    for name, value in own.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"initialize: {name} must be equal on every rank; got {value!r} on rank {rank} and "
                f"{theirs.get(name)!r} {whose}; start all with one config"
            )


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, str, bool, type(None), list)) else str(value)
