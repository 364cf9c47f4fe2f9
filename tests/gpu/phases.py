"""Dispatch and combine phase by phase, one rank at a time on one GPU: our operations, or NVIDIA's NIXL-EP kernels.

    python phases.py {ours|nixl_ep} RANKS TOKENS HIDDEN EXPERTS_PER_RANK TOP_K ITERATIONS FP8(0|1) [CAPACITY_FACTOR]

No kernel ever waits for a peer: rank 0 runs its phase while the others wait on the host, then rank 1, and so on. CUDA
events are recorded around each phase, after 512 MB were copied to evict the L2 cache and to hide the launch. Printed
for each rank: median microseconds of [dispatch send, dispatch receive, combine send, combine receive], and the
relative error of the sum against float32 (bf16 only). It says nothing about NVLink or a NIC.
CAPACITY_FACTOR, of ours: rows of a dispatch are that * TOKENS * TOP_K (default 1.25; 0: the worst case, which never
drops). nixl_ep needs torch, and the nixl_ep build of its minor version.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import statistics
import time

WARM_UP = 3
EVICT_BYTES = 1 << 29  # several times the L2 cache


class Ours:
    """A rank in JAX; the jitted programs record the events themselves."""

    def __init__(self, rank, args, url):
        from jax_nixlep import launch

        os.environ |= launch.gpu_env(rank, args.ranks, int(os.environ.get("JAX_NIXLEP_TEST_GPUS") or 1))
        os.environ |= {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=", "UCX_LOG_LEVEL": "error"}
        import jax.numpy as jnp
        import numpy as np

        import jax_nixlep as nx
        from jax_nixlep.split import combine_finish_ordered

        factor = args.capacity_factor
        self.config = nx.EpConfig(
            max_ranks=args.ranks, experts_per_rank=args.experts, max_tokens_per_rank=args.tokens, hidden=args.hidden,
            top_k=args.top_k, dtype=jnp.bfloat16, wire="fp8_e4m3" if args.fp8 else "bf16",
            recv_capacity=-(-int(factor * args.tokens * args.top_k) // 128) * 128 if factor else None,
        )  # fmt: skip
        self.group = nx.initialize(self.config, rank=rank, members=range(args.ranks), store=url, timeout_s=600)
        rng = np.random.default_rng(rank)
        x = rng.standard_normal((args.tokens, args.hidden))
        ids = np.stack([rng.permutation(self.config.num_slots)[: args.top_k] for _ in x]).astype(np.int32)
        weights = rng.random((args.tokens, args.top_k))
        self.inputs = jnp.asarray(x, jnp.bfloat16), jnp.asarray(ids), jnp.asarray(weights, jnp.float32)
        self.want = np.asarray(self.inputs[0], np.float32) * weights.sum(1, keepdims=True)
        other_rows = rng.standard_normal((self.config.num_rows, args.hidden)) if args.fp8 else None
        self.other_rows = None if other_rows is None else jnp.asarray(other_rows, jnp.bfloat16)
        self.evicting = jnp.zeros((EVICT_BYTES,), jnp.uint8)

        def dispatch_send(begin, x, ids, weights):
            options = {"config": self.config, "dequantize": not args.fp8}
            pending = nx.dispatch_start(x, ids, weights, after=begin, **options)
            return pending, pending.order

        def dispatch_receive(begin, pending):
            received = nx.dispatch_finish(pending, after=begin)
            return received, received.status.order

        def combine_send(begin, rows, handle):
            pending = nx.combine_start(rows, handle, config=self.config, after=begin)
            return pending, pending.order

        def combine_receive(begin, pending):
            return combine_finish_ordered(pending, after=begin)

        self.phases = [self.program(p) for p in (dispatch_send, dispatch_receive, combine_send, combine_receive)]

    def program(self, phase):
        import jax
        import jax.numpy as jnp

        from jax_nixlep import _ffi

        @jax.jit
        def run(evicting, *operands):
            evicting = evicting + jnp.uint8(1)
            out, order = phase(_ffi.mark(0, evicting[0]), *operands)
            return evicting, out, _ffi.mark(1, order)

        return run

    def timed(self, phase, *operands):
        import jax

        from jax_nixlep import _cuda

        self.evicting, out, _ = jax.block_until_ready(phase(self.evicting, *operands))
        return out, _cuda.elapsed_us(0, 1)

    def steps(self, run):
        """A dispatch and its combine, in four calls of `run`; returns the sums as NumPy."""
        import numpy as np

        self.received = run(self.phases[1], run(self.phases[0], *self.inputs))
        rows = self.received.tokens if self.other_rows is None else self.other_rows
        return np.asarray(run(self.phases[3], run(self.phases[2], rows, self.received.handle)), np.float32)

    def report(self):
        health = self.group.health()
        return {
            "dropped": int(self.received.status.dropped),
            "rows": self.config.num_rows,
            "failure": health.failure,
            "paths": [p.path for p in health.peers.values()],
            "buffer_MB": health.symmetric_bytes // 10**6,
        }

    def close(self):
        import jax_nixlep as nx

        nx.shutdown()


class NixlEp:
    """A rank of upstream's Buffer, in torch."""

    def __init__(self, rank, args, url):
        os.environ["CUDA_MODULE_LOADING"] = "EAGER"  # a lazily loaded kernel would wait behind a peer's spinning one
        import torch
        from nixl_ep_cu13 import Buffer, topk_idx_t

        torch.cuda.set_device(0)
        host, port = url.split(":")
        store = torch.distributed.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        slots = args.experts * args.ranks
        self.num_bytes = Buffer.get_rdma_size_hint(args.tokens, args.hidden, args.ranks, slots)
        self.buffer = Buffer(rank=rank, explicitly_destroy=True, tcp_store_group=store, timeout_ms=10_000)
        self.buffer.update_memory_buffers(
            num_ranks=args.ranks, num_experts_per_rank=args.experts, num_rdma_bytes=self.num_bytes
        )
        self.buffer.connect_ranks(list(range(args.ranks)))
        torch.manual_seed(rank)
        x = torch.randn(args.tokens, args.hidden, dtype=torch.bfloat16, device="cuda")
        ids = torch.rand(args.tokens, slots, device="cuda").topk(args.top_k, dim=-1)[1].to(topk_idx_t)
        weights = torch.rand(args.tokens, args.top_k, device="cuda")
        self.want = (x.float() * weights.sum(1, keepdim=True)).cpu().numpy()
        shape = args.experts, args.ranks * args.tokens, args.hidden
        self.other_rows = torch.randn(shape, dtype=torch.bfloat16, device="cuda") if args.fp8 else None
        self.evicting, self.evicted = (torch.empty(EVICT_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def dispatch():
            options = {"use_fp8": args.fp8, "async_finish": False, "return_recv_hook": True}
            return self.buffer.dispatch(x, ids, args.tokens, slots, **options)

        def combine(rows, handle):
            return self.buffer.combine(rows, ids, weights, handle, return_recv_hook=True)

        self.dispatch, self.combine = dispatch, combine
        self.mask = torch.zeros(args.ranks, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()

    def timed(self, phase, *operands):
        import torch

        self.evicted.copy_(self.evicting)
        self.begin.record()
        out = phase(*operands)
        self.end.record()
        torch.cuda.synchronize()
        return out, self.begin.elapsed_time(self.end) * 1e3

    def steps(self, run):
        received, _, handle, _, receive = run(self.dispatch)
        run(receive)
        y, _, receive = run(self.combine, received if self.other_rows is None else self.other_rows, handle)
        run(receive)
        return y.float().cpu().numpy()

    def report(self):
        self.buffer.query_mask_buffer(self.mask)
        return {"mask": self.mask.tolist(), "buffer_MB": self.num_bytes // 10**6}  # masked ranks: nothing counts

    def close(self):
        self.buffer.destroy()


SIDES = {"ours": Ours, "nixl_ep": NixlEp}


def run_rank(rank, args, url, barrier, results):
    import numpy as np

    side, samples = SIDES[args.side](rank, args, url), []

    def in_turn(*call):
        for turn in range(args.ranks):
            barrier.wait()
            if turn == rank:
                out, us = side.timed(*call)
                samples[-1].append(us)
        barrier.wait()
        return out

    error = None
    for i in range(args.iterations + WARM_UP):
        samples.append([])
        y = side.steps(in_turn)
        if i == 0 and not args.fp8:
            error = float(np.linalg.norm(y - side.want) / np.linalg.norm(side.want))
    us = [round(statistics.median(column), 1) for column in zip(*samples[WARM_UP:], strict=True)]
    results.put((rank, {"us": us, "sum_us": round(sum(us), 1), "error": error} | side.report()))
    barrier.wait()
    side.close()


@contextlib.contextmanager
def store_of(side):
    """The address of a store for the ranks."""
    if side == "ours":
        from jax_nixlep.store.tcp import StoreServer

        with StoreServer() as server:
            yield server.url
        return
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield f"127.0.0.1:{store.port}"


def measure(args, url):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(args.ranks), context.Queue()
    processes = [
        context.Process(target=run_rank, args=(rank, args, url, barrier, results), daemon=True)
        for rank in range(args.ranks)
    ]
    for process in processes:
        process.start()
    case = {name: int(value) for name, value in vars(args).items() if name not in ("side", "capacity_factor")}
    print(json.dumps({"side": args.side} | case | {"capacity_factor": args.capacity_factor}))
    rows, end = {}, time.monotonic() + 90
    while len(rows) < args.ranks:
        with contextlib.suppress(queue.Empty):
            rows |= [results.get(timeout=1)]
            continue
        missing = [rank for rank in range(args.ranks) if rank not in rows]
        if any(process.exitcode for process in processes) or time.monotonic() > end:
            raise SystemExit(f"Error: phases: every rank must measure within 90 s; got nothing from {missing}")
    for rank in range(args.ranks):
        print(rank, json.dumps(rows[rank]), flush=True)
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    for name in ("ranks", "tokens", "hidden", "experts", "top_k", "iterations"):
        parser.add_argument(name, type=int)
    parser.add_argument("fp8", type=lambda text: bool(int(text)))
    parser.add_argument("capacity_factor", type=float, nargs="?", default=1.25)
    args = parser.parse_args()
    with store_of(args.side) as url:
        measure(args, url)


if __name__ == "__main__":
    main()
