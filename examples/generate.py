"""Continues prompts with a mixture-of-experts model whose experts are spread over processes of this machine.

    python examples/generate.py --model FOLDER --prompt "The capital of France is" "def main("   # Hugging Face
    python examples/generate.py --checkpoint out --prompt "def " "class "                        # of train_lm.py

starts 4 independent JAX processes. Each loads its own part of the experts and takes its own part of the prompts; in
every layer they exchange tokens over jax_nixlep. A process without a prompt takes part with zero tokens. The text that
follows the first prompt is printed as it comes. They run on CPUs; with --gpus on as many GPUs of this machine, which
they share.
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
import moe_decoder
import numpy as np
from serving.byte_model import ByteModel
from serving.detokenizer import Detokenizer
from serving.model import Model, find_checkpoint
from serving.program import Batch, compile_steps
from tqdm import tqdm

import jax_nixlep as nx
from jax_nixlep.launch import RankEnv, rank_env, run
from jax_nixlep.placement import identity_table, table_placement
from jax_nixlep.store import connect


def parse_args() -> tuple[argparse.Namespace, Model, list[list[int]]]:
    """The options, the model (without weights), and the prompts as tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="folder of Hugging Face: config.json, safetensors, tokenizer.json")
    which.add_argument("--checkpoint", type=Path, default=Path("out"), help="file, or --out of train_lm.py")
    prompts = ["def ", "class ", "import ", "    return "]
    parser.add_argument("--prompt", nargs="+", default=prompts, metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="prompts are messages to the model, which answers")
    parser.add_argument("--ranks", type=int, default=4, help="processes over which the experts are spread")
    parser.add_argument("--gpus", type=int, metavar="COUNT", help="of this machine to run on; default: CPUs")
    parser.add_argument("--steps", type=int, default=200, help="tokens to add to each prompt, at most")
    parser.add_argument("--length", type=int, help="of the cache; default: what the prompts and --steps need")
    parser.add_argument("--dtype", help="of the parameters of --model; default: the checkpoint's")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest of this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", default="native", choices=("native", "nixl_ep"), help="docs/nixl_ep.md")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    if "" in args.prompt or args.steps < 1 or args.ranks < 1 or args.temperature < 0 or not 0 < args.top_p <= 1:
        parser.error(
            "--prompt must not be empty, --steps and --ranks at least 1, --temperature at least 0, --top-p in (0, 1]"
        )
    if args.gpus is not None and args.gpus < 1:
        parser.error(f"--gpus must be at least 1; got {args.gpus}; leave it out to run on CPUs")
    if args.chat and not args.model:
        parser.error("--chat must come with --model; got none; a model of train_lm.py knows no conversations")
    try:
        env = rank_env()
        quiet = env is None or env.rank != 0
        model = (
            moe_decoder.load(args.model, dtype=args.dtype, progress=not quiet)
            if args.model
            else ByteModel(find_checkpoint(args.checkpoint))
        )
        if args.chat:
            tokens = [model.apply_chat([{"role": "user", "content": text}]) for text in args.prompt]
        else:
            tokens = [model.encode(text) for text in args.prompt]
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if [] in tokens:
        parser.error(f"--prompt must be at least a token; got {args.prompt[tokens.index([])]!r}; write more")
    needed = max(map(len, tokens)) + args.steps
    args.length = needed if args.length is None else args.length
    if args.length < needed:
        parser.error(
            f"--length must be at least {needed}, the longest prompt and --steps; got {args.length}; raise it, or "
            "lower --steps"
        )
    if model.max_length and needed > model.max_length:
        parser.error(
            f"--steps and the longest prompt must be at most {model.max_length} tokens, what the model was made for; "
            f"got {needed}; lower --steps, or cut the prompt"
        )
    return args, model, tokens


def generate(
    args: argparse.Namespace, model: Model, env: RankEnv, prompts: list[list[int]]
) -> Iterator[tuple[dict[int, int], float]]:
    """Yields, `args.steps` times, the next token of each of this rank's prompts, by number, and the seconds taken.

    All ranks run the same programs, so all have as many rows. A row whose text has ended takes no part any more.
    """
    mine = range(env.rank, len(prompts), env.num_ranks)
    rows, width = -(-len(prompts) // env.num_ranks), max(map(len, prompts))
    per_rank = -(-model.num_experts // env.num_ranks)
    own = args.kernels == "native"
    config = model.ep_config(env.num_ranks, per_rank, rows * width if own else -(-rows * width // 4) * 4)  # in fours
    table = identity_table(model.num_experts, range(env.num_ranks), per_rank, env.num_ranks)
    experts = model.load_experts(table[env.rank * per_rank : (env.rank + 1) * per_rank].tolist())
    weights = [
        jax.tree.map(lambda w: jax.device_put(np.asarray(w), may_alias=True), tree)
        for tree in (model.load_dense(), experts)
    ]
    # Programs are compiled for the kernels that are in use. Others than our own are so from here on: ranks that compile
    # for longer than others are waited for by the first operation.
    programs = compile_steps(model, config, rows, (width, 1), args.length) if own else None
    nx.initialize(config, kernels=args.kernels, timeout_s=60.0 if own else 600.0)
    programs = programs or compile_steps(model, config, rows, (width, 1), args.length)
    placement = table_placement(table, model.num_experts, env.num_ranks)

    batch = Batch.empty(rows, width)
    for row, number in enumerate(mine):
        batch.tokens[row, : len(prompts[number])] = prompts[number]
        batch.lengths[row], batch.seeds[row] = len(prompts[number]), args.seed + number
    batch.temperature[:], batch.top_p[:] = args.temperature, args.top_p
    cache = model.empty_cache(rows, args.length)
    for _ in range(args.steps):
        began = time.perf_counter()
        chosen, cache = programs[batch.tokens.shape[1]](*weights, placement, cache, batch)
        chosen = np.asarray(chosen)
        live = batch.lengths > 0
        yield {mine[row]: int(chosen[row]) for row in np.flatnonzero(live)}, time.perf_counter() - began
        live &= ~np.isin(chosen, list(model.eos_ids))
        batch = batch._replace(tokens=chosen[:, None], start=batch.start + batch.lengths, lengths=live.astype(np.int32))


def main() -> None:
    args, model, prompts = parse_args()
    env = rank_env()
    if env is None:
        threads = max(1, len(os.sched_getaffinity(0)) // args.ranks)
        sys.exit(run(sys.argv, args.ranks, gpus=args.gpus, env={"NPROC": str(threads)}))

    added: dict[int, list[int]] = {number: [] for number in range(env.rank, len(prompts), env.num_ranks)}
    stream, line, times = Detokenizer(model), "" if args.chat else args.prompt[0], []
    steps = generate(args, model, env, prompts)
    for new, seconds in tqdm(steps, "generate", args.steps, mininterval=2, unit="token", disable=env.rank != 0):
        times.append(seconds)
        for number, token in new.items():
            if token not in model.eos_ids:
                added[number].append(token)
        if 0 in new and new[0] not in model.eos_ids:  # printed in whole lines, as the launcher does
            *lines, line = (line + stream.push(new[0])).split("\n")
            for text in lines:
                print(text, flush=True)
    nx.shutdown()

    # The ranks share no memory and no jax.distributed: they meet in the launcher's store.
    with connect(env.store) as store:
        store.put(f"texts/{env.rank}", json.dumps(added).encode())
        if env.rank != 0:
            return
        found = store.wait([f"texts/{rank}" for rank in range(env.num_ranks)], timeout_s=60.0)
    print(line + stream.finish())
    whole = {int(i): ids for value in found.values() for i, ids in json.loads(value).items()}
    texts = [args.prompt[i] * (not args.chat) + model.decode(whole[i]) for i in range(len(prompts))]
    for i, text in enumerate(texts[1:], 1):
        print(f"--- prompt {i}\n{text}")
    result = {
        "completions": [{"prompt": p, "text": text} for p, text in zip(args.prompt, texts, strict=True)],
        "prefill_tokens_per_s": sum(map(len, prompts)) / times[0],
        "tokens_per_s": sum(len(ids) - 1 for ids in whole.values()) / max(sum(times[1:]), 1e-9),
        "ranks": env.num_ranks,
        "device": jax.devices()[0].device_kind,
        "steps": args.steps,
    }
    print("prefill {prefill_tokens_per_s:,.0f} tokens/s, decode {tokens_per_s:,.0f} on {ranks} ranks".format(**result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
