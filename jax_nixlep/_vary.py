"""Varying axes: what shard_map(check_vma=True) must be told of values that meet a custom call or gradient."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def vary(x: jax.Array) -> jax.Array:
    """Marks `x` as different on every device of the enclosing shard_map, as everything that meets a peer is."""
    axes = set(jax.sharding.get_abstract_mesh().manual_axes) - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def vary_alike(*arrays: Any) -> list[Any]:
    """The arrays, varying over the mesh axes of all of them, as shard_map(check_vma=True) asks of custom_vjp and loops.

    Cotangents then have the types of their values; an array that was replicated gets the sum of its cotangents.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    missing = [tuple(frozenset().union(*varying) - v) for v in varying]
    return [lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)]
