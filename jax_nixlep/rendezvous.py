"""How members find each other through a store, agree that all are current, and connect their endpoints."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jax_nixlep import _ffi, _nixl
from jax_nixlep.agreement import Described, check_alike
from jax_nixlep.store import Store, StoreError

_POLL_S = 0.01
_CLOSE_TIMEOUT_S = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Seat:
    """One local device's place in a group."""

    device: jax.Device
    team: str  # which group: one for each coordinate of the mesh axes beside the experts'
    rank: int
    endpoint: _ffi.Endpoint


class Rendezvous:
    """One meeting of all members. Values are JSON; what a peer says is checked before it is used.

    A store may hold what an earlier job left. So each member publishes, beside its own nonce, the nonces it sees: who
    lists mine is alive, and when all list the same the meeting is complete. What is exchanged later lies under a key
    made of those nonces.
    """

    def __init__(
        self,
        store: Store,
        seats: Sequence[Seat],
        about: Described,
        members: Sequence[int],
        timeout_s: float,
    ):
        self._store = store
        self._seats = seats
        self._about = about | {"members": list(members)}
        self._members = tuple(members)
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._hellos: dict[Seat, dict[int, dict[str, Any]]] = {}
        self._session: dict[Seat, str] = {}
        self._steps: set[str] = set()  # for which something was published
        self._barrier = ""  # the last one that was passed

    def connect(self) -> None:
        """Connects every seat's endpoint to all members.

        Raises:
          ValueError: members differ in a field; names it and both values.
          TimeoutError: names the ranks that did not arrive.
          RuntimeError: a member failed; says which and why.
        """
        self._arrive()
        with self.telling():
            self._connect_all()

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """What fails in here is told to the members that wait in a step of `connect` or in `barrier`."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(StoreError):  # the error itself says more
                for seat in self._seats:
                    self._put(seat, "failed", f"{type(error).__name__}: {error}")
            raise

    def barrier(self, name: str, *, op: str = "initialize") -> None:
        """Returns when every member has called it; `op` is what the user called.

        Raises:
          TimeoutError: names the ranks that did not, within `timeout_s` of now.
          RuntimeError: a member failed in `telling`; says which and why.
        """
        self._deadline = time.monotonic() + self._timeout_s
        try:
            # Who passes may leave at once: others still read what it said, until nobody waits any more.
            self._exchange(name, dict.fromkeys(self._seats, True), op, ttl_s=2 * self._timeout_s)
        except BaseException:
            self._withdraw(name)  # nobody may pass it later, when this process is no longer there
            raise
        if self._barrier:  # all have passed it, since they have come to this one
            self._withdraw(self._barrier)
        self._barrier = name

    def say(self, name: str) -> None:
        """Counts as a call of `barrier` for those that wait in it, without waiting."""
        for seat in self._seats:
            self._put(seat, name, True, 2 * self._timeout_s)

    def nonces(self, seat: Seat) -> dict[int, int]:
        """Of the members' regions, by rank."""
        return {rank: int(hello["address"]["nonce"]) for rank, hello in self._hellos[seat].items()}

    def close(self) -> None:
        """Removes what this process wrote, but for why it failed, if it did: others still have to read that.

        Raises:
          StoreError: the store is away. A member that served it may have left first, so that is found out soon.
        """
        for seat in self._session:
            for what in ("hello", *(f"{self._session[seat]}/{step}" for step in self._steps)):
                self._store.delete(f"{self._prefix(seat)}{what}/{seat.rank}/", timeout_s=_CLOSE_TIMEOUT_S)

    # --- Steps ---

    def _arrive(self) -> None:
        published: dict[Seat, dict[str, Any]] = {}

        def not_met(seat: Seat) -> list[int]:
            address = seat.endpoint.address()
            hellos = self._scan(seat, "hello")
            seen = {str(r): hellos[r]["address"]["nonce"] for r in hellos} | {str(seat.rank): address["nonce"]}
            hello = {"about": self._about, "address": address, "seen": seen}
            if published.get(seat) != hello:
                self._store.put(f"{self._prefix(seat)}hello/{seat.rank}/", json.dumps(hello).encode())
                published[seat] = hello
            alive = {r: h for r, h in hellos.items() if h["seen"].get(str(seat.rank)) == address["nonce"]}
            for peer, theirs in alive.items():
                check_alike(self._about, seat.rank, theirs.get("about", {}), f"on rank {peer}")
            keys = [str(r) for r in self._members]
            nonces = [seen.get(key) for key in keys]
            absent = [r for r in self._members if r not in alive or [alive[r]["seen"].get(k) for k in keys] != nonces]
            if not absent:
                self._hellos[seat] = {r: alive[r] for r in self._members}
                self._session[seat] = hashlib.sha256(json.dumps(nonces).encode()).hexdigest()[:16]
            return absent

        self._until_none_missing(not_met, "arrive")

    def _connect_all(self) -> None:
        share = _ffi.shared_memory_allowed()
        mapped = {
            seat: [
                peer
                for peer, hello in self._hellos[seat].items()
                if share and peer != seat.rank and seat.endpoint.map_peer(peer, *_mapping(hello["address"]))
            ]
            for seat in self._seats
        }
        views = self._exchange("mapped", mapped)
        # Shared memory needs both sides: the one that writes rings a bell in the other's region.
        far = {
            seat: [
                peer
                for peer in self._members
                if peer != seat.rank and not (peer in mapped[seat] and seat.rank in views[seat][peer])
            ]
            for seat in self._seats
        }
        metadata = dict.fromkeys(self._seats, "")
        for seat in self._seats:
            if far[seat]:
                name = f"jax_nixlep-{self._session[seat]}-{seat.rank}"
                blob = seat.endpoint.open_nixl(str(_nixl.find_library()), name)
                metadata[seat] = base64.b64encode(blob).decode()
        agents = self._exchange("nixl", metadata)
        for seat in self._seats:
            for peer in far[seat]:
                address = self._hellos[seat][peer]["address"]
                blob = base64.b64decode(agents[seat][peer])
                seat.endpoint.connect_nixl(peer, blob, int(address["base"]), int(address["nonce"]))

    # --- Store access ---

    def _exchange(
        self, step: str, values: dict[Seat, Any], op: str = "initialize", ttl_s: float | None = None
    ) -> dict[Seat, dict[int, Any]]:
        """Publishes each seat's value for `step`, for so long, and returns those of all members."""
        if ttl_s is None:
            self._steps.add(step)
        for seat, value in values.items():
            self._put(seat, step, value, ttl_s)
        found: dict[Seat, dict[int, Any]] = {}

        def missing(seat: Seat) -> list[int]:
            for peer, why in self._scan(seat, f"{self._session[seat]}/failed").items():
                raise RuntimeError(f"{op}: rank {peer} failed: {why}")
            found[seat] = self._scan(seat, f"{self._session[seat]}/{step}")
            return [r for r in self._members if r not in found[seat]]

        self._until_none_missing(missing, f"reach step {step!r}", op)
        return found

    def _until_none_missing(self, missing: Callable[[Seat], list[int]], what: str, op: str = "initialize") -> None:
        while True:
            absent = {seat: missing(seat) for seat in self._seats}
            if not any(absent.values()):
                return
            if time.monotonic() > self._deadline:
                teams = {seat.team: ranks for seat, ranks in absent.items() if ranks}
                names = "; ".join(f"ranks {ranks}{team and f' of group {team}'}" for team, ranks in teams.items())
                raise TimeoutError(
                    f"{op}: {names} did not {what} within {self._timeout_s:g} s; "
                    "check that they run and use the same store, or raise init_timeout_s"
                )
            time.sleep(_POLL_S)

    def _put(self, seat: Seat, step: str, value: Any, ttl_s: float | None = None) -> None:
        key = f"{self._prefix(seat)}{self._session[seat]}/{step}/{seat.rank}/"
        self._store.put(key, json.dumps(value).encode(), ttl_s=ttl_s)

    def _scan(self, seat: Seat, step: str) -> dict[int, Any]:
        prefix = f"{self._prefix(seat)}{step}/"
        return {int(key[len(prefix) : -1]): json.loads(value) for key, value in self._store.scan(prefix).items()}

    def _withdraw(self, step: str) -> None:
        with contextlib.suppress(StoreError):
            for seat in self._seats:
                key = f"{self._prefix(seat)}{self._session[seat]}/{step}/{seat.rank}/"
                self._store.delete(key, timeout_s=_CLOSE_TIMEOUT_S)

    @staticmethod
    def _prefix(seat: Seat) -> str:
        return f"jax_nixlep/{seat.team}/"


def _mapping(address: dict[str, Any]) -> tuple[int, int, int]:
    return int(address["pid"]), int(address["fd"]), int(address["nonce"])
