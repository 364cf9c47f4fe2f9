"""A process that is one rank: `python -m serving.worker`, started by the router.

It reads JSON lines from stdin, the first of which is its `Settings`, and ends when stdin does: no rank outlives its
front end. It writes JSON lines to stdout. In between it steps with its group, whether it has requests or not: all ranks
run the same operations in the same order because every step is one forward pass, and a rank alone decides only how
many tokens it brings.

Down: {"do": "generate", "request": ...}, {"do": "cancel", "id": n}, {"do": "pace", "rest": bool},
      {"do": "resize", "members": [...], "deadline_s": x}, {"do": "abort"} of that.
Up:   "compiled" (this rank can join without holding up anybody), "switch" (an epoch began), "stepped" (its first step
      was completed; names experts that no rank holds), "tokens", "resized" (or why not).
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import jax
import numpy as np

import jax_nixlep as nx
from serving.model import open_model
from serving.program import Batch, compile_steps
from serving.rows import Request, Rows

_REST_S = 0.05  # between steps while no rank has a request; far below any detection timeout
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a rank needs to know. All but `rank` and `members` are equal on all ranks.

    Attributes:
      source: for `open_model`.
      rank: of this process.
      members: the first members of the group, or () to join it later.
      store: url where ranks meet; the secret comes from the environment.
      max_ranks, experts_per_rank: capacities of the group.
      rows: requests that a rank works on at a time.
      chunk: tokens of a prompt that are read in a step.
      context: tokens of a request, prompt and answer, at most.
      detection_timeout_s: how long a rank waits for another before it gives it up.
      start_timeout_s: how long it waits for all others to start, or to be taken in.
    """

    source: dict[str, str]
    rank: int
    members: tuple[int, ...]
    store: str
    max_ranks: int
    experts_per_rank: int
    rows: int
    chunk: int
    context: int
    detection_timeout_s: float
    start_timeout_s: float


class Worker:
    def __init__(self, lines: int, out: BinaryIO):
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, args=(out,), daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        self._compilations = 0
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)

    def run(self) -> None:
        """Joins, serves, and returns when this rank is out of the group."""
        first = self._inbox.get()
        s = Settings(**first | {"members": tuple(first["members"])})
        model = open_model(s.source)
        config = model.ep_config(s.max_ranks, s.experts_per_rank, s.rows * s.chunk)
        length = s.context + s.chunk  # the last piece of a prompt may be padded past the context
        programs = compile_steps(model, config, s.rows, (1, s.chunk), length)
        self._send(event="compiled")

        membership: dict[str, Any] = {"members": s.members, "elastic": True} if s.members else {"join": True}
        group = nx.initialize(
            config,
            rank=s.rank,
            store=s.store,
            num_experts=model.num_experts,
            timeout_s=s.detection_timeout_s,
            init_timeout_s=s.start_timeout_s,
            restore=model.load_experts,
            **membership,
        )
        if s.members:
            mine = slice(s.rank * s.experts_per_rank, (s.rank + 1) * s.experts_per_rank)
            group.load(model.load_experts(group.table[mine].tolist()), model.load_dense())
        group.elastic.on_commit.append(self._on_switch)
        self._group, self._programs = group, programs
        self._rows, self._rest = Rows(s.rows, s.chunk, model.eos_ids), False
        self._missing: list[int] = []  # experts that no rank holds
        self._change: nx.Change | None = None  # that this rank asked for last
        self._cache = jax.device_put(model.empty_cache(s.rows, length), jax.local_devices()[0])
        for width in programs:  # alone, before the first step with others
            jax.block_until_ready(self._step(Batch.empty(s.rows, width)))
        self._compilations = 0
        self._serve()
        nx.shutdown()
        self._outbox.put(None)
        self._writer.join()

    def _step(self, batch: Any) -> Any:
        group = self._group
        program = self._programs[batch.tokens.shape[1]]
        return program(group.dense, group.experts, group.placement, self._cache, batch)

    def _serve(self) -> None:
        epoch = 0
        while True:
            self._obey(wait=bool(self._missing or (self._rest and not self._rows)))
            batch = self._rows.next_batch()
            try:
                tokens, self._cache = self._group.run(self._step, batch)
            except nx.ElasticError:
                if self._group.members:
                    raise
                return
            now = time.monotonic()
            if self._group.epoch != epoch:
                epoch = self._group.epoch
                self._missing = np.flatnonzero(np.asarray(self._group.placement.counts) == 0).tolist()
                self._send(
                    event="stepped", epoch=epoch, at=now, recompiles=self._compilations, missing_experts=self._missing
                )
            if self._missing:
                continue  # a token without its experts is no answer: requests wait until the group has room for all
            if made := self._rows.accept(batch, np.asarray(tokens)):
                self._send(event="tokens", tokens=made, at=now, recompiles=self._compilations)

    def _obey(self, *, wait: bool) -> None:
        """Takes what arrived; waits a little for it if there is nothing else to do."""
        for message in self._messages(_REST_S if wait else None):
            match message["do"]:
                case "generate":
                    request = message["request"]
                    self._rows.add(Request(**request | {"prompt": tuple(request["prompt"])}))
                case "cancel":
                    self._rows.cancel(message["id"])
                case "pace":
                    self._rest = message["rest"]
                case "resize":
                    threading.Thread(target=self._resize, args=(message,), daemon=True).start()
                case "abort" if self._change:
                    args = (self._change, "the front end gave it up")
                    threading.Thread(target=self._group.abort, args=args, daemon=True).start()

    def _messages(self, timeout_s: float | None) -> Iterator[dict[str, Any]]:
        while True:
            try:
                yield self._inbox.get(timeout_s is not None, timeout_s)
            except queue.Empty:
                return
            timeout_s = None

    def _resize(self, message: dict[str, Any]) -> None:
        try:
            self._change = self._group.prepare(message["members"], deadline_s=message["deadline_s"])
            self._group.commit(self._change)
            self._send(event="resized", error="")
        except Exception as error:  # whatever it is: the front end waits for an answer
            self._send(event="resized", error=f"{type(error).__name__}: {error}")

    def _on_switch(self, switch: Any) -> None:
        self._send(
            event="switch",
            epoch=switch.epoch,
            members=switch.members,
            lost=switch.lost,
            change=switch.change,
            blocked_ms=1e3 * switch.blocked_s,
            at=time.monotonic(),
        )

    def _count_compilation(self, event: str, seconds: float, **_: Any) -> None:
        self._compilations += event == _COMPILED

    # --- Lines. Written by a thread of their own: a front end that is slow to read must not hold up a step. ---

    def _send(self, **message: Any) -> None:
        self._outbox.put(message)

    def _write(self, out: BinaryIO) -> None:
        while (message := self._outbox.get()) is not None:
            out.write(json.dumps(message).encode() + b"\n")
            out.flush()

    def _read(self, lines: int) -> None:
        # No buffered reader: a thread that waits in one keeps the interpreter from ending.
        rest = b""
        while data := os.read(lines, 1 << 16):
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                self._inbox.put(json.loads(line))
        os._exit(0)  # the front end is gone; nothing here needs an orderly end


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not for the front end
    Worker(0, out).run()


if __name__ == "__main__":
    main()
