"""Continues prompts with the model that train_lm.py wrote.

    python examples/generate.py --checkpoint out --prompt "def " "class "

starts 4 independent JAX processes on this machine. Each loads its own part of the experts and takes its own part of the
prompts; in every layer they exchange tokens over jax_nixlep. A process without a prompt takes part with zero tokens.
The text that follows the first prompt is printed as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model import Cache, Layout, empty_cache, load_checkpoint, read_config
from tqdm import tqdm

import jax_nixlep as nx
from jax_nixlep.launch import RankEnv, rank_env, run
from jax_nixlep.store import connect


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    prompts = ["def ", "class ", "import ", "    return "]
    parser.add_argument("--prompt", nargs="+", default=prompts, metavar="TEXT")
    parser.add_argument("--checkpoint", type=Path, default=Path("out"), help="file, or --out of train_lm.py")
    parser.add_argument("--ranks", type=int, default=4, help="processes; it divides the model's experts")
    parser.add_argument("--steps", type=int, default=200, help="bytes to add to each prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest byte")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    if args.checkpoint.is_dir():
        args.checkpoint /= "checkpoint.safetensors"
    if not args.checkpoint.exists():
        parser.error(f"--checkpoint must exist; got {args.checkpoint}; run examples/train_lm.py first")
    if "" in args.prompt or args.steps < 1 or args.temperature < 0:
        parser.error("--prompt must not be empty, --steps at least 1, --temperature at least 0")
    experts = read_config(args.checkpoint).experts
    if args.ranks < 1 or experts % args.ranks:
        parser.error(f"--ranks must divide the model's {experts} experts; got {args.ranks}")
    return args


def generate(args: argparse.Namespace, env: RankEnv, prompts: dict[int, bytes]) -> Iterator[np.ndarray]:
    """Yields the next byte of each of this rank's prompts, `args.steps` times: [rows], first those of `prompts`.

    `prompts` are by their number in the whole job. All ranks run the same programs, so all have as many rows.
    """
    config = read_config(args.checkpoint)
    rows, width = -(-len(args.prompt) // env.num_ranks), max(len(text.encode()) for text in args.prompt)
    layout = Layout(env.num_ranks, rows * width)
    nx.initialize(layout.ep_config(config))
    graph, params = nnx.split(load_checkpoint(args.checkpoint, config, layout, env.rank))

    @jax.jit(donate_argnums=1)
    def advance(
        params: nnx.State, cache: list[Cache], tokens: jax.Array, start: jax.Array, lengths: jax.Array, seeds: jax.Array
    ) -> tuple[jax.Array, list[Cache]]:
        """Reads tokens [rows, S], of which lengths [rows] are real, at positions from start [rows] on."""
        offsets = jnp.arange(tokens.shape[1])
        live = offsets < lengths[:, None]
        out = nnx.merge(graph, params)(tokens, start[:, None] + offsets, cache, live)
        logits = out.logits[jnp.arange(rows), lengths - 1]
        if args.temperature == 0:
            return logits.argmax(-1), out.cache
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
            seeds, start + lengths
        )
        return jax.vmap(jax.random.categorical)(keys, logits / args.temperature), out.cache

    tokens, lengths, seeds = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for row, (number, text) in enumerate(prompts.items()):
        tokens[row, : len(text)] = list(text)
        lengths[row], seeds[row] = len(text), args.seed + number
    cache = empty_cache(config, rows, width + args.steps)
    last, cache = advance(params, cache, tokens, np.zeros_like(lengths), lengths, seeds)
    yield np.asarray(last)
    one = np.minimum(lengths, 1)
    for step in range(args.steps - 1):
        last, cache = advance(params, cache, last[:, None], lengths + step, one, seeds)
        yield np.asarray(last)


def main() -> None:
    args = parse_args()
    env = rank_env()
    if env is None:
        threads = max(1, len(os.sched_getaffinity(0)) // args.ranks)
        sys.exit(run(sys.argv, args.ranks, env={"NPROC": str(threads)}))

    texts = {i: args.prompt[i].encode() for i in range(env.rank, len(args.prompt), env.num_ranks)}
    printed, times = 0, []
    quiet = env.rank != 0
    for new in tqdm(
        generate(args, env, dict(texts)), "generate", args.steps, mininterval=2, unit="byte", disable=quiet
    ):
        texts = {i: text + bytes([byte]) for (i, text), byte in zip(texts.items(), new, strict=False)}
        times.append(time.perf_counter())
        if env.rank == 0:  # prompt 0 is its; in whole lines, as the launcher prints them
            *lines, _ = texts[0][printed:].split(b"\n")
            for line in lines:
                print(line.decode("utf-8", "replace"), flush=True)
                printed += len(line) + 1
    nx.shutdown()

    # The ranks share no memory and no jax.distributed: they meet in the launcher's store.
    with connect(env.store) as store:
        decoded = {i: text.decode("utf-8", "replace") for i, text in texts.items()}
        store.put(f"texts/{env.rank}", json.dumps(decoded).encode())
        if env.rank != 0:
            return
        found = store.wait([f"texts/{rank}" for rank in range(env.num_ranks)], timeout_s=60.0)
    whole = {int(i): text for value in found.values() for i, text in json.loads(value).items()}
    print(texts[0][printed:].decode("utf-8", "replace"))
    for i in range(1, len(whole)):
        print(f"--- prompt {i}\n{whole[i]}")
    compiled = min(2, len(times) - 1)  # the first bytes of prefill and of decode wait for their compilation
    rate = (len(times) - 1 - compiled) * len(whole) / max(times[-1] - times[compiled], 1e-9)
    print(f"{rate:,.0f} bytes/s on {env.num_ranks} ranks")
    result = {
        "completions": [{"prompt": text, "text": whole[i]} for i, text in enumerate(args.prompt)],
        "tokens_per_s": rate,
        "ranks": env.num_ranks,
        "steps": args.steps,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
