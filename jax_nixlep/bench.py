"""How fast the ops are, beside what a user would write instead: `python -m jax_nixlep.bench`.

Starts the ranks itself, as one jax.distributed job, and times in turn on one mesh:

  nixlep      `dispatch` and `combine`
  nixl_ep     the same over NVIDIA's kernels (--kernels nixl_ep, on GPUs), in a group of its own
  all_to_all  each token once to each rank that needs it, in buffers [ranks, capacity] through lax.all_to_all, there and
              back. Capacity is the tokens of a rank: as with the others, nothing is dropped.
  all_gather  lax.all_gather of all tokens, and lax.psum_scatter of the partial sums

All get the same tokens and routing, from one seed, and keep one contract: rows packed by expert, as a grouped matmul
takes them, and back the weighted sum of each token. Samples are one call, from a barrier to its result, of the slowest
rank. "chained" is dispatch+combine again and again in one program, each on the result of the one before: the figure
without the host. Before and after, each runtime is compared with what NumPy makes of experts that multiply by
(number + 1) / experts, so that rows at the wrong expert do not pass; so is the last chained result, and the layer with
`backend="xla"`. "error" is the largest deviation found (of the first three
rows: that of the pair), relative to the value or a floor.

Bytes are those of all ranks. "logical": one row for each chosen (token, expert), in each direction. "physical": what
nixlep reads and writes in memory for it; the memcpy limit is the same count of plain copies by all ranks at once, on
GPUs, of their own memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nixlep as nx
from jax_nixlep import launch
from jax_nixlep.experts import grouped_mlp
from jax_nixlep.router import route

AXIS = "ep"
MAX_ERROR = 8 * 2.0**-8  # relative to the exact value, or to a floor where that is smaller
COPIES = 256  # of a GPU's memory in one program, next to which a call's own time is short
ROUNDS = 4  # the runtimes take turns, so that a busy machine disturbs all alike


# A way to bring tokens to experts and back, on one rank inside shard_map:
#   dispatch(x [t, H], ids [t, K], weights [t, K]) -> rows [C, H], group sizes [E], handle
#   combine(expert outputs [C, H], handle) -> y [t, H]
Exchange = tuple[Callable[..., Any], Callable[..., jax.Array]]


def nixlep_exchange(config: nx.EpConfig) -> Exchange:
    def dispatch(x: jax.Array, ids: jax.Array, weights: jax.Array) -> Any:
        received = nx.dispatch(x, ids, weights, config=config)
        return received.tokens, received.group_sizes, received.handle

    return dispatch, partial(nx.combine, config=config)


# --- What a user would write instead. ---


def all_gather_exchange(config: nx.EpConfig) -> Exchange:
    gather = partial(lax.all_gather, axis_name=AXIS, tiled=True)

    def dispatch(x: jax.Array, ids: jax.Array, weights: jax.Array) -> Any:
        return _pack(config, gather(x), gather(_join(ids, weights)))

    def combine(out: jax.Array, handle: Any) -> jax.Array:
        return lax.psum_scatter(_partial_sums(out, *handle), AXIS, tiled=True)

    return dispatch, combine


def all_to_all_exchange(config: nx.EpConfig) -> Exchange:
    exchange = partial(lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0)

    def dispatch(x: jax.Array, ids: jax.Array, weights: jax.Array) -> Any:
        ranks = jnp.arange(config.max_ranks, dtype=jnp.int32)
        goes = (ids // config.experts_per_rank == ranks[:, None, None]).any(-1)  # [ranks, t]
        source = jnp.argsort(~goes, axis=1, stable=True)  # [ranks, capacity]: who goes there, in order
        sent = jnp.take_along_axis(goes, source, axis=1)
        meta = exchange(jnp.where(sent[..., None], _join(ids, weights)[source], -1))
        tokens = exchange(x[source])
        rows, sizes, handle = _pack(config, lax.collapse(tokens, 0, 2), lax.collapse(meta, 0, 2))
        return rows, sizes, (*handle, goes)

    def combine(out: jax.Array, handle: Any) -> jax.Array:
        row_of, weights, goes = handle
        parts = exchange(_partial_sums(out, row_of, weights).reshape(*goes.shape, -1))
        place = jnp.cumsum(goes, axis=1) - 1
        y = jnp.zeros(parts.shape[1:], jnp.float32)
        for rank in range(config.max_ranks):
            y += jnp.where(goes[rank, :, None], parts[rank][place[rank]], 0).astype(jnp.float32)
        return y.astype(out.dtype)

    return dispatch, combine


EXCHANGES = {
    "nixlep": nixlep_exchange,
    "nixl_ep": nixlep_exchange,
    "all_to_all": all_to_all_exchange,
    "all_gather": all_gather_exchange,
}
RUNTIMES = {"native": ["nixlep"], "nixl_ep": ["nixl_ep"], "xla": ["all_to_all", "all_gather"]}  # of --kernels
OURS = ("nixlep", "nixl_ep")


def _join(ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Both as one array: one collective less."""
    return jnp.concatenate([ids, lax.bitcast_convert_type(weights, jnp.int32)], axis=-1)


def _pack(config: nx.EpConfig, tokens: jax.Array, meta: jax.Array) -> Any:
    """Tokens [n, H] of all ranks -> rows [C, H] of the local experts, by expert. Padding rows hold anything."""
    ids, bits = jnp.split(meta, 2, axis=-1)
    experts, k = config.experts_per_rank, config.top_k
    local = ids - lax.axis_index(AXIS) * experts
    key = jnp.where((local >= 0) & (local < experts), local, experts).reshape(-1)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    sizes = (key[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    order = order[: config.num_rows]
    rows = tokens[jnp.where(jnp.arange(order.size) < sizes.sum(), order // k, 0)]
    row_of = jnp.where(key < experts, row, -1).reshape(ids.shape)
    return rows, sizes, (row_of, lax.bitcast_convert_type(bits, jnp.float32))


def _partial_sums(out: jax.Array, row_of: jax.Array, weights: jax.Array) -> jax.Array:
    """Gathers, choice by choice: XLA is slow at scatter-add on CPU."""
    weights = jnp.where(row_of < 0, 0, weights)
    total = jnp.zeros((row_of.shape[0], out.shape[1]), jnp.float32)
    for k in range(row_of.shape[1]):
        total += weights[:, k, None] * out[jnp.maximum(row_of[:, k], 0)].astype(jnp.float32)
    return total.astype(out.dtype)


# --- What is timed and checked. ---


class Bench:
    """Inputs, programs and measurements of one rank, for some of the runtimes."""

    def __init__(self, args: argparse.Namespace, config: nx.EpConfig, mesh: jax.sharding.Mesh, runtimes: list[str]):
        self.args, self.config, self.mesh = args, config, mesh
        self.exchanges = {name: EXCHANGES[name](config) for name in runtimes}
        self.scaled = {name: self.program(self.pair(name, self.scale_by_expert)) for name in runtimes}
        # Every rank draws everything, so that each knows the routing of all.
        rng = np.random.default_rng(args.seed)
        n = args.ranks * args.tokens
        self.ids = np.argsort(rng.random((n, args.experts)), axis=1)[:, : args.top_k].astype(np.int32)
        weights = rng.random(self.ids.shape, np.float32) + 0.1
        weights /= weights.sum(1, keepdims=True)
        x = np.asarray(jnp.asarray(rng.standard_normal((n, args.hidden), np.float32), args.dtype))
        factor = (weights * (self.ids + 1)).sum(1, keepdims=True) / args.experts
        mine = slice(jax.process_index() * args.tokens, (jax.process_index() + 1) * args.tokens)
        self.x = x[mine].astype(np.float32)
        self.expected = self.x * factor[mine]
        self.inputs = [self.place(v[mine], AXIS) for v in (x, self.ids, weights)]
        if on_gpu():  # ranks of one GPU cannot have collectives of XLA
            self.align: Callable[[], Any] = partial(gather, 0)
        else:
            self.align = partial(self.program(lambda x: lax.psum(x[0, 0], AXIS), P(AXIS), P()), self.inputs[0])

    def place(self, part: np.ndarray, *axes: str) -> jax.Array:
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, P(*axes)), part)

    def program(self, function: Callable[..., Any], in_specs: Any = P(AXIS), out_specs: Any = P(AXIS)) -> Any:  # noqa: B008
        return jax.jit(jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs))

    def pair(self, name: str, expert: Callable[..., jax.Array] | None = None) -> Callable[..., jax.Array]:
        dispatch, combine = self.exchanges[name]

        def run(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
            rows, sizes, handle = dispatch(x, ids, weights)
            rows = expert(rows, sizes) if expert else lax.optimization_barrier(rows)  # as opaque as a matmul
            return combine(rows, handle)

        return run

    def chain(self, name: str) -> Callable[..., jax.Array]:
        pair, length = self.pair(name), self.args.chain
        return lambda x, *routing: lax.scan(lambda x, _: (pair(x, *routing), None), x, length=length)[0]

    def layer(self, name: str, backend: Any = "native") -> Callable[..., jax.Array]:
        router = nx.Router(num_experts=self.args.experts, top_k=self.args.top_k)

        def run(x: jax.Array, gate: jax.Array, *experts: jax.Array) -> jax.Array:
            if name in OURS:
                params = dict(zip(("gate", "wi_0", "wi_1", "wo"), (gate, *experts), strict=True))
                options: Any = {"axis": AXIS, "token_axes": (AXIS,), "backend": backend}
                return nx.nixlep_moe(x, params, config=self.config, router=router, **options)[0]
            routing = route(router, x.astype(jnp.float32) @ gate, axis_names=(AXIS,))
            experts_of = partial(grouped_mlp, wi_0=experts[0], wi_1=experts[1], wo=experts[2])
            return self.pair(name, experts_of)(x, routing.expert_ids, routing.weights)

        return self.program(run, (P(AXIS), P(), P(AXIS), P(AXIS), P(AXIS)))

    def layer_inputs(self) -> list[jax.Array]:
        args, rng = self.args, np.random.default_rng(self.args.seed + 1)
        gate = rng.standard_normal((args.hidden, args.experts), np.float32) / args.hidden**0.5
        shapes = [(args.hidden, args.mlp_dim), (args.hidden, args.mlp_dim), (args.mlp_dim, args.hidden)]
        rng = np.random.default_rng((args.seed, jax.process_index()))
        drawn = [rng.standard_normal((self.config.experts_per_rank, *s), np.float32) / s[0] ** 0.5 for s in shapes]
        experts = [self.place(np.asarray(jnp.asarray(w, args.dtype)), AXIS) for w in drawn]
        return [self.inputs[0], self.place(gate), *experts]

    def scale_by_expert(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        local = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")
        number = lax.axis_index(AXIS) * self.config.experts_per_rank + local
        return rows * ((number + 1) / self.args.experts).astype(rows.dtype)[:, None]

    def error(self, got: jax.Array, expected: np.ndarray, floor: float = 0.02) -> float:
        """The largest of any rank."""
        error = np.abs(local(got) - expected) / np.maximum(np.abs(expected), floor)
        return float(np.max(gather(error.max())))

    def check(self, name: str) -> float:
        return self.error(self.scaled[name](*self.inputs), self.expected)

    def max_error(self, name: str, op: str) -> float:
        # psum_scatter rounds the sum at every rank that adds to it; the others add in float32.
        return MAX_ERROR * (max(1, self.args.ranks / 2) if (name, op) == ("all_gather", "chained") else 1)

    def times(self, op: str, calls: dict[str, Callable[[], Any]], count: int) -> dict[str, np.ndarray]:
        """Seconds of each call, of the slowest rank."""
        if jax.process_index() == 0:
            print(f"timing {op} ...", file=sys.stderr)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for part in range(ROUNDS + 1):  # the first is the warm-up
            for name, call in calls.items():
                for _ in range(max(1, count // ROUNDS) if part else 3):
                    jax.block_until_ready(self.align())
                    start = time.perf_counter()
                    jax.block_until_ready(call())
                    samples[name] += [time.perf_counter() - start] * (part > 0)
        every_rank = np.reshape(gather(np.array(list(samples.values()))), (self.args.ranks, len(calls), -1))
        return dict(zip(calls, every_rank.max(axis=0), strict=True))

    def memcpy_rate(self) -> float:
        """Bytes per second that plain copies in all ranks at once read and write, where the tokens are."""
        if on_gpu():
            num_bytes, count = 1 << 28, COPIES
            source = jnp.ones(num_bytes // 4, jnp.float32)
            copy = partial(jax.jit(lambda x: lax.fori_loop(0, count, lambda _, x: x + 1, x)), source)
        else:
            num_bytes, count = 1 << 25, 1
            copy = partial(np.copyto, np.zeros(num_bytes, np.uint8), np.ones(num_bytes, np.uint8))
        seconds = self.times("memcpy", {"": copy}, 20)[""]
        return 2 * num_bytes * count * self.args.ranks / float(np.median(seconds))

    def bytes_moved(self) -> dict[str, dict[str, int]]:
        row = self.args.hidden * jnp.dtype(self.args.dtype).itemsize
        source = np.arange(len(self.ids)) // self.args.tokens
        visits = [(self.ids // self.config.experts_per_rank == rank).any(1) for rank in range(self.args.ranks)]
        sums = sum(int(v.sum()) for v in visits)
        pushed = sum(int((v & (source != rank)).sum()) for rank, v in enumerate(visits))
        pushed *= self.args.transport == "nixl"
        tokens, rows = len(self.ids), self.ids.size
        # Stage, push, deliver; add up here, push, add up there. Each reads and writes; padding rows are not counted.
        delivered = (sums if on_gpu() else rows) + rows  # a GPU reads a token once for all its rows
        physical = {"dispatch": 2 * (tokens + pushed) + delivered, "combine": rows + sums + 2 * pushed + sums + tokens}
        both = {"physical_bytes": physical, "logical_bytes": {"dispatch": rows, "combine": rows}}
        for moved in both.values():
            moved["dispatch+combine"] = moved["chained"] = moved["dispatch"] + moved["combine"]
        return {kind: {op: count * row for op, count in moved.items()} for kind, moved in both.items()}

    def run(self, layer: np.ndarray | None = None) -> dict[str, Any]:
        """`layer`: what the layer must give; default: as plain JAX has it, or the first runtime."""
        args, inputs, layer_inputs = self.args, self.inputs, self.layer_inputs()
        ops = {"dispatch": 1.0, "combine": 1.0, "dispatch+combine": 1.0, "chained": 0.25, "layer": 0.2}
        calls: dict[str, dict[str, Callable[[], Any]]] = {op: {} for op in ops}
        for name, (dispatch, combine) in self.exchanges.items():
            calls["dispatch"][name] = partial(self.program(dispatch), *inputs)
            rows, _, handle = calls["dispatch"][name]()
            calls["combine"][name] = partial(self.program(combine), rows, handle)
            calls["dispatch+combine"][name] = partial(self.program(self.pair(name)), *inputs)
            calls["chained"][name] = partial(self.program(self.chain(name)), *inputs)
            calls["layer"][name] = partial(self.layer(name), *layer_inputs)
        errors, memcpy = {name: self.check(name) for name in self.exchanges}, self.memcpy_rate()
        seconds = {op: self.times(op, of, int(args.iterations * ops[op])) for op, of in calls.items()}
        memcpy = (memcpy + self.memcpy_rate()) / 2
        errors = {name: float(np.maximum(self.check(name), error)) for name, error in errors.items()}  # NaN stays
        if layer is None and "all_to_all" in self.exchanges:
            layer = local(self.layer("nixlep", "xla")(*layer_inputs))
        elif layer is None:
            layer = local(next(iter(calls["layer"].values()))())
        expected = {"chained": (self.x, 0.02), "layer": (layer, float(np.sqrt(np.mean(layer**2))))}

        moved, figures = self.bytes_moved(), []
        for op, of in seconds.items():
            for name, samples in of.items():
                ms = samples * 1e3 / (args.chain if op == "chained" else 1)
                median, p99, least = np.quantile(ms, (0.5, 0.99, 0)).tolist()
                row: dict[str, Any] = {"op": op, "runtime": name, "median_ms": median, "p99_ms": p99, "min_ms": least}
                row["samples"] = len(ms)
                row["error"] = self.error(calls[op][name](), *expected[op]) if op in expected else errors[name]
                row["correct"] = errors[name] < MAX_ERROR and row["error"] < self.max_error(name, op)
                if op in moved["logical_bytes"]:
                    row["logical_bytes"] = moved["logical_bytes"][op]
                    if name == "nixlep":
                        row["physical_bytes"] = moved["physical_bytes"][op]
                        row["memcpy_fraction"] = row["physical_bytes"] / (median * 1e-3) / memcpy
                figures.append(row)
        return {
            "settings": {key: value for key, value in vars(args).items() if key not in ("json", "plot")},
            "machine": machine(),
            "rows_per_rank": self.config.num_rows,
            "memcpy_bytes_per_s": memcpy,
            "rows": figures,
            "layer": layer,
        }


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several groups, one: rows by operation, and how much faster the first runtime is than the best of XLA."""
    rows = [row for result in results for row in result["rows"]]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    rows = [row for op in ops for row in rows if row["op"] == op]
    speedups = {}
    for op in ops:
        medians = {row["runtime"]: row["median_ms"] for row in rows if row["op"] == op}
        baselines = [medians[name] for name in RUNTIMES["xla"] if name in medians]
        if baselines and "nixlep" in medians:
            speedups[op] = min(baselines) / medians["nixlep"]
    merged = {key: value for key, value in results[0].items() if key != "layer"} | {"rows": rows}
    merged["correct"] = all(row["correct"] for row in rows)
    if speedups:
        merged["speedup_vs_best_baseline"] = speedups["dispatch+combine"]
    return merged | {"speedups": speedups}


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


_gathers = itertools.count()


def gather(value: Any) -> np.ndarray:
    """[ranks, ...]: the value of every rank; on GPUs through the job's key-value service."""
    if not on_gpu():
        return np.asarray(process_allgather(np.asarray(value)))
    from jax._src.distributed import global_state  # has no public name

    client: Any = global_state.client
    key = f"bench/{next(_gathers)}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(np.asarray(value, float).tolist()))
    ranks = range(jax.process_count())
    return np.array([json.loads(client.blocking_key_value_get(f"{key}/{rank}", 60_000)) for rank in ranks])


def local(value: jax.Array) -> np.ndarray:
    return np.asarray(value.addressable_data(0)).astype(np.float32)


def machine() -> dict[str, Any]:
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    paths = {peer.path for peer in nx.current_group().health().peers.values()} - {"self", "none"}
    return {
        "cpu": cpus[0].split(": ")[1] if cpus else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "transport": ", ".join(sorted(paths)) or "none",
    }


def table(result: dict[str, Any]) -> str:
    titles = ("op", "runtime", "median ms", "p99 ms", "logical MB", "physical MB", "of memcpy", "error")
    lines = ["{:<17}{:<11}{:>10}{:>10}{:>12}{:>12}{:>11}{:>8}".format(*titles)]
    for row in result["rows"]:
        megabytes = [f"{row[key] / 1e6:.1f}" if key in row else "" for key in ("logical_bytes", "physical_bytes")]
        share = f"{row['memcpy_fraction']:.0%}" if "memcpy_fraction" in row else ""
        lines.append(
            f"{row['op']:<17}{row['runtime']:<11}{row['median_ms']:>10.3f}{row['p99_ms']:>10.3f}"
            f"{megabytes[0]:>12}{megabytes[1]:>12}{share:>11}"
            f"{row['error']:>8.4f}{'' if row['correct'] else ' WRONG'}"
        )
    m, limit = result["machine"], result["memcpy_bytes_per_s"] / 1e9
    lines.append(f"{m['cpu']}, {m['cores']} cores, jax {m['jax']}, {m['transport']}, memcpy limit {limit:.1f} GB/s")
    if result["speedups"]:
        speedups = ", ".join(f"{op} {x:.2f}x" for op, x in result["speedups"].items())
        lines.append(f"nixlep / better baseline: {speedups}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.5), layout="constrained")
    ops = list(dict.fromkeys(row["op"] for row in result["rows"]))
    for axes, op in zip(figure.subplots(1, len(ops)), ops, strict=True):
        rows = [row for row in result["rows"] if row["op"] == op]
        medians = [row["median_ms"] for row in rows]
        axes.bar_label(axes.bar([row["runtime"] for row in rows], medians, color=["C2", "C0", "C1", "C3"]), fmt="%.2f")
        axes.set(title=op, ylabel="median ms")
    figure.savefig(path, dpi=120)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jax_nixlep.bench", description="Time jax_nixlep beside XLA.")
    numbers = {
        "ranks": (4, "processes"),
        "tokens": (128, "tokens of each rank"),
        "hidden": (2048, "values of a token"),
        "experts": (32, "experts of all ranks together"),
        "top-k": (8, "experts of a token"),
        "mlp-dim": (256, "width of an expert in the layer"),
        "iterations": (100, "samples of each op; a quarter of it chained, a fifth of the layer"),
        "chain": (16, "pairs of a chained sample"),
    }
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument("--seed", type=int, default=0, help="of tokens, routing and weights (0)")
    parser.add_argument("--recv-capacity", type=int, help="rows a rank takes, for all runtimes (the worst case)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--transport", default="shared", choices=("shared", "nixl"), help="between the ranks, of nixlep"
    )
    kernels = ",".join(RUNTIMES)
    parser.add_argument("--kernels", default="native,xla", help=f"what to time, some of {kernels} (native,xla)")
    parser.add_argument("--gpus", type=int, help="rank r runs on GPU r %% GPUS (on CPUs)")
    parser.add_argument("--json", metavar="OUT", help="write all figures")
    parser.add_argument("--plot", metavar="OUT", help="write a PNG (needs matplotlib)")
    args = parser.parse_args(argv)
    for name in numbers:
        if (value := getattr(args, name.replace("-", "_"))) < 1:
            parser.error(f"--{name} must be positive; got {value}")
    if unknown := set(args.kernels.split(",")) - set(RUNTIMES):
        parser.error(f"--kernels must be of {kernels}; got {', '.join(sorted(unknown))}")
    if args.experts % args.ranks or args.experts < args.top_k:
        parser.error(f"--experts must be a multiple of --ranks, and at least --top-k; got {args.experts}")
    return args


def main() -> int:
    args, job = parse(), launch.rank_env()
    if job is None:
        env = {"JAX_NIXLEP_P2P": "0"} if args.transport == "nixl" else {}
        if args.gpus is None:
            env["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
        return launch.run(["-m", "jax_nixlep.bench", *sys.argv[1:]], args.ranks, env=env, gpus=args.gpus)
    jax.distributed.initialize(job.coordinator, job.num_ranks, job.rank)
    mesh = jax.make_mesh((args.ranks,), (AXIS,))
    config = nx.EpConfig(
        max_ranks=args.ranks,
        experts_per_rank=args.experts // args.ranks,
        max_tokens_per_rank=args.tokens,
        hidden=args.hidden,
        top_k=args.top_k,
        dtype=args.dtype,
        recv_capacity=args.recv_capacity,
    )
    results: list[dict[str, Any]] = []
    wanted = args.kernels.split(",")
    groups: list[Any] = [name for name in ("native", "nixl_ep") if name in wanted] or ["native"]
    for kernels in groups:
        runtimes = RUNTIMES[kernels] if kernels in wanted else []
        if kernels == groups[0] and "xla" in wanted:
            runtimes = runtimes + RUNTIMES["xla"]
        nx.initialize(config, mesh=mesh, axis=AXIS, kernels=kernels)
        results.append(Bench(args, config, mesh, runtimes).run(results[0]["layer"] if results else None))
        nx.shutdown()
    result = merge(results)
    if job.rank == 0:
        print(table(result))
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        if args.plot:
            plot(result, args.plot)
    return 0 if result["correct"] else 1


if __name__ == "__main__":
    sys.exit(main())
