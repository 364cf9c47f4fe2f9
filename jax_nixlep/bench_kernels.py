"""What a GPU does while a function runs: its kernels, ours among them, and its idle times. For benchmarks."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import profiler

OURS = "jax_nixlep"  # in the names of our kernels, mangled or not


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel or copy that ran on the GPU."""

    name: str
    start_ns: float
    duration_ns: float


@dataclasses.dataclass(frozen=True)
class Usage:
    """How a GPU spent a time, in microseconds. What overlaps an earlier kernel counts once, as that kernel's.

    Attributes:
      busy_us: while a kernel ran; `ours_us` of it in kernels of dispatch and combine.
      idle_us: between the first kernel and the last; `ours_idle_us` of it right before or after one of ours.
      kernels, ours: how many ran.
    """

    busy_us: float
    ours_us: float
    idle_us: float
    ours_idle_us: float
    kernels: int
    ours: int


def kernels_of(call: Callable[[], Any]) -> list[Kernel]:
    """What this process's GPUs run in `call()`, until its result is ready, in order of time.

    Taken by JAX's profiler, which sees the kernels inside command buffers too. Empty on a CPU, and where the machine
    lets nobody trace its GPU.
    """
    options = profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(call())
        data = [profiler.ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")]
        found = [
            Kernel(event.name, event.start_ns, event.duration_ns)
            for profile in data
            for plane in profile.planes
            if plane.name.startswith("/device:GPU:")
            for line in plane.lines
            if line.name.startswith("Stream")  # other lines show the same again, by operation
            for event in line.events
        ]
    return sorted(found, key=lambda kernel: kernel.start_ns)


def usage(kernels: Sequence[Kernel]) -> Usage:
    """Of `kernels_of`."""
    busy = ours_busy = idle = ours_idle = 0.0
    last_end, last_ours = kernels[0].start_ns if kernels else 0.0, False
    for kernel in kernels:
        ours, end = OURS in kernel.name, kernel.start_ns + kernel.duration_ns
        gap, ran = max(kernel.start_ns - last_end, 0.0), max(end - max(kernel.start_ns, last_end), 0.0)
        busy, ours_busy = busy + ran, ours_busy + ran * ours
        idle, ours_idle = idle + gap, ours_idle + gap * (ours or last_ours)
        if end >= last_end:
            last_end, last_ours = end, ours
    count = sum(OURS in kernel.name for kernel in kernels)
    return Usage(busy / 1e3, ours_busy / 1e3, idle / 1e3, ours_idle / 1e3, len(kernels), count)
