"""Weights of a rank in shared memory: what its programs read, and what other ranks copy from without its help. On a
GPU the programs read a copy in the GPU's memory.

A set of weights is immutable. A new table gets a new set, filled from the sets of the members while those serve, and
the old one goes when the last array that uses it goes.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nixlep import _ffi, _nixl

Tree = Mapping[str, Any]  # nested dicts of arrays
Spec = dict[str, tuple[list[int], str]]  # path of an array -> its shape and dtype

_ALIGN = 64
_CHUNK_BYTES = 4 << 20  # the pace is kept between pieces of this size


def flatten(tree: Tree, path: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}.

    Raises:
      TypeError: a key is no str, or contains "/".
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            raise TypeError(f'load: keys must be str without "/"; got {key!r}; rename it')
        flat |= flatten(value, f"{path}{key}/") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def spec_of(flat: Mapping[str, Any]) -> Spec:
    return {name: (list(value.shape), jnp.dtype(value.dtype).name) for name, value in flat.items()}


class Pace:
    """Says how a copy may go on: below `bytes_per_s` (None: as fast as it goes), and not past `deadline`."""

    def __init__(self, bytes_per_s: float | None, deadline: float, cancelled: Callable[[], bool]):
        """`deadline` as time.monotonic(); `cancelled` says whether the copy is wanted no more."""
        self._rate, self._deadline, self._cancelled = bytes_per_s, deadline, cancelled
        self._due = time.monotonic()

    def left_s(self) -> float:
        """Seconds until the deadline.

        Raises:
          TimeoutError: none.
          InterruptedError: it is not wanted any more.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("weights: must move within deadline_s; got no end; raise it, or move_bytes_per_s")
        if self._cancelled():
            raise InterruptedError("the change was given up while weights moved")
        return left

    def moved(self, num_bytes: int) -> None:
        """Sleeps as long as the rate asks for after so many bytes."""
        if self._rate:
            self._due = max(self._due, time.monotonic() - 0.1) + num_bytes / self._rate
            while (ahead := self._due - time.monotonic()) > 0:
                time.sleep(min(ahead, self.left_s(), 0.1))


class WeightSet:
    """Arrays of a fixed spec in one region.

    Attributes:
      views: writable numpy arrays by path. Not to be written once `arrays` was called.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        self.num_bytes = _layout(spec)[1]
        self._region = _ffi.Region.create(max(self.num_bytes, 1))
        self.views = _views(self._region, spec)
        self._agent: _ffi.RegionAgent | None = None

    def arrays(self) -> dict[str, Any]:
        """The nested dict of JAX arrays. On the CPU they use the region's memory itself; on a GPU they are copies,
        complete when this returns."""
        device = jax.local_devices()[0]
        put = {name: jax.device_put(view, device, may_alias=True) for name, view in self.views.items()}
        return unflatten(jax.block_until_ready(put))

    def describe(self, *, nixl: bool) -> dict[str, Any]:
        """What another rank needs to read this set; with `nixl` also from another machine."""
        value: dict[str, Any] = {"pid": os.getpid(), "fd": self._region.fd, "bytes": max(self.num_bytes, 1)}
        if nixl:
            value |= {"base": self._region.address, "agent": base64.b64encode(self.agent().metadata()).decode()}
        return value

    def agent(self) -> _ffi.RegionAgent:
        if self._agent is None:
            name = f"jax_nixlep-weights-{os.uname().nodename}-{os.getpid()}-{self._region.address:x}"
            self._agent = _ffi.RegionAgent(str(_nixl.find_library()), name, self._region)
        return self._agent

    def retire(self) -> None:
        """No other rank reads this set any more."""
        self._agent = None

    def copier(self, described: Mapping[str, Any], pace: Pace) -> Callable[[str, int | None, int], None]:
        """A function (path, row there or None for all, row here) that copies from another rank's set of equal spec.

        Raises:
          TimeoutError, InterruptedError: by the function, as `pace` says.
          NixlError, OSError: the other rank cannot be reached.
        """
        if "agent" not in described:
            region = _ffi.Region.open(described["pid"], described["fd"], described["bytes"])
            theirs = _views(region, self.spec)

            def copy(name: str, there: int | None, here: int) -> None:
                source = theirs[name] if there is None else theirs[name][there : there + 1]
                target = self.views[name] if there is None else self.views[name][here : here + 1]
                copy_bytes(target, source, pace)

            return copy

        agent = self.agent()
        peer = agent.connect(base64.b64decode(described["agent"]))
        offsets = _layout(self.spec)[0]

        def read(name: str, there: int | None, here: int) -> None:
            view = self.views[name]
            size = view.nbytes if there is None else view.nbytes // view.shape[0]
            mine, yours = offsets[name] + here * size * (there is not None), offsets[name] + (there or 0) * size
            for at in range(0, size, _CHUNK_BYTES):
                part = min(_CHUNK_BYTES, size - at)
                agent.read(peer, [(mine + at, described["base"] + yours + at, part)], pace.left_s())
                pace.moved(part)

        return read


def copy_bytes(target: np.ndarray, source: np.ndarray, pace: Pace) -> None:
    """Copies in pieces. `target` must be contiguous, `source` of the same shape and dtype."""
    target, source = target.reshape(-1).view(np.uint8), np.ascontiguousarray(source).reshape(-1).view(np.uint8)
    for at in range(0, target.size, _CHUNK_BYTES):
        pace.left_s()
        target[at : at + _CHUNK_BYTES] = source[at : at + _CHUNK_BYTES]
        pace.moved(min(_CHUNK_BYTES, target.size - at))


def _layout(spec: Spec) -> tuple[dict[str, int], int]:
    offsets, at = {}, 0
    for name, (shape, dtype) in spec.items():
        offsets[name] = at
        at += -(-int(np.prod(shape)) * jnp.dtype(dtype).itemsize // _ALIGN) * _ALIGN
    return offsets, at


def _views(region: _ffi.Region, spec: Spec) -> dict[str, np.ndarray]:
    memory = np.frombuffer(memoryview(region), np.uint8)
    offsets, _ = _layout(spec)
    sizes = {name: int(np.prod(shape)) * jnp.dtype(dtype).itemsize for name, (shape, dtype) in spec.items()}
    return {
        name: memory[offsets[name] : offsets[name] + sizes[name]].view(jnp.dtype(dtype)).reshape(shape)
        for name, (shape, dtype) in spec.items()
    }


def check_spec(spec: Any) -> Spec:
    """What a peer said, as a spec."""
    return {str(name): ([int(n) for n in shape], str(dtype)) for name, (shape, dtype) in dict(spec).items()}
