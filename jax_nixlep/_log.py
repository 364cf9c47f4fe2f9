"""The log of an elastic group: entries in a store, in one order for everybody."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from typing import Any

from jax_nixlep.protocol import State
from jax_nixlep.store import Store, StoreError

PREFIX = "jax_nixlep/elastic/"
_PAGE = 64  # entries that are deleted together
_SNAPSHOT = PREFIX + "snapshot"


class Log:
    """Reads the log into `state`, and appends to it. Thread-safe.

    A snapshot replaces entries that nobody needs any more; a rank that was away so long starts from it again.

    Attributes:
      newcomer: this rank is no member yet, and follows whichever job has the store.
    """

    newcomer = False

    def __init__(self, store: Store):
        self._store = store
        self._lock = threading.Lock()
        self._next = 0
        self._job = ""  # a store may hold the log of an earlier job
        self._state: State | None = None

    @property
    def state(self) -> State:
        assert self._state is not None
        return self._state

    def create(self, state: State) -> None:
        """Starts the log anew. One rank, before the others open it."""
        self._store.delete(PREFIX)
        self._next, self._state, self._job = 0, state, secrets.token_hex(8)
        self._store.put(_SNAPSHOT, self._snapshot())

    def open(self, timeout_s: float) -> None:
        """Waits for the log to exist and reads it."""
        self._store.wait([_SNAPSHOT], timeout_s)
        with self._lock:
            self._load()
        self.pull()

    def wait(self, timeout_s: float) -> None:
        """Returns when there may be a new entry, at most `timeout_s` later.

        Raises:
          StoreError: the store is away.
        """
        try:
            self._store.wait([self._key(self._next)], timeout_s)
        except TimeoutError:
            with self._lock:
                self._reload_if_lost()

    def pull(self) -> None:
        """Brings `state` up to date."""
        with self._lock:
            while (entry := self._store.get(self._key(self._next))) is not None:
                self._take(json.loads(entry))

    def append(self, make: Callable[[State], dict[str, Any] | None]) -> State:
        """Appends what `make` says in view of the newest state, unless it says None. Returns the state after it.

        Raises:
          StoreError: the store is away; the entry may have been written or not.
        """
        token = secrets.token_hex(8)
        with self._lock:
            while True:
                while (entry := self._store.get(self._key(self._next))) is not None:
                    event = json.loads(entry)
                    self._take(event)
                    if event["token"] == token:  # written by an attempt whose outcome was unknown
                        return self.state
                made = make(self.state)
                if made is None:
                    return self.state
                event = {**made, "token": token}
                try:
                    if self._store.compare_and_swap(self._key(self._next), None, json.dumps(event).encode()):
                        self._take(event)
                        return self.state
                except StoreError:
                    if self._store.get(self._key(self._next)) is None:
                        raise

    def trim(self) -> None:
        """Replaces what was read by a snapshot; one rank, when nothing runs."""
        with self._lock:
            if self.state.change or self.state.recovery:
                return
            self._store.put(_SNAPSHOT, self._snapshot())
            for page in range(max(0, self._next // _PAGE - 5), self._next // _PAGE - 1):
                self._store.delete(f"{PREFIX}log/{self._job}/{page:08d}/")

    def _take(self, event: dict[str, Any]) -> None:
        self._state = self.state.apply(event)
        self._next += 1

    def _load(self) -> None:
        value = self._store.get(_SNAPSHOT)
        if value is not None:
            self._next, state, self._job = json.loads(value)
            self._state = State.from_json(state)

    def _reload_if_lost(self) -> None:
        """A store that was started again is empty: the ranks' newest state becomes its content."""
        value = self._store.get(_SNAPSHOT)
        if value is None:
            self._state = State.from_json(self.state.to_json())  # a change that ran is lost with the old store
            self._store.compare_and_swap(_SNAPSHOT, None, self._snapshot())
            return
        index, _, job = json.loads(value)
        if (index > self._next) if job == self._job else self.newcomer:
            self._load()

    def _snapshot(self) -> bytes:
        return json.dumps([self._next, self.state.to_json(), self._job]).encode()

    def _key(self, index: int) -> str:
        return f"{PREFIX}log/{self._job}/{index // _PAGE:08d}/{index:08d}"
