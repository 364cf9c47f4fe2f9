"""The ranks that this one is connected to."""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jax_nixlep import _ffi, _nixl

# exchange(what, own value, ranks) publishes the value and returns those of the ranks.
Exchange = Callable[[str, Any, Collection[int]], dict[int, Any]]


class Links:
    """Connects an endpoint to ranks and drops them again. Thread-safe; one thread at a time connects or tidies."""

    def __init__(self, endpoint: _ffi.Endpoint, rank: int):
        self._endpoint, self._rank = endpoint, rank
        self._lock = threading.Lock()
        self._nonces: dict[int, int] = {}  # of the regions of the ranks

    def adopt(self, nonces: Mapping[int, int]) -> None:
        """These were connected before."""
        with self._lock:
            self._nonces = {rank: nonce for rank, nonce in nonces.items() if rank != self._rank}

    def connect(self, addresses: Mapping[int, Mapping[str, Any]], exchange: Exchange) -> None:
        """Connects to all of `addresses`, in shared memory where both sides can. Collective among them.

        One side may be connected already, from a change that did not happen, and the other not.
        """
        others = {rank: a for rank, a in addresses.items() if rank != self._rank}
        for rank, address in others.items():
            if self._nonces.get(rank) != address["nonce"]:
                self._drop(rank)
        share = _ffi.shared_memory_allowed()
        for rank, address in others.items():
            where = int(address["pid"]), int(address["fd"]), int(address["nonce"])
            if rank not in self._nonces and share and self._endpoint.map_peer(rank, *where):
                self._note(rank, address)
        mine = {str(rank): self._path(rank) for rank in others}
        theirs = exchange("paths", mine, others)
        path = {rank: {mine[str(rank)], theirs[rank].get(str(self._rank))} for rank in others}
        far = [rank for rank in others if len(path[rank]) > 1 or path[rank] == {"none"}]
        if far:
            name = f"jax_nixlep-{self._endpoint.address()['nonce']:x}-{self._rank}"
            blob = self._endpoint.open_nixl(str(_nixl.find_library()), name)
            agents = exchange("agent", base64.b64encode(blob).decode(), far)
            for rank in far:
                base, nonce = int(others[rank]["base"]), int(others[rank]["nonce"])
                self._endpoint.connect_nixl(rank, base64.b64decode(agents[rank]), base, nonce)
                self._note(rank, others[rank])
        self._endpoint.prepare(sorted(addresses))

    def tidy(self, members: Collection[int]) -> None:
        """Between two changes: gives back what was needed to reach others than the members."""
        with contextlib.suppress(_ffi.EpError, _ffi.NixlError):  # all serve; a change that needs it will say so
            self._endpoint.prepare(sorted(members))

    def alive(self, rank: int) -> bool:
        """False if the connected rank is known to be dead; that shows on one machine only."""
        return self._endpoint.peer_alive(rank)

    def shows_death(self, rank: int) -> bool:
        return self._endpoint.shows_death(rank)

    def keep(self, ranks: Collection[int]) -> None:
        """Drops all others."""
        for rank in [rank for rank in list(self._nonces) if rank not in ranks]:
            self._drop(rank)

    def _path(self, rank: int) -> str:
        return self._endpoint.health(rank)["path"]

    def _note(self, rank: int, address: Mapping[str, Any]) -> None:
        with self._lock:
            self._nonces[rank] = int(address["nonce"])

    def _drop(self, rank: int) -> None:
        with self._lock:
            if self._nonces.pop(rank, None) is None:
                return
        self._endpoint.drop_peer(rank)
