"""A decode step of a large mixture-of-experts decoder of random weights, on one rank: time in our operations, and gaps.

    python examples/bench_decode.py --gpu --json out.json        # sizes of a Qwen3-MoE of 16 layers and 64 experts
    python examples/bench_decode.py --layers 2 --hidden 64 --experts 8 --top-k 2 --expert-dim 32 --vocab 256

Each program is timed beside the same program in which the MoE layer has no dispatch and combine: tokens are sorted by
expert, gathered and added up where they are, in plain JAX. On a GPU steps are captured into command buffers, and JAX's
profiler says how long each kernel ran. A step's gap is its time, taken without a profiler, less that of its kernels;
`idle_us` is what the profiler sees between kernels, which it disturbs.

One rank has no peer to wait for: this is what the layer costs beside its experts, not what a network costs.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--gpu" in sys.argv:  # our operations are captured even where XLA finds few others to capture with them
    os.environ["JAX_PLATFORMS"] = "cuda"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_graph_min_graph_size=1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx
from moe_decoder.attention import Where
from moe_decoder.config import ModelConfig, read_config
from moe_decoder.decoder import Decoder, Layout, empty_cache

import jax_nixlep as nx
from jax_nixlep import _ffi
from jax_nixlep.bench_kernels import Kernel, kernels_of, usage
from jax_nixlep.experts import grouped_mlp
from jax_nixlep.flax.nnx import NixlEpMoE
from jax_nixlep.moe import MoeAux
from jax_nixlep.placement import identity_placement, to_slots
from jax_nixlep.router import route

ROUNDS = 4  # the programs take turns, so that a busy machine disturbs both alike
TRACED = 10  # calls under the profiler
CHAIN = 8  # layers in one program, where the layer is measured by itself


class LocalMoe(NixlEpMoE):
    """The same maths without dispatch and combine, for experts without biases that are all on this rank."""

    def __call__(self, x, token_mask=None, placement=None, after=None):
        tokens, k = x.reshape(-1, x.shape[-1]), self.router.top_k
        mask = None if token_mask is None else token_mask.reshape(-1)
        routing = route(self.router, tokens.astype(jnp.float32) @ self.gate[...].astype(jnp.float32), token_mask=mask)
        expert = to_slots(placement, routing.expert_ids).reshape(-1)
        order = jnp.argsort(jnp.where(expert < 0, self.config.experts_per_rank, expert), stable=True)
        sizes = jnp.bincount(expert, length=self.config.experts_per_rank).astype(jnp.int32)
        out = grouped_mlp(tokens[order // k], sizes, self.wi_0[...], self.wi_1[...], self.wo[...])
        back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
        y = (out[back].reshape(-1, k, x.shape[-1]).astype(jnp.float32) * routing.weights[..., None]).sum(1)
        none = jnp.zeros((), jnp.int32)
        aux = MoeAux(
            routing.aux_loss, routing.load_balance_loss, routing.z_loss, routing.load, none, jnp.zeros(1, jnp.float32)
        )
        return y.astype(x.dtype).reshape(x.shape), aux


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "layers": 16, "hidden": 2048, "experts": 64, "top-k": 8, "expert-dim": 768, "heads": 32, "kv-heads": 4,
        "head-dim": 128, "vocab": 151936, "length": 1024, "steps": 200,
    }  # fmt: skip
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences of a step (1 8 32)")
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 1024], help="of a layer by itself (128 1024)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--gpu", action="store_true", help="run on this machine's first GPU; default: CPU")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    for name in (*sizes, "batch", "tokens"):
        value = getattr(args, name.replace("-", "_"))
        if min(value if isinstance(value, list) else [value], default=1) < 1:
            parser.error(f"--{name} must be at least 1; got {value}; raise it")
    if args.top_k > args.experts or args.heads % args.kv_heads or args.head_dim % 2:
        parser.error(
            "--top-k must be at most --experts, --kv-heads must divide --heads and 2 --head-dim; got "
            f"{args.top_k} of {args.experts}, {args.kv_heads} of {args.heads}, {args.head_dim}; correct them"
        )
    if (least := 2 * args.steps + 8) > args.length:
        parser.error(f"--length must be at least {least}; got {args.length}; raise it, or lower --steps")
    return args


def model_config(args: argparse.Namespace) -> ModelConfig:
    values = {
        "model_type": "qwen3_moe", "vocab_size": args.vocab, "hidden_size": args.hidden,
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim, "num_experts": args.experts, "num_experts_per_tok": args.top_k,
        "moe_intermediate_size": args.expert_dim, "intermediate_size": args.expert_dim, "norm_topk_prob": True,
        "rms_norm_eps": 1e-6, "max_position_embeddings": args.length, "tie_word_embeddings": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return read_config(Path(folder))


@functools.partial(jax.jit, static_argnums=(1, 2))
def drawn(seed: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Values of a size that keeps those of all layers alike."""
    scale = shape[-2] ** -0.5 if len(shape) > 1 else 1.0
    return (jax.random.normal(jax.random.key(seed), shape, dtype) * scale).astype(dtype)


def draw(state: Any) -> Any:
    leaves, tree = jax.tree.flatten(state)
    return tree.unflatten([drawn(i, leaf.shape, str(leaf.dtype)) for i, leaf in enumerate(leaves)])


def ep_config(args: argparse.Namespace, tokens: int) -> nx.EpConfig:
    """Of one rank with all experts. It has rows for all choices of `tokens`, and no more."""
    return nx.EpConfig(
        max_ranks=1,
        experts_per_rank=args.experts,
        max_tokens_per_rank=tokens,
        hidden=args.hidden,
        top_k=args.top_k,
        dtype=args.dtype,
    )


def abstract(args: argparse.Namespace, config: ModelConfig, ep: nx.EpConfig, local: bool = False) -> Decoder:
    """The decoder without values, with dispatch and combine or `LocalMoe`; both have the same parameters."""
    decoder = nnx.eval_shape(lambda: Decoder(config, ep, Layout(dtype=args.dtype), nnx.Rngs(0)))
    for layer in decoder.layers if local else ():
        layer.moe.__class__ = LocalMoe
    return decoder


class Timed:
    """A program that is called again and again on its own results."""

    def __init__(self, program: Callable[..., Any], state: Any):
        self._program, self._state = program, state

    def run(self, count: int) -> Any:
        for _ in range(count):
            out, self._state = self._program(self._state)
        return out

    def seconds(self, count: int) -> float:
        """Of one call."""
        jax.block_until_ready(self._state)
        start = time.perf_counter()
        jax.block_until_ready(self.run(count))
        return (time.perf_counter() - start) / count


def longest(kernels: list[Kernel], count: int = 8) -> dict[str, float]:
    """Microseconds of the kernels that took most, by name."""
    total: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        name = kernel.name.replace("(anonymous namespace)::", "").removeprefix("void ")
        total[name.partition("(")[0][:80]] += kernel.duration_ns / 1e3
    return dict(total.most_common(count))


def compare(timed: dict[str, Timed], count: int, operations: int) -> dict[str, Any]:
    """Times both kinds in turn, and what the kernels of "nixlep", with so many operations of ours, take of it."""
    for program in timed.values():
        jax.block_until_ready(program.run(3))
    before, count = _ffi.num_launches(), max(1, count // ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(ROUNDS):
        for name, program in timed.items():
            samples[name].append(program.seconds(count))
    us = {name: statistics.median(values) * 1e6 for name, values in samples.items()}
    row: dict[str, Any] = {
        "us": us["nixlep"],
        "local_us": us["local"],
        "overhead": us["nixlep"] / us["local"] - 1,
        "operations": operations,
        "difference_us_per_op": (us["nixlep"] - us["local"]) / operations,
        "handler_calls": (_ffi.num_launches() - before) / (count * ROUNDS),  # none where a command buffer is replayed
    }
    traced = min(count, TRACED)
    for name, program in timed.items():
        kernels = kernels_of(lambda program=program: program.run(traced))
        used = usage(kernels)
        if not used.kernels:
            row["profile"] = None  # on a CPU, or where nobody may trace the GPU
            break
        busy_us, ours_us = used.busy_us / traced, used.ours_us / traced
        found = {"kernels": used.kernels / traced, "kernels_us": busy_us, "idle_us": used.idle_us / traced}
        found["gap_us"] = us[name] - busy_us
        found["longest_us"] = {kernel: total / traced for kernel, total in longest(kernels).items()}
        if name == "nixlep":
            found |= {
                "ours_kernels": used.ours / traced,
                "ours_us": ours_us,
                "ours_share": ours_us / us[name],
                "ours_us_per_op": ours_us / operations,
                "ours_idle_us_per_op": used.ours_idle_us / traced / operations,
            }
        row.setdefault("profile", {})[name] = found
    return row


def decode(args: argparse.Namespace, config: ModelConfig, state: Any, ep: nx.EpConfig, batch: int) -> dict[str, Any]:
    placement = identity_placement(args.experts, [0], args.experts)
    timed, logits = {}, {}
    for name in ("nixlep", "local"):
        graph, _ = nnx.split(abstract(args, config, ep, name == "local"))

        @functools.partial(jax.jit, donate_argnums=(3,))
        def step(params, placement, carried, cache, graph=graph):
            tokens, start = carried
            where = Where(start[:, None], jnp.ones((batch, 1), bool))
            out, cache = nnx.merge(graph, params)(tokens, where, jnp.zeros(batch, jnp.int32), cache, placement)
            return out, (out.argmax(-1).astype(jnp.int32)[:, None], start + 1), cache

        def advance(carried, step=step):
            out, *carried = step(state, placement, *carried)
            return out, carried

        tokens = jnp.arange(batch, dtype=jnp.int32)[:, None] % config.vocab_size
        begin = [
            (tokens, jnp.zeros(batch, jnp.int32)),
            empty_cache(config, Layout(dtype=args.dtype), batch, args.length),
        ]
        timed[name] = Timed(advance, begin)
        print(f"decode: compiling batch {batch}, {name} ...", file=sys.stderr, flush=True)
        logits[name] = timed[name].run(1)
    difference = jnp.abs(logits["nixlep"] - logits["local"]).max() / jnp.abs(logits["local"]).max()
    row = {"batch": batch} | compare(timed, args.steps, 2 * args.layers)
    return row | {"max_relative_difference": float(difference)}


def layer(args: argparse.Namespace, config: ModelConfig, ep: nx.EpConfig, tokens: int) -> dict[str, Any]:
    """`NixlEpMoE` by itself: several in a row on the same weights."""
    placement = identity_placement(args.experts, [0], args.experts)
    timed, results = {}, {}
    for name, kind in (("nixlep", NixlEpMoE), ("local", LocalMoe)):

        def make(kind=kind):
            return kind(ep, config.router, config.expert_dim, param_dtype=args.dtype, rank=0, rngs=nnx.Rngs(0))

        graph, shapes = nnx.split(nnx.eval_shape(make))
        params = draw(shapes)

        @jax.jit
        def chain(params, placement, x, graph=graph):
            layer = nnx.merge(graph, params)
            for _ in range(CHAIN):
                x = (x + layer(x, placement=placement)[0]) / 2  # neither vanishes nor explodes
            return x

        x = jax.random.normal(jax.random.key(1), (tokens, args.hidden), args.dtype)
        timed[name] = Timed(lambda x, chain=chain, params=params: (chain(params, placement, x), x), x)
        print(f"layer: compiling {tokens} tokens, {name} ...", file=sys.stderr, flush=True)
        results[name] = timed[name].run(1).astype(jnp.float32)
    difference = jnp.abs(results["nixlep"] - results["local"]).max() / jnp.abs(results["local"]).max()
    row = {"tokens": tokens, "layers": CHAIN} | compare(timed, args.steps // CHAIN, 2 * CHAIN)
    return row | {"max_relative_difference": float(difference)}


def text(kind: str, row: dict[str, Any]) -> str:
    size = f"batch {row['batch']}" if "batch" in row else f"{row['tokens']} tokens"
    words = (
        f"{kind}, {size}: {row['us']:.0f} us, without dispatch and combine {row['local_us']:.0f} us "
        f"({row['overhead']:+.1%}, {row['difference_us_per_op']:+.1f} us per operation)"
    )
    if not row["profile"]:
        return words + "; no profile of kernels"
    ours = row["profile"]["nixlep"]
    return (
        f"{words}; our kernels {ours['ours_us']:.0f} us ({ours['ours_share']:.1%}), {ours['ours_us_per_op']:.1f} us per"
        f" operation; all kernels {ours['kernels_us']:.0f} us, gap {ours['gap_us']:.0f} us; idle beside ours in the "
        f"profile {ours['ours_idle_us_per_op']:.1f} us per operation; {row['handler_calls']:.1f} handler calls"
    )


def main() -> None:
    args = parse_args()
    config = model_config(args)
    result: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "decode": [],
        "layer": [],
    }

    def measure(kind: str, function: Callable[..., dict[str, Any]], size: int) -> None:
        ep = ep_config(args, size)
        nx.initialize(ep, rank=0, members=[0])
        row = function(ep, size)
        nx.shutdown()
        result[kind].append(row)
        print(text(kind, row), flush=True)
        if args.json:  # after each: what comes later may take too long
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    state = draw(nnx.split(abstract(args, config, ep_config(args, 1)))[1])
    for batch in args.batch:
        measure("decode", functools.partial(decode, args, config, state), batch)
    del state
    for tokens in args.tokens:
        measure("layer", functools.partial(layer, args, config), tokens)


if __name__ == "__main__":
    main()
