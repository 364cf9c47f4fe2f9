"""Our operations phase by phase, one rank at a time on one GPU, as nixl_ep_phases.py measures upstream.

    python phases.py RANKS TOKENS HIDDEN EXPERTS_PER_RANK TOP_K ITERATIONS FP8(0|1) [CAPACITY_FACTOR]

No kernel ever waits for a peer: rank 0 runs its phase while the others wait on the host, then rank 1, and so on. CUDA
events around each phase are recorded by the jitted program itself, after 512 MB were copied to evict the L2 cache.
Rows of a dispatch: CAPACITY_FACTOR * TOKENS * TOP_K (default 1.25; 0: the worst case, which never drops).
It says nothing about NVLink or a NIC.
"""

import json
import multiprocessing
import os
import statistics
import sys

from jax_nixlep import launch

WARM_UP = 3
EVICT_BYTES = 1 << 29


def run_rank(rank, ranks, url, barrier, args, results):
    os.environ |= launch.gpu_env(rank, ranks, int(os.environ.get("JAX_NIXLEP_TEST_GPUS") or 1))
    os.environ |= {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=", "UCX_LOG_LEVEL": "error"}
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jax_nixlep as nx
    from jax_nixlep import _cuda, _ffi
    from jax_nixlep.split import combine_finish_ordered

    tokens, hidden, experts, top_k, iterations, fp8, factor = args
    config = nx.EpConfig(
        max_ranks=ranks, experts_per_rank=experts, max_tokens_per_rank=tokens, hidden=hidden, top_k=top_k,
        dtype=jnp.bfloat16, wire="fp8_e4m3" if fp8 else "bf16",
        recv_capacity=-(-int(factor * tokens * top_k) // 128) * 128 if factor else None,
    )  # fmt: skip
    nx.initialize(config, rank=rank, members=range(ranks), store=url, timeout_s=600)
    rng = np.random.default_rng(rank)
    x = jnp.asarray(rng.standard_normal((tokens, hidden)), jnp.bfloat16)
    ids = np.stack([rng.permutation(config.num_slots)[:top_k] for _ in range(tokens)]).astype(np.int32)
    weights = jnp.asarray(rng.random((tokens, top_k)), jnp.float32)
    ids = jnp.asarray(ids)
    flush = jnp.zeros((EVICT_BYTES,), jnp.uint8)

    def timed(phase):
        @jax.jit
        def program(flush, *operands):
            flush = flush + jnp.uint8(1)  # evicts the L2 cache and hides the launch latency
            begin = _ffi.mark(0, flush[0])
            out, order = phase(begin, *operands)
            return flush, out, _ffi.mark(1, order)

        return program

    def dispatch_send(begin, x, ids, weights):
        pending = nx.dispatch_start(x, ids, weights, config=config, dequantize=not fp8, after=begin)
        return pending, pending.order

    def dispatch_receive(begin, pending):
        received = nx.dispatch_finish(pending, after=begin)
        return received, received.status.order

    def combine_send(begin, rows, handle):
        pending = nx.combine_start(rows, handle, config=config, after=begin)
        return pending, pending.order

    def combine_receive(begin, pending):
        return combine_finish_ordered(pending, after=begin)

    phases = [timed(p) for p in (dispatch_send, dispatch_receive, combine_send, combine_receive)]

    def in_turn(program, *operands):
        nonlocal flush
        for turn in range(ranks):
            barrier.wait()
            if turn == rank:
                flush, out, end = program(flush, *operands)
                jax.block_until_ready((flush, out, end))
                elapsed = _cuda.elapsed_us(0, 1)
        barrier.wait()
        return out, elapsed

    samples, error = [], None
    other_rows = jnp.asarray(rng.standard_normal((config.num_rows, hidden)), jnp.bfloat16)
    for i in range(iterations + WARM_UP):
        pending, t0 = in_turn(phases[0], x, ids, weights)
        received, t1 = in_turn(phases[1], pending)
        rows = other_rows if fp8 else received.tokens
        pending, t2 = in_turn(phases[2], rows, received.handle)
        y, t3 = in_turn(phases[3], pending)
        if i == 0 and not fp8:
            want = np.asarray(x, np.float32) * np.asarray(weights).sum(1, keepdims=True)
            error = float(np.linalg.norm(np.asarray(y, np.float32) - want) / np.linalg.norm(want))
        if i >= WARM_UP:
            samples.append((t0, t1, t2, t3))
    dropped = int(received.status.dropped)
    health = nx.current_group().health()
    medians = [round(statistics.median(column), 1) for column in zip(*samples, strict=True)]
    results.put(
        (
            rank,
            {
                "us": medians,
                "sum_us": round(sum(medians), 1),
                "error": error,
                "dropped": dropped,
                "rows": config.num_rows,
                "failure": health.failure,
                "paths": [p.path for p in health.peers.values()],
                "buffer_MB": health.symmetric_bytes // 10**6,
            },
        )
    )
    barrier.wait()
    nx.shutdown()


def main():
    ranks, tokens, hidden, experts, top_k, iterations, fp8 = map(int, sys.argv[1:8])
    factor = float(sys.argv[8]) if len(sys.argv) > 8 else 1.25
    from jax_nixlep.store.tcp import StoreServer

    server = StoreServer()
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(ranks), context.Queue()
    args = (tokens, hidden, experts, top_k, iterations, bool(fp8), factor)
    processes = [context.Process(target=run_rank, args=(r, ranks, server.url, barrier, args, results), daemon=True)
                 for r in range(ranks)]  # fmt: skip
    for process in processes:
        process.start()
    print("ours: ranks tokens hidden experts/rank top_k iterations fp8 =", *sys.argv[1:8], "capacity factor", factor)
    rows = sorted((results.get(timeout=120) for _ in processes), key=lambda item: item[0])
    for rank, row in rows:
        print(rank, json.dumps(row), flush=True)
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
    server.close()


if __name__ == "__main__":
    main()
