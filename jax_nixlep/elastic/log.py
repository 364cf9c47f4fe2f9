"""The log of an elastic group: entries in a store, in one order for everybody."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from jax_nixlep.agreement import Described
from jax_nixlep.elastic.protocol import State
from jax_nixlep.store import Store, StoreError

PREFIX = "jax_nixlep/elastic/"
_PAGE = 64  # entries that are deleted together
_SNAPSHOT = PREFIX + "snapshot"
_KNOWN = PREFIX + "known/"
_STRAY_S = 0.02
_REBIRTH_S = 5.0  # how long the members of a lost log have to say what they knew of it

Event = dict[str, Any]


class Log:
    """Reads the log into `state`, and appends to it. Thread-safe.

    A snapshot replaces entries that nobody needs any more; a rank that was away so long starts from it again.

    A store that was started again is empty. Then the members say what they knew, and the newest of that begins a new
    *generation* of the log. An older member may have been ahead only if it is gone or does not answer in time; it then
    finds itself at an epoch that never was, and is out.

    Attributes:
      newcomer: this rank is no member yet, and follows whichever job has the store.
      about: what all members have alike, as who started the log has it.
    """

    newcomer = False

    def __init__(self, store: Store, rank: int, notify: Callable[[], None] = lambda: None):
        """`notify` is called when `state` may have changed."""
        self._store, self._rank, self._notify = store, rank, notify
        self._lock = threading.Lock()
        self._next = 0
        self._job = ""  # a store may hold the log of an earlier job
        self._generation = 0
        self.about: Described = {}
        self._state: State | None = None
        self._missed_since = 0.0

    @property
    def state(self) -> State:
        assert self._state is not None
        return self._state

    def create(self, state: State, about: Described) -> None:
        """Starts the log anew. One rank, before the others open it."""
        self._store.delete(PREFIX)
        self._next, self._state, self._job, self.about = 0, state, secrets.token_hex(8), about
        self._store.put(_SNAPSHOT, self._snapshot())

    def open(self, timeout_s: float) -> None:
        """Waits for the log to exist and reads it. Again by a rank that was out: `state` never goes back."""
        snapshot = json.loads(self._store.wait([_SNAPSHOT], timeout_s)[_SNAPSHOT])
        with self._lock:
            if self._state is None or not self._is_mine(snapshot) or snapshot["index"] > self._next:
                self._load(snapshot)
        self.pull()

    def wait(self, known: State, timeout_s: float) -> None:
        """Returns when `state` is no longer `known`, or may soon be; at most `timeout_s` later.

        Raises:
          StoreError: the store is away.
        """
        key = self._key(self._next)
        if self.state is not known:
            return  # another thread of this rank appended
        try:
            self._store.wait([key], timeout_s)
            with self._lock:
                self._read()
            if self.state is known:
                time.sleep(min(timeout_s, _STRAY_S))  # what is there is no entry of this log
        except TimeoutError:
            with self._lock:
                self._reload_if_lost()

    def pull(self) -> None:
        """Brings `state` up to date."""
        with self._lock:
            self._read()
        self._notify()

    def append(self, make: Callable[[State], Event | None]) -> State:
        """Appends what `make` says in view of the newest state, unless it says None. Returns the state after it.

        Raises:
          StoreError: the store is away, or was lost; the entry may have been written or not.
        """
        token = secrets.token_hex(8)
        with self._lock:
            state = self._append(make, token)
        self._notify()
        return state

    def _append(self, make: Callable[[State], Event | None], token: str) -> State:
        while True:
            if self._read(token):
                return self.state
            made = make(self.state)
            if made is None:
                return self.state
            event = {**made, "token": token}
            try:
                written = self._store.compare_and_swap(self._key(self._next), None, json.dumps(event).encode())
            except StoreError:
                if self._store.get(self._key(self._next)) is None:
                    raise
                continue
            # A rank that was away for long would write among entries that were read by all and deleted.
            behind = self._reload_if_behind()
            if written and not behind:
                self._take(event)
                return self.state

    def trim(self) -> None:
        """Replaces what was read by a snapshot; one rank, when nothing runs."""
        with self._lock:
            old = self._stored()
            if self.state.change or self.state.recovery or old is None or not self._is_mine(old):
                return
            self._store.put(_SNAPSHOT, self._snapshot())
            self._store.delete(_KNOWN)
            for page in range(max(0, old["index"] // _PAGE - 1), self._next // _PAGE - 1):
                self._store.delete(f"{self._pages()}{page:08d}/")

    def _read(self, token: str = "") -> bool:
        """Reads to the end; whether it met the entry with `token`, written by an attempt of unknown outcome."""
        entries: list[Event] = []
        while (entry := self._store.get(self._key(self._next + len(entries)))) is not None:
            entries.append(json.loads(entry))
        if entries:
            snapshot = self._stored()
            if snapshot is None or not self._is_mine(snapshot):  # written to a store that had been started again
                self._reload_if_lost()
                return False
        for event in entries:
            self._take(event)
        return bool(token) and any(event["token"] == token for event in entries)

    def _take(self, event: Event) -> None:
        self._state = self.state.apply(event)
        self._next += 1

    # --- Snapshots. ---

    def _snapshot(self) -> bytes:
        job = {"job": self._job, "generation": self._generation, "about": self.about}
        return json.dumps({"index": self._next, "state": self.state.to_json()} | job).encode()

    def _stored(self) -> dict[str, Any] | None:
        value = self._store.get(_SNAPSHOT)
        return None if value is None else json.loads(value)

    def _load(self, snapshot: dict[str, Any]) -> None:
        self._next, self._job = int(snapshot["index"]), snapshot["job"]
        self._generation, self.about = int(snapshot["generation"]), snapshot.get("about", {})
        self._state = State.from_json(snapshot["state"])
        self._missed_since = 0.0

    def _is_mine(self, snapshot: dict[str, Any]) -> bool:
        return (snapshot["job"], snapshot["generation"]) == (self._job, self._generation)

    def _reload_if_behind(self) -> bool:
        """Whether entries from here on are not the ones that the others read.

        Raises:
          StoreError: there is no such log any more.
        """
        snapshot = self._stored()
        if snapshot is None or (snapshot["job"] != self._job and not self.newcomer):
            raise StoreError("elastic: the store must hold the group's log; got one that was started again; wait")
        if self._is_mine(snapshot) and snapshot["index"] <= self._next:
            return False
        self._load(snapshot)
        return True

    def _reload_if_lost(self) -> None:
        snapshot = self._stored()
        if snapshot is None:
            self._say_what_was_known()
        elif snapshot["job"] != self._job:
            if self.newcomer:
                self._load(snapshot)
        elif snapshot["generation"] > self._generation or snapshot["index"] > self._next:
            self._load(snapshot)

    def _say_what_was_known(self) -> None:
        if self.newcomer:
            return
        now = time.monotonic()
        self._missed_since = self._missed_since or now
        self._store.put(f"{_KNOWN}{self._rank}", self._snapshot())
        said = {int(key[len(_KNOWN) :]): json.loads(value) for key, value in self._store.scan(_KNOWN).items()}
        said = {rank: s for rank, s in said.items() if s["job"] == self._job}
        newest = max(said.values(), key=lambda s: (s["generation"], s["index"]), default=None)
        if newest is None:
            return
        if set(newest["state"]["members"]) <= set(said) or now - self._missed_since > _REBIRTH_S:
            newest["generation"] += 1
            self._store.compare_and_swap(_SNAPSHOT, None, json.dumps(newest).encode())

    def _pages(self) -> str:
        return f"{PREFIX}log/{self._job}/{self._generation}/"

    def _key(self, index: int) -> str:
        return f"{self._pages()}{index // _PAGE:08d}/{index:08d}"
