"""What elasticity costs: `python -m jax_nixlep.bench_elastic`.

commits  members and placement change again and again under traffic, with every row checked (`soak`): how long no rank
         could step, and compilations
kills    SIGKILL at random points: from the end of the process to the first right step of the last survivor
weights  bytes per second of what `preparation` does to fill a new set of weights from another rank's, through shared
         memory and through NIXL (loopback, one process), beside plain copies of the same bytes: into a new region of
         the same kind, whose pages the kernel has yet to zero, and into memory that is in use already
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_nixlep import soak
from jax_nixlep.elastic.weights import Pace, WeightSet

EXPERTS = 4


def weight_rates(num_bytes: int, samples: int) -> dict[str, float]:
    """Bytes per second, medians; the ways take turns."""
    spec = {"w": ([EXPERTS, num_bytes // EXPERTS // 4], "float32")}
    source, used = WeightSet(spec), WeightSet(spec)
    source.views["w"][:] = np.arange(EXPERTS, dtype=np.float32)[:, None]
    used.views["w"][:] = 0
    described = {nixl: source.describe(nixl=nixl) for nixl in (False, True)}

    def copy() -> WeightSet:
        target = WeightSet(spec)
        np.copyto(target.views["w"], source.views["w"])
        return target

    def copy_in_use() -> WeightSet:
        np.copyto(used.views["w"], source.views["w"])
        return used

    def move(nixl: bool) -> WeightSet:
        target = WeightSet(spec)
        read = target.copier(described[nixl], Pace(None, time.monotonic() + 60, lambda: False))
        for expert in range(EXPERTS):
            read("w", expert, expert)
        return target

    ways: dict[str, Callable[[], WeightSet]] = {
        "copy": copy,
        "copy_in_use": copy_in_use,
        "shared": lambda: move(False),
        "nixl": lambda: move(True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(samples + 1):  # the first warms up
        for name, way in ways.items():
            began = time.perf_counter()
            target = way()
            seconds[name] += [time.perf_counter() - began] * (i > 0)
            np.testing.assert_array_equal(target.views["w"], source.views["w"])
    return {name: num_bytes / statistics.median(taken) for name, taken in seconds.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    rates = weight_rates(args.megabytes << 20, args.samples)
    of_copy = {name: rates[name] / rates["copy"] for name in ("shared", "nixl")}
    result: dict[str, Any] = {"weights_bytes_per_s": rates, "weights_of_copy": of_copy, "transports": {}}
    for transport in args.transports.split(","):
        options = ["--resizes", str(args.commits), "--kills", str(args.kills), "--transport", transport]
        result["transports"][transport] = soak.run(soak.parse([*options, "--seed", str(args.seed)]))
    return result


def table(result: dict[str, Any]) -> str:
    lines = []
    for transport, figures in result["transports"].items():
        lines += [f"--- {transport}", soak.table(figures)]
    rates = {name: f"{rate / 1e9:.2f}" for name, rate in result["weights_bytes_per_s"].items()}
    share = {name: f"{part:.0%}" for name, part in result["weights_of_copy"].items()}
    lines.append(
        f"--- weights, GB/s: shared memory {rates['shared']} ({share['shared']} of a copy into a new region, "
        f"{rates['copy']}), nixl {rates['nixl']} ({share['nixl']}); copy into memory in use {rates['copy_in_use']}"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jax_nixlep.bench_elastic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--commits", type=int, default=50)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--transports", default="shared,nixl", help="some of shared,nixl")
    parser.add_argument("--megabytes", type=int, default=64, help="of weights that move (64)")
    parser.add_argument("--samples", type=int, default=9, help="of each way to move weights (9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    args = parser.parse_args(argv)
    result = run(args)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
