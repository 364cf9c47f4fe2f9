"""Makes the endpoints of a group with NVIDIA's kernels, and tries the kernels before they are used."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nixlep import _ffi, _nixl
from jax_nixlep._ffi import EpError, NixlError
from jax_nixlep.config import EpConfig
from jax_nixlep.nixl_ep.library import RANKS_PER_HOST, check_config, find_library, read_limits
from jax_nixlep.nixl_ep.packed import combine, dispatch
from jax_nixlep.routing import PackedHandle

_DEFAULT_SMS = 132
_KEY = "NIXL_EP/{}"  # where Buffers look for the metadata of a rank


def make_endpoint(device: jax.Device, rank: int, config: EpConfig, timeout_s: float, mask_late_peers: bool) -> Any:
    """A rank's end, not connected.

    Raises:
      ValueError: the kernels cannot do `config`.
      ImportError, NixlError: there is no torch, or no library.
      RuntimeError: no GPU.
      EpError: the library is not as expected.
    """
    _ffi.check_nixl_ep_device(device)
    library = find_library()
    check_config(config, read_limits(library), getattr(device, "core_count", _DEFAULT_SMS))
    try:
        return _ffi.make_nixl_ep_endpoint(
            device,
            library=str(library),
            rank=rank,
            max_ranks=config.max_ranks,
            experts_per_rank=config.experts_per_rank,
            max_tokens=config.max_tokens_per_rank,
            top_k=config.top_k,
            hidden=config.hidden,
            num_hosts=max(1, config.max_ranks // RANKS_PER_HOST),
            timeout_s=timeout_s,
            mask_late_peers=mask_late_peers,
        )
    except EpError as error:
        raise EpError(f"{error} (nixl-cu13 {importlib.metadata.version('nixl-cu13')} is installed)") from error


def meet(endpoint: Any, rank: int, members: Sequence[int], store: Any, timeout_s: float) -> None:
    """Connects and activates as upstream's `Buffer.connect_ranks` does. Collective.

    Args:
      store: torch.distributed.TCPStore, the others' `tcp_store_group`.

    Raises:
      TimeoutError: names the ranks that did not arrive.
      EpError: a rank came and did not go on.
    """
    deadline = time.monotonic() + timeout_s
    others = [r for r in members if r != rank]
    keys = [_KEY.format(r) for r in others]
    endpoint.open_nixl(str(_nixl.find_library()), str(rank))
    store.set(_KEY.format(rank), endpoint.agent_metadata())
    try:
        while absent := [r for r, key in zip(others, keys, strict=True) if not store.check([key])]:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"initialize: ranks {absent} did not arrive within {timeout_s:g} s; check that they run and "
                    "use the same store, or raise init_timeout_s"
                )
            time.sleep(0.01)
        for peer, key in zip(others, keys, strict=True):
            endpoint.connect_upstream(peer, bytes(store.get(key)), max(1.0, deadline - time.monotonic()))
    finally:
        store.delete_key(_KEY.format(rank))
    endpoint.activate(1, list(members))


def self_test(config: EpConfig, ranks: Mapping[jax.Device, int], members: Sequence[int]) -> None:
    """Sends one token from each rank to one expert of each of its next members, and back. Collective.

    Args:
      ranks: of the local devices.

    Raises:
      NixlError: what arrived is not what was sent.
    """
    away = sorted(members)
    number = np.arange(config.hidden)

    def token(rank: int) -> np.ndarray:
        return ((number * (rank + 3)) % 64 - 31).astype(np.float32)  # exact in bfloat16; nearly so in float8

    def pair(x: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        received = dispatch(x, None, ids, None, config)
        rows = received.tokens * (jnp.arange(config.num_rows)[:, None] < received.group_sizes.sum())
        assert isinstance(received.handle, PackedHandle)
        y, _ = combine(rows, received.handle, None, config, received.status.order)
        return received.tokens[: len(away)], received.group_sizes, received.status.peers, y

    results = {}
    for device, rank in ranks.items():  # all are launched before the first is waited for
        turn = away.index(rank) if rank in away else 0
        targets = (away[turn:] + away[:turn])[: config.top_k] if rank in away else []
        ids = np.full((1, config.top_k), -1, np.int32)
        ids[0, : len(targets)] = [r * config.experts_per_rank + rank % config.experts_per_rank for r in targets]
        x = jnp.asarray(token(rank)[None], config.dtype)
        results[rank] = targets, jax.jit(pair)(*jax.device_put((x, jnp.asarray(ids)), device))
    for rank, (targets, (rows, sizes, peers, y)) in results.items():
        expected = len(targets) * token(rank)
        got = np.asarray(y, np.float32)[0]
        if not np.allclose(got, expected, rtol=0.07, atol=0.07):
            raise NixlError(
                f"initialize: the self-test of NVIDIA's NIXL-EP kernels must return {len(targets)} times the token of "
                f"rank {rank}; got {got[:4]} for {expected[:4]}, rows {np.asarray(sizes)} beginning "
                f"{np.asarray(rows, np.float32)[:, :4].tolist()}, peers {np.asarray(peers)}; install nixl 1.4.1 or "
                '1.5.1, or use kernels="native"'
            )
