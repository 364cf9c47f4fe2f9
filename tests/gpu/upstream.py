"""Rank 0 of a group of two that is upstream's own nixl_ep.Buffer, with torch and without this package: upstream.py DIR.

It meets rank 1 in torch's own store, and shows the test what it got by files in DIR.
"""

import pickle
import sys
import time
from pathlib import Path


def deposit(folder, name, value):
    """Others see the whole file, or none."""
    (folder / f"{name}.part").write_bytes(pickle.dumps(value))
    (folder / f"{name}.part").rename(folder / name)


def collect(folder, name, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not (folder / name).exists():
        assert time.monotonic() < deadline, f"{name} did not come within {timeout_s} s"
        time.sleep(0.005)
    return pickle.loads((folder / name).read_bytes())


def main(folder):
    import numpy as np
    import torch
    from nixl_ep_cu13 import Buffer, topk_idx_t

    experts, tokens, hidden, repeats, x, ids, weights = collect(folder, "input 0")
    torch.cuda.set_device(0)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    deposit(folder, "port", store.port)
    buffer = Buffer(rank=0, explicitly_destroy=True, tcp_store_group=store, timeout_ms=20_000)
    num_bytes = Buffer.get_rdma_size_hint(tokens, hidden, 2, 2 * experts)
    buffer.update_memory_buffers(num_ranks=2, num_experts_per_rank=experts, num_rdma_bytes=num_bytes)
    buffer.connect_ranks([0, 1])
    x = torch.tensor(x, device="cuda").bfloat16()
    ids = torch.tensor(ids, device="cuda").to(topk_idx_t)
    weights = torch.tensor(weights, device="cuda")
    deposit(folder, "ready 0", True)
    collect(folder, "ready 1")
    results = []
    for _ in range(repeats):
        rows, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, tokens, 2 * experts, use_fp8=False)
        y, _, _ = buffer.low_latency_combine(2 * rows, ids, weights, handle)
        torch.cuda.synchronize()
        ranges = handle[1].cpu().numpy().view(np.int32).reshape(experts, 2, 2)
        results.append([v.float().cpu().numpy() for v in (rows, y)] + [v.cpu().numpy() for v in (count, handle[0])])
        results[-1].append(ranges)
    deposit(folder, "result 0", results)
    collect(folder, "result 1")
    buffer.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
