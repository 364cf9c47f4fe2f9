"""Trains a byte-level mixture-of-experts language model on the source files of Python's standard library.

    python examples/train_lm.py --ranks 4

starts 4 processes on this machine, which form one `jax.distributed` mesh with one axis, "ep". Each brings its own part
of every batch (attention is data-parallel) and holds its own part of the experts, to which tokens travel over
jax_nixlep. Rank 0 then trains the same model again by itself, without expert parallelism, and compares the losses.

Writes checkpoint.safetensors and loss.png into --out, and the figures of the run into --json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
import text
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from model import ByteLM, Layout, ModelConfig, save_checkpoint
from tqdm import tqdm

import jax_nixlep as nx
from jax_nixlep.launch import rank_env, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="processes; it divides the batch and the 8 experts")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="pieces of text in a step, over all ranks")
    parser.add_argument("--length", type=int, default=128, help="bytes of a piece")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64", help="of all but the experts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-dense", action="store_true", help="do not train the single-process model to compare with")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    if args.ranks < 1 or args.batch % args.ranks or ModelConfig.experts % args.ranks:
        parser.error(f"--ranks must divide --batch {args.batch} and {ModelConfig.experts} experts; got {args.ranks}")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1; got {args.steps}")
    return args


class Trained(NamedTuple):
    losses: list[float]  # of each step, in nats per byte, before its update
    valid_loss: float
    tokens_per_s: float  # without the first step, which compiles
    params: nnx.State  # replicated


def train(args: argparse.Namespace, mesh: Mesh, dense: bool, name: str) -> Trained:
    """Trains for `args.steps` steps on `mesh`. Its devices, of any number of processes, share each batch."""
    tokens = args.batch * args.length
    layout = Layout(mesh.size, tokens // mesh.size, None if dense else mesh, dense, args.dtype)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, max(1, args.steps // 20), args.steps)
    # Adam divides each gradient by its own size; without this eps, also those that are nothing but rounding errors.
    adamw = optax.adamw(schedule, b2=0.95, eps=1e-5, weight_decay=0.1)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def create() -> tuple[ByteLM, nnx.Optimizer]:
        model = ByteLM(ModelConfig(window=args.length), layout, nnx.Rngs(args.seed))
        return model, nnx.Optimizer(model, adamw, wrt=nnx.Param)

    # Every array is made where it stays: experts spread over the mesh, all others on every device.
    graph, shapes = nnx.split(nnx.eval_shape(create))
    shardings = nnx.get_named_sharding(shapes, mesh)
    replicated, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("ep"))
    state = jax.jit(lambda: nnx.state(create()), out_shardings=shardings)()

    def loss_of(model: ByteLM, pieces: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = model(pieces[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(out.logits, pieces[:, 1:].astype("int32")).mean()
        return loss + out.router_loss, loss

    @jax.jit(donate_argnums=0, out_shardings=(shardings, replicated))
    def step(state: nnx.State, pieces: jax.Array) -> tuple[nnx.State, jax.Array]:
        model, optimizer = nnx.merge(graph, state)
        (_, loss), grads = nnx.value_and_grad(loss_of, has_aux=True)(model, pieces)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    @jax.jit
    def evaluate(state: nnx.State, pieces: jax.Array) -> jax.Array:
        return loss_of(nnx.merge(graph, state)[0], pieces)[1]

    def batches(corpus: np.ndarray, seed: int, count: int) -> Iterator[jax.Array]:
        """Global batches [batch, length + 1], of which each process brings the rows of its devices."""
        for i in range(count):
            rows = text.batch(corpus, args.batch, args.length, seed, i)
            yield jax.make_array_from_callback(rows.shape, spread, rows.__getitem__)

    train_text, valid_text = text.split(text.load_corpus())
    losses, began = [], 0.0
    quiet = jax.process_index() != 0
    bar = tqdm(batches(train_text, args.seed, args.steps), name, args.steps, mininterval=2, unit="step", disable=quiet)
    for pieces in bar:
        state, loss = step(state, pieces)
        losses.append(float(loss))
        began = began or time.perf_counter()
        rate = tokens * (len(losses) - 1) / max(time.perf_counter() - began, 1e-9)
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {rate:,.0f} tokens/s", refresh=False)
    valid_loss = float(np.mean([evaluate(state, pieces) for pieces in batches(valid_text, args.seed + 1, 4)]))
    params = nnx.state(nnx.merge(graph, state)[0], nnx.Param)
    return Trained(losses, valid_loss, rate, jax.jit(lambda p: p, out_shardings=replicated)(params))


def plot(path: Path, curves: dict[str, list[float]], entropy: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=False):
        axes.plot(losses, style, label=name)
    axes.axhline(entropy, color="gray", linestyle=":", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="Byte-level mixture of experts")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    args = parse_args()
    env = rank_env()
    if env is None:
        # Each rank its share of the cores, and two threads at least: an exchange of tokens and an all-reduce of
        # gradients may wait for the other ranks at the same time.
        threads = max(2, len(os.sched_getaffinity(0)) // args.ranks)
        sys.exit(run(sys.argv, args.ranks, env={"NPROC": str(threads)}))

    began = time.perf_counter()
    jax.config.update("jax_num_cpu_devices", 1)
    # Ranks add up gradients in another order than one process does. In float32 the difference decides, within some 100
    # steps, a token's close choice between two experts the other way, and from there on the two runs part.
    jax.config.update("jax_enable_x64", args.dtype == "float64")
    jax.distributed.initialize(env.coordinator, env.num_ranks, env.rank)
    mesh = Mesh(np.array(jax.devices()), ("ep",))
    layout = Layout(mesh.size, args.batch * args.length // mesh.size, mesh)
    nx.initialize(layout.ep_config(ModelConfig()), mesh=mesh, axis="ep")
    trained = train(args, mesh, False, f"{mesh.size} ranks")
    nx.shutdown()
    jax.distributed.shutdown()
    if env.rank != 0:
        return

    entropy = text.unigram_entropy(text.load_corpus())
    curves = {f"experts on {mesh.size} ranks": trained.losses}
    result: dict[str, Any] = {
        "loss_first": trained.losses[0],
        "loss_last": trained.losses[-1],
        "loss_valid": trained.valid_loss,
        "unigram_entropy": entropy,
        "tokens_per_s": trained.tokens_per_s,
        "ranks": mesh.size,
        "steps": args.steps,
        "batch_tokens": args.batch * args.length,
        "seed": args.seed,
        "dense_max_abs_diff": None,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(args.out / "checkpoint.safetensors", ModelConfig(window=args.length), trained.params)
    if not args.no_dense:  # the other ranks are done; this one goes on alone
        dense = train(args, Mesh(np.array(jax.local_devices()), ("ep",)), True, "dense")
        curves["dense, one process"] = dense.losses
        differences = np.abs(np.subtract(trained.losses, dense.losses))
        result |= {"dense_max_abs_diff": float(differences.max()), "dense_tokens_per_s": dense.tokens_per_s}
    plot(args.out / "loss.png", curves, entropy)
    result["seconds"] = time.perf_counter() - began
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
