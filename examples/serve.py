"""An HTTP server for a mixture-of-experts model whose number of ranks changes while it serves.

    python examples/serve.py --checkpoint out --ranks 2 --max-ranks 4

speaks OpenAI's /v1/completions and /v1/chat/completions, and vLLM's /scale_elastic_ep. See docs/serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import signal
from pathlib import Path

import uvicorn
from serving.api import create_app
from serving.model import find_checkpoint, open_model
from serving.router import Options, Router

TOKEN_VARIABLE = "SERVE_CONTROL_TOKEN"
_KEEP_ALIVE_S = 60  # of idle connections: clients send on one that they believe to be open
_STOP_S = 10  # for requests that are still running when the server is told to stop


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path, help="file, or --out, of train_lm.py")
    which.add_argument("--model", type=Path, help="folder of Hugging Face: config.json, safetensors, tokenizer")
    parser.add_argument("--name", help="of the model, for clients; default: that of the folder, or file without ending")
    parser.add_argument("--ranks", type=int, default=2, help="at first")
    parser.add_argument("--max-ranks", type=int, default=4, help="that there can ever be")
    parser.add_argument(
        "--experts-per-rank", type=int, help="that a rank has room for; default: as many as --ranks less one need"
    )
    parser.add_argument("--rows", type=int, default=8, help="requests that a rank works on at a time")
    parser.add_argument("--chunk", type=int, default=16, help="tokens of a prompt that are read in a step")
    parser.add_argument("--context", type=int, default=512, help="tokens of prompt and answer, at most")
    parser.add_argument("--max-queue", type=int, default=256, help="requests that may wait; more get status 429")
    parser.add_argument("--detect", type=float, default=1.0, metavar="SECONDS", help="wait of a rank for another")
    parser.add_argument(
        "--start-timeout", type=float, default=120.0, metavar="SECONDS", help="for a rank to start and read its weights"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; there is no encryption")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    try:
        if args.checkpoint:
            args.source = {"checkpoint": str(find_checkpoint(args.checkpoint))}
        else:
            args.source = {"folder": str(args.model)}
        model = open_model(args.source)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    args.name = args.name or (args.model.resolve().name if args.model else Path(args.source["checkpoint"]).stem)
    args.experts_per_rank = args.experts_per_rank or -(-model.num_experts // max(1, args.ranks - 1))
    least = min(args.ranks, args.rows, args.context, args.max_queue, args.start_timeout)
    if args.chunk < 2 or not least >= 1 or args.ranks > args.max_ranks:
        parser.error("--chunk must be at least 2, the other numbers 1, --ranks at most --max-ranks")
    if model.max_length and args.context > model.max_length:
        parser.error(f"--context must be at most {model.max_length}, what the model was made for; got {args.context}")
    return args


async def serve(args: argparse.Namespace) -> None:
    options = Options(
        args.source,
        max_ranks=args.max_ranks,
        experts_per_rank=args.experts_per_rank,
        rows=args.rows,
        chunk=args.chunk,
        context=args.context,
        detection_timeout_s=args.detect,
        max_queue=args.max_queue,
        start_timeout_s=args.start_timeout,
    )
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        token = secrets.token_urlsafe(24)
        print(f"control token (set {TOKEN_VARIABLE} to choose your own): {token}", flush=True)
    async with Router(options) as router:
        await router.start(args.ranks)
        print(f"serving {args.name} on http://{args.host}:{args.port} with {args.ranks} ranks", flush=True)
        app = create_app(router, args.name, token)
        waits = {"timeout_keep_alive": _KEEP_ALIVE_S, "timeout_graceful_shutdown": _STOP_S}
        config = uvicorn.Config(app, args.host, args.port, log_level="warning", **waits)
        await uvicorn.Server(config).serve()


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, in order
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parse_args()))


if __name__ == "__main__":
    main()
