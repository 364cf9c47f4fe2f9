"""The embedded store: a small authenticated TCP server, and its client.

Handshake, every part of fixed size; h(label) = HMAC-SHA256(secret, label + client nonce + server nonce):

    client -> server   magic, version, client nonce
    server -> client   magic, version, server nonce
    client -> server   h("client")               the client knows the secret
    server -> client   verdict, h("server")      so does the server

Then requests and replies alternate, one frame each:

    length (uint32) | body (list of byte strings, each after its uint32 length) | HMAC-SHA256(key, counter + body)

with one key per direction, h("to server") or h("to client"), and a counter per direction, so that no frame can be
forged, replayed, reordered or reflected. Frames are authentic, not secret: anyone on the network path can read them.
Whoever breaks these rules loses this one connection.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Self

from jax_nixlep.store import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    SECRET_VARIABLE,
    Store,
    StoreAuthError,
    StoreError,
    StorePortInUseError,
    StoreProtocolError,
    check_keys,
    check_seconds,
    check_value,
    key_bytes,
    key_str,
    resolve_secret,
    timeout_error,
    unreachable_error,
)

MAGIC = b"nxstore"
VERSION = 1
NONCE_BYTES = MAC_BYTES = 32
MAX_FRAME_BYTES = 2 * MAX_VALUE_BYTES + (1 << 20)  # a compare_and_swap brings two values
MAX_CONNECTIONS = 512
MAX_HANDSHAKES = 64  # connections not yet authenticated; one more, and the oldest has to go
HANDSHAKE_TIMEOUT_S = 5.0
FRAME_TIMEOUT_S = 30.0  # a frame that has begun must be over by then
WAIT_SLICE_S = 2.0  # a long wait is asked for in slices, so that either side notices the other's death
REPLY_GRACE_S = 2.0  # past the end of a wait, for its reply

_ACCEPTED, _REFUSED, _FULL = b"\1", b"\0", b"\2"  # verdicts
_U32 = struct.Struct(">I")
_F64 = struct.Struct(">d")
_log = logging.getLogger(__name__)


def _left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "timed out")
    return left_s


def _recv_exact(sock: socket.socket, num_bytes: int, deadline: float | None) -> bytes:
    data = bytearray()  # grows with what arrives: a length that is only announced allocates nothing
    while len(data) < num_bytes:
        sock.settimeout(None if deadline is None else _left_s(deadline))
        chunk = sock.recv(min(num_bytes - len(data), 1 << 20))
        if not chunk:
            raise ConnectionError(errno.ECONNRESET, "connection closed by the other side")
        data += chunk
    return bytes(data)


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    sock.settimeout(_left_s(deadline))
    sock.sendall(data)


def _shutdown(sock: socket.socket) -> None:
    """Wake the thread that uses `sock`; that thread closes it."""
    with contextlib.suppress(OSError):  # not connected any more
        sock.shutdown(socket.SHUT_RDWR)


def _pack(parts: Iterable[bytes]) -> bytes:
    return b"".join(piece for part in parts for piece in (_U32.pack(len(part)), part))


def _unpack(body: bytes) -> list[bytes]:
    parts, at = [], 0
    while at < len(body):
        begin = at + _U32.size
        at = begin + _U32.unpack(body[at:begin].ljust(_U32.size, b"\xff"))[0]
        if at > len(body):
            raise StoreProtocolError("store: a part of a frame runs past its end")
        parts.append(body[begin:at])
    return parts


class _Channel:
    """An authenticated connection. One thread at a time uses it, sends and receives alternating."""

    def __init__(self, sock: socket.socket, send_key: bytes, recv_key: bytes) -> None:
        self.sock = sock
        self._send_key, self._recv_key = send_key, recv_key
        self._num_sent = self._num_received = 0

    def send(self, body: bytes, deadline: float) -> None:
        mac = _mac(self._send_key, self._num_sent, body)
        self._num_sent += 1
        _send(self.sock, _U32.pack(len(body)) + body + mac, deadline)

    def recv(self, deadline: float | None = None) -> list[bytes]:
        """The parts of the next frame; without a `deadline`, waits as long as it takes for one to begin."""
        (num_bytes,) = _U32.unpack(_recv_exact(self.sock, _U32.size, deadline))
        if num_bytes > MAX_FRAME_BYTES:
            raise StoreProtocolError(f"store: a frame must have at most {MAX_FRAME_BYTES} bytes; got {num_bytes}")
        frame = _recv_exact(self.sock, num_bytes + MAC_BYTES, deadline or time.monotonic() + FRAME_TIMEOUT_S)
        body, mac = frame[:num_bytes], frame[num_bytes:]
        if not hmac.compare_digest(mac, _mac(self._recv_key, self._num_received, body)):
            raise StoreProtocolError("store: a frame was forged, replayed or damaged")
        self._num_received += 1
        return _unpack(body)


def _mac(key: bytes, counter: int, body: bytes) -> bytes:
    return hmac.digest(key, counter.to_bytes(8) + body, "sha256")


def _proof(secret: str, label: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret.encode("utf-8", "surrogateescape"), label + nonces, "sha256")


def _channel(sock: socket.socket, secret: str, nonces: bytes, *, server: bool) -> _Channel:
    keys = _proof(secret, b"to server", nonces), _proof(secret, b"to client", nonces)
    return _Channel(sock, keys[server], keys[not server])


def _exchange_nonces(sock: socket.socket, deadline: float, *, server: bool) -> bytes:
    """Returns the client's nonce and the server's. The client speaks first; a server answers before it judges."""
    mine = os.urandom(NONCE_BYTES)
    greeting = MAGIC + bytes([VERSION])
    if not server:
        _send(sock, greeting + mine, deadline)
    theirs = _recv_exact(sock, len(greeting) + NONCE_BYTES, deadline)
    if server:
        _send(sock, greeting + mine, deadline)
    if not theirs.startswith(MAGIC):
        raise StoreProtocolError("something other than a jax_nixlep store answers there")
    if theirs[len(MAGIC)] != VERSION:
        raise StoreProtocolError(f"protocol version must be {VERSION}; got {theirs[len(MAGIC)]}; use one release")
    nonce = theirs[len(greeting) :]
    return nonce + mine if server else mine + nonce


class StoreServer:
    """A store in memory, served by daemon threads of this process, one per connection.

    Args:
      host: address to bind; one that other machines can reach needs a secret.
      port: 0 = any free port.
      secret: what clients must know; None takes the environment variable JAX_NIXLEP_SECRET, "" means none.

    Attributes:
      url: "tcp://host:port" for `connect`.

    Raises:
      StorePortInUseError: the port is taken.
      StoreAuthError: no secret for an address that is not loopback.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, secret: str | None = None) -> None:
        self._secret = resolve_secret(secret)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        shown_host = f"[{host}]" if ":" in host else host
        try:
            if not self._secret and not _is_loopback(socket.getaddrinfo(host, port, family)[0][4][0]):
                raise StoreAuthError(
                    f"StoreServer: host must be loopback when there is no secret; got {host!r}; "
                    f"set {SECRET_VARIABLE} to the same random text on every rank, or serve on 127.0.0.1"
                )
            self._listener = socket.create_server((host, port), family=family, backlog=256)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StorePortInUseError(
                    f"StoreServer: port must be free; got tcp://{shown_host}:{port}, which another program uses; "
                    "choose another port or stop that program"
                ) from error
            raise StoreError(
                f"StoreServer: host must be an address of this machine; got tcp://{shown_host}:{port} "
                f"({error.strerror}); correct it"
            ) from error
        self.url = f"tcp://{shown_host}:{self._listener.getsockname()[1]}"
        self._closed = False
        self._changed = threading.Condition()  # guards everything below; notified when a key appears
        self._values: dict[bytes, bytes] = {}
        self._expiry: dict[bytes, float] = {}  # of the keys that have a ttl
        self._handshakes: dict[socket.socket, None] = {}  # oldest first
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, name="nixlep-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and drop all connections and keys."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        _shutdown(self._listener)
        self._thread.join()
        self._listener.close()
        with self._changed:
            for sock in [*self._handshakes, *self._connections]:
                _shutdown(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if not self._closed:
                    time.sleep(0.05)  # out of file descriptors for the moment
                continue
            with self._changed:
                if len(self._handshakes) >= MAX_HANDSHAKES:
                    oldest = next(iter(self._handshakes))
                    del self._handshakes[oldest]
                    _shutdown(oldest)
                self._handshakes[sock] = None
            try:
                threading.Thread(target=self._serve, args=(sock,), name="nixlep-store-peer", daemon=True).start()
            except RuntimeError:  # out of threads for the moment
                with self._changed:
                    del self._handshakes[sock]
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            channel = self._authenticate(sock)
            while not self._closed:
                request = channel.recv()
                channel.send(_pack(self._answer(request)), time.monotonic() + FRAME_TIMEOUT_S)
        except (StoreError, OSError, struct.error) as error:
            if not isinstance(error, ConnectionError):
                _log.debug("%s: dropped a connection: %s", self.url, error)
        finally:
            with self._changed:
                self._handshakes.pop(sock, None)
                self._connections.discard(sock)
                sock.close()

    def _authenticate(self, sock: socket.socket) -> _Channel:
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S  # for all of it, however slowly the bytes come
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        nonces = _exchange_nonces(sock, deadline, server=True)
        verdict = _REFUSED
        if hmac.compare_digest(_recv_exact(sock, MAC_BYTES, deadline), _proof(self._secret, b"client", nonces)):
            with self._changed:
                verdict = _FULL if len(self._connections) >= MAX_CONNECTIONS else _ACCEPTED
                if verdict == _ACCEPTED:
                    self._handshakes.pop(sock, None)
                    self._connections.add(sock)
        # A refused client gets nothing made from the secret.
        proof = bytes(MAC_BYTES) if verdict == _REFUSED else _proof(self._secret, b"server", nonces)
        _send(sock, verdict + proof, deadline)
        if verdict != _ACCEPTED:
            raise StoreAuthError("wrong secret" if verdict == _REFUSED else "too many connections")
        return _channel(sock, self._secret, nonces, server=True)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        with self._changed:
            self._expire()
            match request:
                case [b"put", key, value, ttl]:
                    self._set(key, value, _F64.unpack(ttl)[0])
                    return []
                case [b"get", key]:
                    return [self._values[key]] if key in self._values else []
                case [b"wait", slice_s, *keys]:
                    end = time.monotonic() + min(_F64.unpack(slice_s)[0], WAIT_SLICE_S)
                    while missing := [key for key in keys if key not in self._values]:
                        left_s = end - time.monotonic()
                        if left_s <= 0 or self._closed:
                            return [b"missing", *missing]
                        self._changed.wait(left_s)
                        self._expire()
                    return self._page(keys)
                case [b"scan", prefix, after]:
                    return self._page(sorted(key for key in self._values if key.startswith(prefix) and key > after))
                case [b"compare_and_swap", key, value, *expected]:
                    if self._values.get(key) != (expected[0] if expected else None):
                        return [b"no"]
                    self._set(key, value, 0.0)
                    return [b"yes"]
                case [b"delete", prefix]:
                    keys = [key for key in self._values if key.startswith(prefix)]
                    for key in keys:
                        del self._values[key]
                        self._expiry.pop(key, None)
                    return [_U32.pack(len(keys))]
        raise StoreProtocolError("store: unknown request")

    def _set(self, key: bytes, value: bytes, ttl_s: float) -> None:
        if len(key) > MAX_KEY_BYTES or len(value) > MAX_VALUE_BYTES:
            raise StoreProtocolError("store: a key or value is too large")
        self._values[key] = value
        self._expiry.pop(key, None)
        if ttl_s:
            self._expiry[key] = time.monotonic() + ttl_s
        self._changed.notify_all()

    def _expire(self) -> None:
        now = time.monotonic()
        for key in [key for key, end in self._expiry.items() if end <= now]:
            del self._values[key], self._expiry[key]

    def _page(self, keys: Sequence[bytes]) -> list[bytes]:
        """The first of `keys`, each with its value, that fit in a frame; the client asks again for the rest."""
        parts, num_bytes = [b"end"], 64
        for key in keys:
            num_bytes += 2 * _U32.size + len(key) + len(self._values[key])
            if num_bytes > MAX_FRAME_BYTES:
                return [b"more", *parts[1:]]
            parts += [key, self._values[key]]
        return parts


class TcpStore(Store):
    """Client of a `StoreServer`; see `connect`. Each call in flight has a connection of its own, kept for the next."""

    def __init__(self, host: str, port: int, secret: str, timeout_s: float) -> None:
        self._address = (host, port)
        self.url = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        self._secret = secret
        self._timeout_s = check_seconds("connect", "timeout_s", timeout_s)
        self._lock = threading.Lock()
        self._closed = False
        self._idle: list[_Channel] = []
        self._busy: set[_Channel] = set()
        self._release(self._acquire(time.monotonic() + timeout_s))

    def put(self, key: str, value: bytes, *, ttl_s: float | None = None) -> None:
        ttl = 0.0 if ttl_s is None else check_seconds("put", "ttl_s", ttl_s)
        self._call([b"put", key_bytes("put", key), check_value("put", value), _F64.pack(ttl)])

    def get(self, key: str) -> bytes | None:
        found = self._call([b"get", key_bytes("get", key)])
        return found[0] if found else None

    def wait(self, keys: Iterable[str], timeout_s: float) -> dict[str, bytes]:
        keys = check_keys(keys)
        deadline = time.monotonic() + check_seconds("wait", "timeout_s", timeout_s, zero=True)
        wanted, found = [key_bytes("wait", key) for key in keys], dict[bytes, bytes]()
        while rest := [key for key in wanted if key not in found]:
            slice_s = min(max(deadline - time.monotonic(), 0.0), WAIT_SLICE_S)
            status, *parts = self._call([b"wait", _F64.pack(slice_s), *rest], deadline + REPLY_GRACE_S)
            if status != b"missing":
                found.update(zip(parts[::2], parts[1::2], strict=True))
            elif time.monotonic() >= deadline:
                raise timeout_error(self.url, [key_str(key) for key in parts], len(keys), timeout_s)
        return {key: found[data] for key, data in zip(keys, wanted, strict=True)}

    def scan(self, prefix: str) -> dict[str, bytes]:
        wanted, found, more = key_bytes("scan", prefix, prefix=True), dict[bytes, bytes](), b"more"
        while more == b"more":
            more, *parts = self._call([b"scan", wanted, next(reversed(found), b"")])
            found.update(zip(parts[::2], parts[1::2], strict=True))
        return {key_str(key): value for key, value in found.items()}

    def compare_and_swap(self, key: str, expected: bytes | None, value: bytes) -> bool:
        op = "compare_and_swap"
        old = [] if expected is None else [check_value(op, expected)]
        return self._call([op.encode(), key_bytes(op, key), check_value(op, value), *old], repeat=False) == [b"yes"]

    def delete(self, prefix: str, *, timeout_s: float | None = None) -> int:
        deadline = None if timeout_s is None else time.monotonic() + check_seconds("delete", "timeout_s", timeout_s)
        return int.from_bytes(self._call([b"delete", key_bytes("delete", prefix, prefix=True)], deadline)[0])

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for channel in self._busy:
                _shutdown(channel.sock)
            while self._idle:
                self._idle.pop().sock.close()

    def _call(self, request: list[bytes], deadline: float | None = None, *, repeat: bool = True) -> list[bytes]:
        began = time.monotonic()
        deadline = began + self._timeout_s if deadline is None else deadline
        body = _pack(request)
        if len(body) > MAX_FRAME_BYTES:
            raise ValueError(f"{request[0].decode()}: too many keys ({len(body)} bytes); ask for fewer at a time")
        while True:
            channel = self._acquire(deadline)
            try:
                channel.send(body, deadline)
                reply = channel.recv(deadline)
            except (OSError, StoreProtocolError) as error:
                with self._lock:
                    self._busy.discard(channel)
                channel.sock.close()
                if not repeat:
                    raise StoreError(
                        f"{request[0].decode()}: the connection to {self.url} broke before the reply ({error}), so "
                        "whether the key was set is unknown; get it before trying again"
                    ) from error
                if time.monotonic() >= deadline:
                    raise unreachable_error(self.url, error, began) from error
                time.sleep(0.01)
            else:
                self._release(channel)
                return reply

    def _acquire(self, deadline: float) -> _Channel:
        channel = None
        while channel is None:
            with self._lock:
                channel = self._idle.pop() if self._idle else None
            if channel is None:
                channel = self._dial(deadline)
            elif _is_stale(channel.sock):
                channel.sock.close()
                channel = None
        with self._lock:
            if self._closed:
                channel.sock.close()
                raise StoreError(f"store: the connection to {self.url} must be open; it was closed; connect again")
            self._busy.add(channel)
        return channel

    def _release(self, channel: _Channel) -> None:
        with self._lock:
            self._busy.discard(channel)
            if self._closed:
                channel.sock.close()
            else:
                self._idle.append(channel)

    def _dial(self, deadline: float) -> _Channel:
        began, pause_s, reason = time.monotonic(), 0.02, None
        while True:
            sock = None
            try:
                sock = socket.create_connection(self._address, timeout=max(deadline - time.monotonic(), 0.05))
                return self._authenticate(sock, min(deadline, time.monotonic() + HANDSHAKE_TIMEOUT_S))
            except (OSError, StoreError) as error:
                if sock is not None:
                    sock.close()
                if isinstance(error, StoreError):
                    raise
                if reason is None or not isinstance(error, TimeoutError):
                    reason = error  # that the last attempt ran out of time says little
                left_s = deadline - time.monotonic()
                if self._closed or left_s <= 0:
                    raise unreachable_error(self.url, reason, began) from reason
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, 0.5)

    def _authenticate(self, sock: socket.socket, deadline: float) -> _Channel:
        # Where nobody listens on a port of the ephemeral range, TCP can connect a socket to itself.
        if sock.getsockname() == sock.getpeername():
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connection refused")
        if not self._secret and not _is_loopback(sock.getpeername()[0]):
            raise StoreAuthError(f"connect: secret must be set for {self.url}; got none; set {SECRET_VARIABLE}")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            nonces = _exchange_nonces(sock, deadline, server=False)
        except StoreProtocolError as error:
            raise StoreProtocolError(f"store: {self.url}: {error}; check the address") from error
        _send(sock, _proof(self._secret, b"client", nonces), deadline)
        answer = _recv_exact(sock, 1 + MAC_BYTES, deadline)
        if answer[:1] == _REFUSED or not hmac.compare_digest(answer[1:], _proof(self._secret, b"server", nonces)):
            who = "refused the secret" if answer[:1] == _REFUSED else "does not know the secret"
            raise StoreAuthError(f"connect: {self.url} {who}; set {SECRET_VARIABLE} to the same text on every rank")
        if answer[:1] == _FULL:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "the server has no connection left")
        return _channel(sock, self._secret, nonces, server=False)


def _is_loopback(host: object) -> bool:
    return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback


def _is_stale(sock: socket.socket) -> bool:
    """Whether an idle connection was closed by the server: nothing else makes it readable."""
    sock.setblocking(False)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
