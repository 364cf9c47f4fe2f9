"""The rendezvous store: both backends through the same tests, then what only one of them has."""

from __future__ import annotations

import ast
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_nixlep.store as nx_store
from jax_nixlep.store import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    Store,
    StoreAuthError,
    StoreError,
    StorePortInUseError,
    StoreProtocolError,
    StoreTimeoutError,
    StoreUnreachableError,
    connect,
    etcd,
    serve_or_connect,
    tcp,
)
from jax_nixlep.store.tcp import StoreServer

SECRET = "open sesame"
ROOT = pathlib.Path(nx_store.__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def listener(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """A TCP server that is not ours: `handle` gets each connection, in a thread; yields a tcp url."""
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(sock.accept()[0],), daemon=True).start()

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                handle(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        sock.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Forwards connections to a port, keeps what clients send, and can lose replies or inject bytes."""

    def __init__(self, port: int) -> None:
        self.port, self.lose_replies = port, False
        self.sent: list[bytes] = []
        self.server_side: socket.socket | None = None

    def handle(self, client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            self.server_side = server
            threading.Thread(target=self.back, args=(server, client), daemon=True).start()
            while data := client.recv(1 << 16):
                self.sent.append(data)
                server.sendall(data)

    def back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (data := server.recv(1 << 16)) and not self.lose_replies:
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def etcd_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if shutil.which("etcd") is None:
        if os.environ.get("JAX_NIXLEP_REQUIRE_ETCD") == "1":
            pytest.fail("JAX_NIXLEP_REQUIRE_ETCD=1, but there is no etcd; apt-get install etcd-server")
        pytest.skip("no etcd on PATH; apt-get install etcd-server to run this test")
    folder = tmp_path_factory.mktemp("etcd")
    url, peer_url = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    command = ["etcd", "--data-dir", str(folder / "data"), "--listen-client-urls", url, "--advertise-client-urls", url]
    command += ["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url]
    command += ["--initial-cluster", f"default={peer_url}", "--unsafe-no-fsync"]
    if "unsafe-no-fsync" not in subprocess.run(["etcd", "--help"], capture_output=True, text=True, check=False).stdout:
        command.pop()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        etcd_url = url.replace("http", "etcd")
        try:
            connect(etcd_url, secret="", timeout_s=20.0).close()
        except StoreError as error:
            pytest.fail(f"etcd did not start: {error}\n{(folder / 'log').read_text()[-2000:]}")
        yield etcd_url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def tcp_url() -> Iterator[str]:
    with StoreServer() as server:
        yield server.url


@pytest.fixture(scope="module", params=["tcp", "etcd"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with connect(url, secret="", timeout_s=10.0) as store:
        store.delete("")
        yield store


# Both backends.


def test_put_get_delete(store: Store) -> None:
    assert store.get("a") is None
    store.put("a", b"1")
    store.put("a", b"2")
    store.put("empty", b"")
    assert store.get("a") == b"2"
    assert store.get("empty") == b""
    assert store.delete("a") == 1
    assert store.delete("a") == 0
    assert store.get("a") is None


def test_scan_and_delete_take_prefixes(store: Store) -> None:
    for key in ("job/b", "job/a", "job", "jobs", "other", "job/ü", "job/\U0001f600"):
        store.put(key, key.encode())
    found = store.scan("job/")
    assert list(found) == ["job/a", "job/b", "job/ü", "job/\U0001f600"]
    assert all(value == key.encode() for key, value in found.items())
    assert len(store.scan("")) == 7
    assert store.scan("nothing") == {}
    assert store.delete("job/") == 4
    assert list(store.scan("")) == ["job", "jobs", "other"]
    assert store.delete("") == 3


def test_compare_and_swap(store: Store) -> None:
    assert not store.compare_and_swap("a", b"1", b"2")
    assert store.compare_and_swap("a", None, b"1")
    assert not store.compare_and_swap("a", None, b"2")
    assert not store.compare_and_swap("a", b"0", b"2")
    assert store.compare_and_swap("a", b"1", b"")
    assert store.compare_and_swap("a", b"", b"3")
    assert store.get("a") == b"3"


def test_wait_returns_all_keys_in_order(store: Store) -> None:
    assert store.wait([], timeout_s=0.0) == {}
    store.put("b", b"B")
    assert store.wait(["b"], timeout_s=0.0) == {"b": b"B"}
    timers = [threading.Timer(0.1 * i, store.put, (key, key.upper().encode())) for i, key in enumerate("ca", 1)]
    for timer in timers:
        timer.start()
    began = time.monotonic()
    assert list(store.wait(["a", "b", "c", "a"], timeout_s=10.0).items()) == [("a", b"A"), ("b", b"B"), ("c", b"C")]
    assert 0.1 < time.monotonic() - began < 5.0
    for timer in timers:  # its reply may come after the key
        timer.join()


def test_wait_names_the_missing_keys(store: Store) -> None:
    store.put("rank/1", b"")
    began = time.monotonic()
    with pytest.raises(StoreTimeoutError, match=r"2 of 3 keys .* within 0\.3 s; missing: 'rank/0', 'rank/2'") as caught:
        store.wait(["rank/0", "rank/1", "rank/2"], timeout_s=0.3)
    assert 0.25 < time.monotonic() - began < 2.5
    assert caught.value.missing == ["rank/0", "rank/2"]
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, StoreError)
    with pytest.raises(StoreTimeoutError, match="'k7' and 12 more") as caught:
        store.wait([f"k{i}" for i in range(20)], timeout_s=0.0)
    assert len(caught.value.missing) == 20


def test_wait_for_many_keys(store: Store) -> None:
    keys = [f"k{i:03}" for i in range(150)]  # more than one request to etcd
    for key in keys:
        store.put(key, key.encode())
    assert store.wait(keys, timeout_s=10.0) == store.scan("k")


def test_a_key_with_a_ttl_disappears_unless_put_again(store: Store) -> None:
    store.put("lease", b"", ttl_s=1.0)
    store.put("kept", b"", ttl_s=1.0)
    store.put("kept", b"")  # no ttl any more
    store.put("swapped", b"", ttl_s=1.0)
    assert store.compare_and_swap("swapped", b"", b"1")  # likewise
    for _ in range(4):
        time.sleep(0.4)
        store.put("lease", b"alive", ttl_s=1.0)
    assert store.get("lease") == b"alive"
    eventually(lambda: store.get("lease") is None)
    with pytest.raises(StoreTimeoutError):
        store.wait(["lease"], timeout_s=0.0)
    assert list(store.scan("")) == ["kept", "swapped"]
    assert store.compare_and_swap("lease", None, b"")


def test_threads_share_a_store_and_one_swap_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        waiting = pool.submit(store.wait, ["done"], 10.0)  # a wait holds up nobody else
        for turn in range(5):
            wins = pool.map(lambda i, turn=turn: store.compare_and_swap(f"t{turn}", None, b"%d" % i), range(7))
            assert sum(wins) == 1
        list(pool.map(lambda i: store.put(f"key/{i}", b"%d" % i), range(50)))
        assert store.scan("key/") == {f"key/{i}": b"%d" % i for i in range(50)}
        store.put("done", b"")
        assert waiting.result() == {"done": b""}


# Without jax_nixlep/__init__, which imports jax: that takes longer than the test.
COUNT = (
    f"""
import sys, types
package = sys.modules["jax_nixlep"] = types.ModuleType("jax_nixlep")
package.__path__ = [{str(ROOT / "jax_nixlep")!r}]
"""
    + """
from jax_nixlep.store import connect
with connect(sys.argv[1], secret="") as store:
    store.put("ready/" + sys.argv[2], b"")
    store.wait([f"ready/{i}" for i in range(3)], 20.0)
    for _ in range(10):
        while True:
            old = store.get("count")
            if store.compare_and_swap("count", old, b"%d" % (int(old or 0) + 1)):
                break
"""
)


def test_processes_count_together(store: Store, url: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ranks = [subprocess.Popen([sys.executable, "-c", COUNT, url, str(i)], env=env) for i in range(3)]
    try:
        assert [rank.wait(30) for rank in ranks] == [0, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert store.get("count") == b"30"


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(st.characters(), min_size=1, max_size=40), st.binary(max_size=200), max_size=4))
def test_keys_and_values_round_trip(url: str, items: dict[str, bytes]) -> None:
    with connect(url, secret="") as store:
        store.delete("")
        for key, value in items.items():
            store.put(key, value)
        assert store.scan("") == items
        assert store.wait(items, 5.0) == items
        assert {key: store.get(key) for key in items} == items


def test_bad_arguments(store: Store) -> None:
    store.put("k" * MAX_KEY_BYTES, b"")
    for call, error, text in [
        (lambda: store.put("", b""), ValueError, "put: key must have 1 to 1024 bytes; got 0"),
        (lambda: store.get("ü" * 600), ValueError, "get: key must have 1 to 1024 bytes; got 1200"),
        (lambda: store.scan("p" * 1025), ValueError, "scan: prefix must"),
        (lambda: store.put(b"k", b""), TypeError, "put: key must be a str; got bytes"),
        (lambda: store.put("k", "v"), TypeError, "put: value must be bytes; got str"),
        (lambda: store.put("k", bytes(MAX_VALUE_BYTES + 1)), ValueError, "put: value must have at most 16777216 bytes"),
        (lambda: store.put("k", b"", ttl_s=0), ValueError, "put: ttl_s must be a finite number"),
        (lambda: store.put("k", b"", ttl_s=float("nan")), ValueError, "put: ttl_s must"),
        (lambda: store.wait(["k"], float("inf")), ValueError, "wait: timeout_s must be a finite number"),
        (lambda: store.wait("key", 1.0), TypeError, "wait: keys must be several keys"),
        (lambda: store.compare_and_swap("k", "old", b""), TypeError, "compare_and_swap: value must be bytes"),
    ]:
        with pytest.raises(error, match=text):
            call()
    assert store.get("k") is None


def test_use_after_close(url: str) -> None:
    store = connect(url, secret="")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.wait, ["never"], 20.0)
        time.sleep(0.1)
        store.close()
        with pytest.raises(StoreError, match="it was closed"):
            waiting.result(5.0)
    with pytest.raises(StoreError, match="it was closed"):
        store.get("a")
    store.close()


def test_a_lost_reply_leaves_a_swap_unknown_and_repeats_the_rest(store: Store, url: str) -> None:
    proxy = Proxy(port_of(url))
    with (
        listener(proxy.handle) as proxy_url,
        connect(proxy_url.replace("tcp", url[: url.index(":")]), secret="") as lossy,
    ):
        proxy.lose_replies = True
        with pytest.raises(StoreError, match=r"compare_and_swap: .* so whether the key was set is unknown"):
            lossy.compare_and_swap("a", None, b"1")
        assert store.get("a") == b"1"  # this time it was
        threading.Timer(0.3, setattr, (proxy, "lose_replies", False)).start()
        lossy.put("b", b"2")
        assert lossy.get("b") == b"2"


def test_unreachable_is_an_error_after_the_deadline(url: str) -> None:
    scheme, port = url.partition(":")[0], free_port()
    began = time.monotonic()
    with pytest.raises(
        StoreUnreachableError,
        match=rf"store: {scheme}://127\.0\.0\.1:{port} is unreachable \(connection refused\) after 0",
    ):
        connect(f"{scheme}://127.0.0.1:{port}", timeout_s=0.3)
    assert time.monotonic() - began < 3.0


def test_a_silent_server_is_an_error_after_the_deadline(url: str) -> None:
    with listener(lambda sock: time.sleep(3.0)) as silent, pytest.raises(StoreUnreachableError, match="timed out"):
        connect(silent.replace("tcp", url.partition(":")[0]), timeout_s=0.3)


def test_something_else_answers(url: str) -> None:
    def http_server(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        sock.sendall(b"HTTP/1.1 404 Not Found\r\nServer: x\r\nContent-Length: 0\r\n\r\n")

    with (
        listener(http_server) as other,
        pytest.raises(StoreProtocolError, match=r"other than a jax|does not speak the etcd"),
    ):
        connect(other.replace("tcp", url.partition(":")[0]), timeout_s=5.0)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "127.0.0.1:80",
        "tcp://",
        "tcp://host",
        "tcp://:80",
        "tcp://h:x",
        "tcp://h:99999",
        "http://h:1",
        "tcp://a:1,b:2",
        "etcd://a:1,",
    ],
)
def test_bad_url(bad: str) -> None:
    with pytest.raises(ValueError, match="store: url must be 'tcp://host:port' or 'etcd"):
        connect(bad)


# tcp only.


def test_a_client_may_come_before_its_server() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(connect, f"tcp://127.0.0.1:{port}", timeout_s=10.0)
        time.sleep(0.3)
        with StoreServer(port=port) as server, early.result() as store:
            assert server.url == f"tcp://127.0.0.1:{port}"
            store.put("a", b"")


@pytest.mark.parametrize(("server_secret", "client_secret"), [(SECRET, ""), ("", SECRET), (SECRET, "other")])
def test_wrong_secret_fails_at_once(server_secret: str, client_secret: str) -> None:
    with StoreServer(secret=server_secret) as server:
        began = time.monotonic()
        with pytest.raises(StoreAuthError, match=r"refused the secret; set JAX_NIXLEP_SECRET"):
            connect(server.url, secret=client_secret, timeout_s=20.0)
        assert time.monotonic() - began < 5.0
        connect(server.url, secret=server_secret).close()


def test_a_server_must_prove_the_secret_too() -> None:
    def impostor(sock: socket.socket) -> None:
        greeting = sock.recv(1 << 10)
        sock.sendall(greeting)
        sock.recv(1 << 10)
        sock.sendall(tcp._ACCEPTED + bytes(tcp.MAC_BYTES))

    with listener(impostor) as url, pytest.raises(StoreAuthError, match="does not know the secret"):
        connect(url, secret=SECRET)


def test_secret_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NIXLEP_SECRET", SECRET)
    with StoreServer() as server:
        connect(server.url).close()
        connect(server.url, secret=SECRET).close()
        with pytest.raises(StoreAuthError):
            connect(server.url, secret="")


def test_no_secret_only_on_loopback() -> None:
    with pytest.raises(StoreAuthError, match=r"host must be loopback .* got '0\.0\.0\.0'; set JAX_NIXLEP_SECRET"):
        StoreServer("0.0.0.0", secret="")
    with StoreServer("0.0.0.0", secret=SECRET) as server:
        connect(f"tcp://127.0.0.1:{port_of(server.url)}", secret=SECRET).close()
    with pytest.raises(StoreError, match=r"host must be an address of this machine; got tcp://192\.0\.2\.1:"):
        StoreServer("192.0.2.1", secret=SECRET)


def test_another_version_is_refused_by_name() -> None:
    def other(sock: socket.socket) -> None:
        sock.recv(1 << 10)
        sock.sendall(tcp.MAGIC + b"\x09" + bytes(tcp.NONCE_BYTES))

    with listener(other) as url, pytest.raises(StoreProtocolError, match="protocol version must be 1; got 9"):
        connect(url)
    with StoreServer() as server, socket.create_connection(("127.0.0.1", port_of(server.url))) as sock:
        sock.sendall(tcp.MAGIC + b"\x09" + bytes(tcp.NONCE_BYTES))
        assert sock.recv(8) == tcp.MAGIC + bytes([tcp.VERSION])


def drain(sock: socket.socket) -> None:
    """Read until the other side closes."""
    sock.settimeout(5.0)
    with contextlib.suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass


@pytest.mark.parametrize(
    "garbage", [b"\0" * 40, b"GET / HTTP/1.1\r\n" * 9, b"\xff" * 100_000, tcp.MAGIC + b"\x01" + b"x" * 99]
)
def test_garbage_costs_only_its_connection(garbage: bytes) -> None:
    with StoreServer(secret=SECRET) as server, connect(server.url, secret=SECRET) as store:
        with socket.create_connection(("127.0.0.1", port_of(server.url))) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(garbage)
            drain(sock)
        store.put("a", b"")
        connect(server.url, secret=SECRET).close()


FORGED = tcp._pack([b"put", b"a", b"forged", bytes(8)])


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff",  # a length over the limit: refused before anything is allocated
        (tcp.MAX_FRAME_BYTES + 1).to_bytes(4),
        len(FORGED).to_bytes(4) + FORGED + bytes(tcp.MAC_BYTES),
    ],
)
def test_a_bad_frame_costs_only_its_connection(frame: bytes) -> None:
    with StoreServer() as server, connect(server.url, secret="") as store, connect(server.url, secret="") as other:
        other.put("a", b"1")
        store._idle[0].sock.sendall(frame)
        eventually(lambda: len(server._connections) == 1)
        assert store.get("a") == other.get("a") == b"1"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0",
        b"\0\0\0\xff",
        b"\0\0\0\4nope",
        tcp._pack([b"put", b"k"]),
        tcp._pack([b"put", b"k", b"v", b"ttl"]),
        tcp._pack([b"put", b"k" * 1025, b"v", bytes(8)]),
    ],
)
def test_a_bad_request_costs_only_its_connection(body: bytes) -> None:
    with StoreServer() as server, connect(server.url, secret="") as store:
        store._idle[0].send(body, time.monotonic() + 5.0)
        drain(store._idle[0].sock)
        assert store.scan("") == {}


def test_a_replayed_frame_is_rejected() -> None:
    with StoreServer(secret=SECRET) as server, connect(server.url, secret=SECRET) as direct:
        proxy = Proxy(port_of(server.url))
        with listener(proxy.handle) as url, connect(url, secret=SECRET) as store:
            store.put("a", b"old")
            recorded, put = b"".join(proxy.sent), proxy.sent[-1]
            direct.put("a", b"new")
            assert proxy.server_side is not None
            proxy.server_side.sendall(put)  # again in the same session
            eventually(lambda: len(server._connections) == 1)
            assert store.get("a") == b"new"  # over a new connection
        with socket.create_connection(("127.0.0.1", port_of(server.url))) as sock:  # a whole session once more
            with contextlib.suppress(ConnectionError):
                sock.sendall(recorded)
            drain(sock)
        assert direct.get("a") == b"new"


def test_idle_and_slow_handshakes_block_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "MAX_HANDSHAKES", 8)
    with StoreServer(secret=SECRET) as server, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", port_of(server.url))
        idle = [stack.enter_context(socket.create_connection(address)) for _ in range(20)]
        began = time.monotonic()
        connect(server.url, secret=SECRET).close()
        assert time.monotonic() - began < 2.0
        assert len(server._handshakes) <= 8
        drain(idle[0])
        monkeypatch.setattr(tcp, "HANDSHAKE_TIMEOUT_S", 0.4)
        slow = stack.enter_context(socket.create_connection(address))
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in tcp.MAGIC * 100:  # a byte now and then does not extend the deadline
                slow.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - began < 3.0


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "MAX_CONNECTIONS", 2)
    with StoreServer() as server, connect(server.url, secret="") as first, connect(server.url, secret="") as second:
        with pytest.raises(StoreUnreachableError, match="the server has no connection left"):
            connect(server.url, secret="", timeout_s=0.2)
        first.close()
        with connect(server.url, secret="") as third:
            third.put("a", b"1")
            assert second.get("a") == b"1"


def test_port_in_use() -> None:
    with listener(lambda sock: time.sleep(5.0)) as url:
        with pytest.raises(StorePortInUseError, match=rf"port must be free; got {url}, which another program uses"):
            StoreServer(port=port_of(url))
        with pytest.raises(StorePortInUseError, match=url):
            serve_or_connect(url, serve=True, secret="", timeout_s=0.3)
    with (
        listener(lambda sock: sock.sendall(b"SSH-2.0-OpenSSH_9.2p1 and so on, long enough\r\n")) as url,
        pytest.raises(StorePortInUseError, match=rf"{url}, .*something other than a jax_nixlep store"),
    ):
        serve_or_connect(url, serve=True, secret="", timeout_s=10.0)


def test_serve_or_connect() -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    server, store = serve_or_connect(url, serve=True, secret=SECRET, timeout_s=5.0)
    assert server is not None
    with server, store:
        assert server.url == url
        for serve in (False, True):  # one that is there already is used
            none, other = serve_or_connect(url, serve=serve, secret=SECRET, timeout_s=5.0)
            with other:
                assert none is None
                other.put("a", b"1")
        assert store.get("a") == b"1"
        with pytest.raises(StoreAuthError):
            serve_or_connect(url, serve=True, secret="other", timeout_s=5.0)
    server, store = serve_or_connect("tcp://127.0.0.1:0", serve=True, secret="", timeout_s=5.0)
    assert server is not None
    store.close()
    server.close()


def test_a_client_survives_a_restart_of_the_server() -> None:
    server = StoreServer()
    with (
        connect(server.url, secret="", timeout_s=0.5) as store,
        connect(server.url, secret="") as idle,
        ThreadPoolExecutor(1) as pool,
    ):
        store.put("a", b"1")
        waiting = pool.submit(store.wait, ["b"], 20.0)
        time.sleep(0.1)
        server.close()
        with pytest.raises(StoreUnreachableError, match=rf"{server.url} is unreachable \(connection refused\)"):
            store.put("a", b"1")
        with StoreServer(port=port_of(server.url)) as server:
            assert idle.compare_and_swap("a", None, b"2")  # a dead connection is not used for it
            store.put("b", b"2")
            assert waiting.result(10.0) == {"b": b"2"}


def test_large_values_come_in_several_frames() -> None:
    with StoreServer() as server, connect(server.url, secret="") as store:
        items = {f"k{i}": bytes([i]) * MAX_VALUE_BYTES for i in range(3)}
        for key, value in items.items():
            store.put(key, value)
        assert store.scan("k") == items
        assert store.wait(items, 10.0) == items
        assert store.compare_and_swap("k0", items["k0"], items["k1"])


def test_nothing_leaks() -> None:
    with StoreServer() as server:
        connect(server.url, secret="").close()
        eventually(lambda: not server._connections)
        num_files, num_threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(100):
            with StoreServer() as other, connect(other.url, secret="") as store:
                store.put("a", b"")
            with connect(server.url, secret="") as store:
                store.put("a", b"")
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= num_files and threading.active_count() <= num_threads)


def test_ipv6() -> None:
    try:
        server = StoreServer("::1")
    except StoreError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server, connect(server.url, secret="") as store:
        assert server.url.startswith("tcp://[::1]:")
        store.put("a", b"")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_standalone_server(stop: signal.Signals) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NIXLEP_SECRET": SECRET}
    command = [sys.executable, "-m", "jax_nixlep.store", "--port", "0"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            connect(url, secret=SECRET).close()
            second = subprocess.run(
                [*command[:-1], url.rpartition(":")[2]],
                env=env,
                capture_output=True,
                text=True,
                check=False,
                timeout=20,
            )
            assert second.returncode == 1
            assert "port must be free" in second.stderr
            process.send_signal(stop)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_standard_library_only() -> None:
    for file in pathlib.Path(nx_store.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith("jax_nixlep.store") or name.partition(".")[0] in sys.stdlib_module_names, name


# etcd only.


def test_etcd_tries_its_endpoints_in_turn(etcd_url: str) -> None:
    dead = free_port()
    with connect(f"etcd://127.0.0.1:{dead},{etcd_url.removeprefix('etcd://')}", secret="") as store:
        assert store.compare_and_swap(f"turn{dead}", None, b"")  # the refused connection sent nothing
        assert store.delete("turn") == 1


def test_etcd_is_served_by_nobody(etcd_url: str) -> None:
    server, store = serve_or_connect(etcd_url, serve=True, secret="", timeout_s=5.0)
    store.close()
    assert server is None


def test_etcd_keys_stay_in_their_own_folder(etcd_url: str) -> None:
    with connect(etcd_url, secret="") as store:
        store.delete("")
        store._call("kv/put", {"key": etcd._b64(b"foreign"), "value": ""})
        store.put("a", b"")
        assert list(store.scan("")) == ["a"]
        assert store.delete("") == 1
        assert store._call("kv/range", {"key": etcd._b64(b"foreign")})["count"] == "1"


def test_etcd_refuses_what_is_too_large_for_it(etcd_url: str) -> None:
    with connect(etcd_url, secret="") as store, pytest.raises(StoreError, match=r"refused kv/put: .*larger than max"):
        store.put("a", bytes(4 << 20))


def test_etcd_user_and_password(etcd_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(etcd_url, secret="") as store:
        with pytest.raises(StoreAuthError, match="authentication is not enabled"):
            connect(etcd_url, secret="root:pw")
        store._call("auth/user/add", {"name": "root", "password": "p:w"})
        store._call("auth/user/add", {"name": "guest", "password": "pw"})
        store._call("auth/user/grant", {"user": "root", "role": "root"})
        store._call("auth/enable", {})
    try:
        for secret, text in [
            ("", "user name is empty"),
            ("root:wrong", "authentication failed"),
            ("guest:pw", "permission"),
        ]:
            with pytest.raises(StoreAuthError, match=text):
                connect(etcd_url, secret=secret, timeout_s=5.0)
        monkeypatch.setenv("JAX_NIXLEP_SECRET", "root:p:w")
        with connect(etcd_url) as store:
            store.put("a", b"1")
            store._token = "expired.1"  # etcd forgets tokens; a new one is fetched
            assert store.compare_and_swap("a", b"1", b"2")
    finally:
        with connect(etcd_url, secret="root:p:w") as store:
            store._call("auth/disable", {})
    with pytest.raises(ValueError, match="secret must be 'user:password' for etcd"):
        connect(etcd_url, secret="word")
    monkeypatch.setenv("JAX_NIXLEP_SECRET", "of the launcher's tcp store")
    connect(etcd_url).close()


def test_etcd_answers_urllib(etcd_url: str) -> None:
    """The server under test is the real one."""
    with urllib.request.urlopen(etcd_url.replace("etcd", "http") + "/version", timeout=5.0) as response:
        assert b'"etcdserver":"3.' in response.read()
