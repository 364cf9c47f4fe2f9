"""The rendezvous store: a few small keys through which the ranks of a group find each other.

    with connect("tcp://127.0.0.1:7011") as store:
        store.put("job/rank/0", b"...")
        peers = store.wait(["job/rank/0", "job/rank/1"], timeout_s=60.0)

Two backends behind one interface, `Store`: a server embedded in a rank or in the launcher ("tcp://host:port",
`tcp.StoreServer`) and etcd ("etcd://host:port[,host:port...]", module `etcd`). Standard library only.
"""

from __future__ import annotations

import abc
import math
import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from jax_nixlep.store.tcp import StoreServer

MAX_KEY_BYTES = 1 << 10  # of a key or prefix, in UTF-8
MAX_VALUE_BYTES = 16 << 20
SECRET_VARIABLE = "JAX_NIXLEP_SECRET"


class StoreError(RuntimeError):
    """Base of every error of the store."""


class StoreUnreachableError(StoreError):
    """No server answered before the deadline."""


class StoreAuthError(StoreError):
    """The secret is missing, or one side refused the other's."""


class StorePortInUseError(StoreError):
    """The address to serve on belongs to something else."""


class StoreProtocolError(StoreError):
    """The other side does not speak this protocol, or broke it."""


class StoreTimeoutError(StoreError, TimeoutError):
    """A `Store.wait` ended before all its keys existed.

    Attributes:
      missing: the keys that were still absent, in the order in which they were asked for.
    """

    def __init__(self, message: str, missing: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.missing = list(missing)


class Store(abc.ABC):
    """A shared map from str keys to bytes values. Thread-safe: the threads of a process share one `Store`.

    Keys are 1 to `MAX_KEY_BYTES` bytes of UTF-8 and values at most `MAX_VALUE_BYTES`, else ValueError. Every method
    is bounded in time: a server that cannot be reached within the `timeout_s` of `connect` (for `wait`: its own,
    and a little for the reply) raises `StoreUnreachableError`. A connection that breaks is made again and the
    request repeated, except for `compare_and_swap`.
    """

    @abc.abstractmethod
    def put(self, key: str, value: bytes, *, ttl_s: float | None = None) -> None:
        """Set `key`. With `ttl_s` the key disappears unless it is put again within so many seconds (a lease)."""

    @abc.abstractmethod
    def get(self, key: str) -> bytes | None:
        """The value of `key`, or None if there is no such key."""

    @abc.abstractmethod
    def wait(self, keys: Iterable[str], timeout_s: float) -> dict[str, bytes]:
        """Block until every one of `keys` exists and return them all.

        Raises:
          StoreTimeoutError: not all existed together within `timeout_s`; `.missing` lists those absent.
        """

    @abc.abstractmethod
    def scan(self, prefix: str) -> dict[str, bytes]:
        """All keys that begin with `prefix` ("" = every key), sorted, and their values."""

    @abc.abstractmethod
    def compare_and_swap(self, key: str, expected: bytes | None, value: bytes) -> bool:
        """Set `key` to `value`, without a ttl, if its value is `expected` (None: if there is no such key), atomically.

        Returns whether it was set. If the connection breaks before the reply, `StoreError` says that the outcome
        is unknown.
        """

    @abc.abstractmethod
    def delete(self, prefix: str, *, timeout_s: float | None = None) -> int:
        """Delete all keys that begin with `prefix`; returns how many (fewer, if a broken connection made it repeat).

        `timeout_s`: how long to try; None as for `connect`.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connections; calls in flight fail with `StoreError`. The keys stay in the server."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def connect(url: str, *, secret: str | None = None, timeout_s: float = 30.0) -> Store:
    """Connect to the store at `url`, trying until it answers.

    Args:
      url: "tcp://host:port" or "etcd://host:port[,host:port...]".
      secret: shared secret of a tcp store; for etcd, whose authentication is etcd's own business, "user:password" of
        an etcd user. None takes the environment variable JAX_NIXLEP_SECRET (for etcd only if it has the form
        "user:password"), "" means none.
      timeout_s: how long to try, here and in each later call.

    Raises:
      StoreUnreachableError: nothing answered within `timeout_s`.
      StoreAuthError: the secret was refused (at once).
      StoreProtocolError: something else answered (at once).
    """
    scheme, addresses = _parse_url(url)
    if scheme == "etcd":
        from jax_nixlep.store.etcd import EtcdStore

        if secret is None and ":" not in resolve_secret(None):
            secret = ""  # the variable holds the secret of a tcp store, such as the launcher's
        return EtcdStore(addresses, resolve_secret(secret), timeout_s)
    from jax_nixlep.store.tcp import TcpStore

    return TcpStore(*addresses[0], resolve_secret(secret), timeout_s)


def serve_or_connect(
    url: str, *, serve: bool, secret: str | None = None, timeout_s: float = 30.0
) -> tuple[StoreServer | None, Store]:
    """Connect to the store at `url`; with `serve`, serve it first unless one of ours already does.

    Args:
      url: as in `connect`. Nobody serves an etcd url. Port 0 serves on a free port (see `StoreServer.url`).
      serve: whether this process should be the server; true for one rank of a job.
      secret: as in `connect`.
      timeout_s: as in `connect`.

    Returns:
      The server started here (the caller closes it) or None, and the connected store.

    Raises:
      StorePortInUseError: the port belongs to something that is no jax_nixlep store.
    """
    scheme, addresses = _parse_url(url)
    if scheme == "etcd" or not serve:
        return None, connect(url, secret=secret, timeout_s=timeout_s)
    from jax_nixlep.store.tcp import StoreServer

    try:
        server = StoreServer(*addresses[0], secret)
    except StorePortInUseError as in_use:
        try:
            return None, connect(url, secret=secret, timeout_s=min(timeout_s, 5.0))
        except (StoreProtocolError, StoreUnreachableError) as error:
            raise StorePortInUseError(f"{in_use} ({error})") from error
    try:
        return server, connect(server.url, secret=secret, timeout_s=timeout_s)
    except BaseException:
        server.close()
        raise


# Shared by the backends.


def resolve_secret(secret: str | None) -> str:
    """`secret`, or the environment's if it is None."""
    return os.environ.get(SECRET_VARIABLE, "") if secret is None else secret


def key_bytes(op: str, key: str, *, prefix: bool = False) -> bytes:
    """The checked UTF-8 form of a key, or of a prefix, which may be empty."""
    what = "prefix" if prefix else "key"
    if not isinstance(key, str):
        raise TypeError(f"{op}: {what} must be a str; got {type(key).__name__}; decode it")
    data = key.encode("utf-8", "surrogatepass")
    if len(data) > MAX_KEY_BYTES or not (data or prefix):
        raise ValueError(f"{op}: {what} must have 1 to {MAX_KEY_BYTES} bytes; got {len(data)}; choose another name")
    return data


def key_str(data: bytes) -> str:
    """The inverse of `key_bytes`."""
    return data.decode("utf-8", "surrogatepass")


def check_keys(keys: Iterable[str]) -> list[str]:
    """The distinct keys of a `wait`, in order."""
    if isinstance(keys, str):
        raise TypeError(f"wait: keys must be several keys; got the str {keys!r}; pass [{keys!r}]")
    return list(dict.fromkeys(keys))


def check_value(op: str, value: bytes) -> bytes:
    """`value`, if a store can hold it."""
    if not isinstance(value, bytes):
        raise TypeError(f"{op}: value must be bytes; got {type(value).__name__}; encode it")
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(
            f"{op}: value must have at most {MAX_VALUE_BYTES} bytes; got {len(value)}; split it over several keys"
        )
    return value


def check_seconds(op: str, name: str, seconds: float, *, zero: bool = False) -> float:
    """`seconds`, if it is a finite duration above zero (or zero, with `zero`)."""
    if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not zero):
        raise ValueError(f"{op}: {name} must be a finite number of seconds; got {seconds}; give a bound")
    return seconds


def timeout_error(url: str, missing: list[str], num_keys: int, timeout_s: float) -> StoreTimeoutError:
    """The error of a `wait` for `num_keys` keys that ended without `missing`."""
    names = ", ".join(map(repr, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return StoreTimeoutError(
        f"wait: {len(missing)} of {num_keys} keys did not appear in {url} within {timeout_s:.1f} s; missing: {names}; "
        "look at the logs of the ranks that put them",
        missing,
    )


def unreachable_error(url: str, reason: object, began_s: float) -> StoreUnreachableError:
    """The error of a call that began at `began_s` (time.monotonic) and never got through."""
    text = (reason.strerror if isinstance(reason, OSError) else None) or str(reason) or type(reason).__name__
    how = "start etcd" if url.startswith("etcd") else "start it with `python -m jax_nixlep.store`"
    waited_s = time.monotonic() - began_s
    return StoreUnreachableError(
        f"store: {url} is unreachable ({text.lower()}) after {waited_s:.1f} s; {how} or check the address"
    )


def _parse_url(url: str) -> tuple[str, list[tuple[str, int]]]:
    scheme, _, rest = url.partition("://")
    addresses = []
    for address in rest.rstrip("/").split(","):
        host, _, port = address.rpartition(":")
        if scheme not in ("tcp", "etcd") or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            break
        addresses.append((host.removeprefix("[").removesuffix("]"), int(port)))
    else:
        if scheme == "etcd" or len(addresses) == 1:
            return scheme, addresses
    raise ValueError(
        f"store: url must be 'tcp://host:port' or 'etcd://host:port[,host:port...]'; got {url!r}; correct it"
    )


__all__ = [
    "MAX_KEY_BYTES",
    "MAX_VALUE_BYTES",
    "Store",
    "StoreAuthError",
    "StoreError",
    "StorePortInUseError",
    "StoreProtocolError",
    "StoreTimeoutError",
    "StoreUnreachableError",
    "connect",
    "serve_or_connect",
]
