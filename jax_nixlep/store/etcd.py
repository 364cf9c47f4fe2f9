"""The store in an etcd cluster, through the JSON gateway of its v3 API.

Keys live under "jax_nixlep/", apart from those of other users of the cluster. Requests are plain HTTP on a connection
of their own, to each endpoint in turn until one answers. `wait` polls. etcd refuses requests over its own
`--max-request-bytes` (1.5 MiB unless configured), and rounds a ttl up to whole seconds and to its minimum, about 2 s.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from jax_nixlep.store import (
    Store,
    StoreAuthError,
    StoreError,
    StoreProtocolError,
    check_keys,
    check_seconds,
    check_value,
    key_bytes,
    key_str,
    timeout_error,
    unreachable_error,
)

ROOT = b"jax_nixlep/"
ATTEMPT_TIMEOUT_S = 5.0  # for one request to one endpoint
POLL_S = (0.01, 0.2)  # first and longest pause between two looks of `wait`
MAX_TXN_OPS = 100  # keys in one request; etcd allows 128 unless configured


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _key(op: str, key: str) -> str:
    return _b64(ROOT + key_bytes(op, key))


def _range(op: str, prefix: str) -> dict[str, str]:
    first = ROOT + key_bytes(op, prefix, prefix=True)
    # The end of a prefix is the prefix with its last byte one higher; UTF-8 has no byte 0xff.
    return {"key": _b64(first), "range_end": _b64(first[:-1] + bytes([first[-1] + 1]))}


def _items(reply: dict[str, Any]) -> dict[str, bytes]:
    return {
        key_str(base64.b64decode(kv["key"])[len(ROOT) :]): base64.b64decode(kv.get("value", ""))
        for kv in reply.get("kvs", [])
    }


class EtcdStore(Store):
    """Client of etcd; see `connect`. `secret` is "user:password" of an etcd user, or "" where etcd asks for none."""

    def __init__(self, endpoints: Sequence[tuple[str, int]], secret: str, timeout_s: float) -> None:
        if secret and ":" not in secret:
            raise ValueError("connect: secret must be 'user:password' for etcd; got other text; pass secret=''")
        self.url = "etcd://" + ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in endpoints
        )
        self._endpoints = list(endpoints)
        self._user, _, self._password = secret.partition(":")
        self._timeout_s = check_seconds("connect", "timeout_s", timeout_s)
        self._token: str | None = None  # of `_user`; etcd forgets it after some minutes
        self._closed = threading.Event()
        self.get("connect")  # any key: does a server answer, and does it accept us?

    def put(self, key: str, value: bytes, *, ttl_s: float | None = None) -> None:
        body: dict[str, Any] = {"key": _key("put", key), "value": _b64(check_value("put", value))}
        if ttl_s is not None:
            ttl = math.ceil(check_seconds("put", "ttl_s", ttl_s))
            body["lease"] = self._call("lease/grant", {"TTL": ttl})["ID"]
        self._call("kv/put", body)

    def get(self, key: str) -> bytes | None:
        return _items(self._call("kv/range", {"key": _key("get", key)})).get(key)

    def wait(self, keys: Iterable[str], timeout_s: float) -> dict[str, bytes]:
        keys = check_keys(keys)
        deadline = time.monotonic() + check_seconds("wait", "timeout_s", timeout_s, zero=True)
        encoded = {key: _key("wait", key) for key in keys}
        pause_s, longest_s = POLL_S
        missing = keys
        while True:
            # Look for the missing keys only, without values; when none is missing, read all in the same way.
            found = self._read([encoded[key] for key in missing], deadline + ATTEMPT_TIMEOUT_S, keys_only=True)
            missing = [key for key in missing if key not in found]
            if not missing:
                found = self._read(list(encoded.values()), deadline + ATTEMPT_TIMEOUT_S, keys_only=False)
                missing = [key for key in keys if key not in found]
                if not missing:
                    return {key: found[key] for key in keys}
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise timeout_error(self.url, missing, len(keys), timeout_s)
            self._closed.wait(min(pause_s, left_s))
            pause_s = min(1.5 * pause_s, longest_s)

    def scan(self, prefix: str) -> dict[str, bytes]:
        return _items(self._call("kv/range", _range("scan", prefix) | {"sort_target": "KEY", "sort_order": "ASCEND"}))

    def compare_and_swap(self, key: str, expected: bytes | None, value: bytes) -> bool:
        op = "compare_and_swap"
        compare: dict[str, str] = {"key": _key(op, key), "result": "EQUAL"}
        if expected is None:
            compare |= {"target": "CREATE", "create_revision": "0"}
        else:
            compare |= {"target": "VALUE", "value": _b64(check_value(op, expected))}
        put = {"request_put": {"key": _key(op, key), "value": _b64(check_value(op, value))}}
        return bool(self._call("kv/txn", {"compare": [compare], "success": [put]}, repeat=False).get("succeeded"))

    def delete(self, prefix: str, *, timeout_s: float | None = None) -> int:
        deadline = None if timeout_s is None else time.monotonic() + check_seconds("delete", "timeout_s", timeout_s)
        return int(self._call("kv/deleterange", _range("delete", prefix), deadline).get("deleted", 0))

    def close(self) -> None:
        self._closed.set()

    def _read(self, keys: Sequence[str], deadline: float, *, keys_only: bool) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for at in range(0, len(keys), MAX_TXN_OPS):
            ops = [{"request_range": {"key": key, "keys_only": keys_only}} for key in keys[at : at + MAX_TXN_OPS]]
            for reply in self._call("kv/txn", {"success": ops}, deadline).get("responses", []):
                found |= _items(reply["response_range"])
        return found

    def _call(
        self, path: str, body: dict[str, Any], deadline: float | None = None, *, repeat: bool = True
    ) -> dict[str, Any]:
        """POST to the first endpoint that answers; those that do not go to the end of the list."""
        began = time.monotonic()
        deadline = began + self._timeout_s if deadline is None else deadline
        reason: object = "timed out"
        while not self._closed.is_set():
            for host, port in list(self._endpoints):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise unreachable_error(self.url, reason, began)
                http_connection = http.client.HTTPConnection(host, port, timeout=min(left_s, ATTEMPT_TIMEOUT_S))
                sent = False
                try:
                    http_connection.connect()
                    if self._user and self._token is None:
                        login = {"name": self._user, "password": self._password}
                        self._token = str(self._post(http_connection, "auth/authenticate", login)["token"])
                    sent = True
                    return self._post(http_connection, path, body)
                except _Expired as error:  # nothing was done
                    reason, self._token = error, None
                except (OSError, http.client.HTTPException, _Unavailable) as error:
                    reason = error
                    if sent and not repeat:
                        raise StoreError(
                            f"compare_and_swap: {self.url} gave no reply ({error}), so whether the key was set is "
                            "unknown; get it before trying again"
                        ) from error
                    if (host, port) == self._endpoints[0]:  # threads share the list; one of them turns it
                        self._endpoints = [*self._endpoints[1:], (host, port)]
                finally:
                    http_connection.close()
            self._closed.wait(min(0.1, max(deadline - time.monotonic(), 0.0)))
        raise StoreError(f"store: the connection to {self.url} must be open; it was closed; connect again")

    def _post(self, http_connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": self._token} if self._token else {})
        http_connection.request("POST", f"/v3/{path}", json.dumps(body), headers)
        response = http_connection.getresponse()
        try:
            reply = json.loads(response.read())
            text = str(reply.get("error", ""))
        except (ValueError, AttributeError):
            reply, text = None, ""
        if response.status == 200 and reply is not None:
            return dict(reply)
        if response.status == 401 and self._token:
            raise _Expired(text)
        if "auth" in text or "user name is empty" in text or "permission denied" in text:
            raise StoreAuthError(
                f"connect: {self.url} refused the user {self._user!r} ({text}); "
                "pass secret='user:password' of an etcd user"
            )
        if response.status in (500, 503, 504) and text:
            raise _Unavailable(text)
        if text:
            raise StoreError(f"store: {self.url} refused {path}: {text}")
        raise StoreProtocolError(f"store: {self.url} does not speak the etcd v3 API (HTTP {response.status}); check it")


class _Unavailable(Exception):
    """This endpoint cannot answer now; another may."""


class _Expired(Exception):
    """The token is no longer valid."""
