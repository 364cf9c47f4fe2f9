"""Runs an elastic plan file of NIXL-EP on this machine, and checks every row.

    python -m jax_nixlep.plan PLAN.json

A plan is a JSON list of phases, each a list of rank ids. A negative id takes part in its phase and is killed (SIGKILL,
in the middle of a call) at its end; a rank that a phase does not list leaves before it, and may come back. Every rank
is a process. In each phase every member compares every row it gets from dispatch, and every token from combine, with
numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_nixlep.store import Store, connect
from jax_nixlep.store.tcp import StoreServer

_PREFIX = "plan/"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 if every phase was right."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_nixlep.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--steps", type=int, default=20, help="steps that every member checks in every phase")
    parser.add_argument("--experts-per-rank", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="tokens that each rank brings to a step")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument(
        "--detect", type=float, default=2.0, metavar="SECONDS", help="how long a rank waits for another"
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for each phase")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    plan = json.loads(args.plan.read_text())
    check_plan(plan)
    if args.worker:
        _Worker(args, plan, json.loads(args.worker)).run()
        return 0
    return _Conductor(args, plan).run()


def check_plan(plan: Any) -> None:
    """
    Raises:
      ValueError: not a plan; says where.
    """
    if not isinstance(plan, list) or not plan:
        raise ValueError(f"plan: must be a list of phases; got {plan!r}; see python -m jax_nixlep.plan --help")
    for i, phase in enumerate(plan):
        whole = isinstance(phase, list) and phase and all(isinstance(r, int) for r in phase)
        if not whole or len({abs(r) for r in phase}) != len(phase):
            raise ValueError(f"plan: phase {i} must be a list of distinct rank ids; got {phase!r}; correct it")
        if all(r < 0 for r in phase):
            raise ValueError(f"plan: phase {i} must leave a survivor; got {phase!r}; make an id positive")
        if i and not ({abs(r) for r in phase} & {r for r in plan[i - 1] if r >= 0}):
            raise ValueError(f"plan: phase {i} must keep a member of the phase before; got {phase!r}; correct it")


class _Conductor:
    """Starts and tells the ranks. It is no rank itself."""

    def __init__(self, args: argparse.Namespace, plan: list[list[int]]):
        self._args, self._plan = args, plan
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._commands = 0

    def run(self) -> int:
        with StoreServer() as server, connect(server.url) as store:
            try:
                for i in range(len(self._plan)):
                    self._phase(i, server.url, store)
                self._tell(store, self._survivors(-1)[0], "end")
                self._expect_exit(self._survivors(-1), 0)
            finally:
                for process in self._processes.values():
                    process.kill()
                    process.wait()
        print(f"all {len(self._plan)} phases right")
        return 0

    def _survivors(self, i: int) -> list[int]:
        return sorted(r for r in self._plan[i] if r >= 0)

    def _phase(self, i: int, url: str, store: Store) -> None:
        members = sorted(abs(r) for r in self._plan[i])
        killed = sorted(-r for r in self._plan[i] if r < 0)
        began = time.monotonic()
        store.delete(f"{_PREFIX}right/")
        for rank in members:
            if rank not in self._processes:
                self._start(rank, url, first=i == 0)
        left: list[int] = []
        if i:
            before = self._survivors(i - 1)
            left = [r for r in before if r not in members]
            if before != members:
                self._tell(store, next(r for r in before if r in self._survivors(i)), "resize", members)
        self._wait_right(i, store, members)
        print(f"phase {i}: ranks {members} right after {time.monotonic() - began:.1f} s", flush=True)
        self._expect_exit(left, 0)
        if killed:
            began = time.monotonic()
            for rank in killed:
                self._tell(store, rank, "die")
            self._expect_exit(killed, -signal.SIGKILL)
            self._wait_right(i, store, self._survivors(i))
            survivors = self._survivors(i)
            print(
                f"phase {i}: killed {killed}; ranks {survivors} right after {time.monotonic() - began:.1f} s",
                flush=True,
            )

    def _start(self, rank: int, url: str, *, first: bool) -> None:
        who = json.dumps({"rank": rank, "store": url, "first": first})
        command = [sys.executable, "-m", "jax_nixlep.plan", *sys.argv[1:], "--worker", who]
        env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", **os.environ}
        self._processes[rank] = subprocess.Popen(command, env=env)

    def _tell(self, store: Store, rank: int, what: str, members: Sequence[int] = ()) -> None:
        self._commands += 1
        command = {"number": self._commands, "do": what, "members": list(members)}
        store.put(f"{_PREFIX}to/{rank}", json.dumps(command).encode())

    def _wait_right(self, i: int, store: Store, members: list[int]) -> None:
        keys = [f"{_PREFIX}right/{'-'.join(map(str, members))}/{r}" for r in members]
        end = time.monotonic() + self._args.timeout
        while True:
            try:
                store.wait(keys, 0.5)
                return
            except TimeoutError as error:
                broken = {r: p.returncode for r, p in self._processes.items() if r in members and p.poll() is not None}
                if broken or time.monotonic() > end:
                    raise RuntimeError(
                        f"plan: phase {i} with ranks {members} must complete within {self._args.timeout:g} s; got "
                        f"{f'ranks that ended (rank: status) {broken}' if broken else error}; see their output"
                    ) from None

    def _expect_exit(self, ranks: list[int], status: int) -> None:
        for rank in ranks:
            got = self._processes.pop(rank).wait(self._args.timeout)
            if got != status:
                raise RuntimeError(f"plan: rank {rank} must end with status {status}; got {got}; see its output")


class _Worker:
    """A rank: serves, checks, and does what it is told."""

    def __init__(self, args: argparse.Namespace, plan: list[list[int]], who: dict[str, Any]):
        import jax.numpy as jnp

        from jax_nixlep.config import EpConfig

        self._args, self._rank, self._first = args, int(who["rank"]), who["first"]
        self._url = who["store"]
        self._members = sorted(abs(r) for r in plan[0])
        fewest = min(sum(r >= 0 for r in phase) for phase in plan)
        self._experts = fewest * args.experts_per_rank
        self._config = EpConfig(
            max_ranks=max(abs(r) for phase in plan for r in phase) + 1,
            experts_per_rank=args.experts_per_rank,
            max_tokens_per_rank=args.tokens,
            hidden=args.hidden,
            top_k=min(args.top_k, self._experts),
            dtype=jnp.float32,
        )
        self._die = self._end = False

    def run(self) -> None:
        import jax

        import jax_nixlep as nx

        options: dict[str, Any] = {"members": self._members, "elastic": True} if self._first else {"join": True}
        self._group = group = nx.initialize(
            self._config,
            rank=self._rank,
            store=self._url,
            num_experts=self._experts,
            timeout_s=self._args.detect,
            restore=lambda ids: {"gain": self._gain(np.array(ids))},
            **options,
        )
        row = slice(self._rank * self._config.experts_per_rank, (self._rank + 1) * self._config.experts_per_rank)
        if self._first:
            group.load({"gain": self._gain(group.elastic.table[row])})
        self._program = self._make_program()
        jax.block_until_ready(self._program(*self._batch(self._rank, 0, 0), group.experts, group.placement))
        store = connect(self._url)
        threading.Thread(target=self._obey, args=(store,), daemon=True).start()
        epoch, right = 0, 0
        while not self._end:
            try:
                result, where = group.run(self._step)
            except nx.ElasticError:
                if group.members:
                    raise
                break  # left
            self._check(result, *where)
            epoch, right = group.epoch, 1 if group.epoch != epoch else right + 1
            if right % self._args.steps == 0:
                store.put(f"{_PREFIX}right/{'-'.join(map(str, group.members))}/{self._rank}", b"1")
        nx.shutdown()

    def _obey(self, store: Store) -> None:
        done = 0
        while not self._end:
            command = json.loads(store.get(f"{_PREFIX}to/{self._rank}") or b'{"number": 0}')
            if command["number"] > done:
                done = command["number"]
                if command["do"] == "die":
                    self._die = True
                elif command["do"] == "resize":
                    self._group.resize(command["members"])
                else:  # all leave at one step, whether or not one rank could serve all experts
                    table = self._group.elastic.table
                    mine = np.arange(len(table)) // self._config.experts_per_rank == self._rank
                    self._group.resize([self._rank], table=np.where(mine, table, -1))
                    self._end = True
            time.sleep(0.02)

    # --- One step. ---

    def _gain(self, experts: np.ndarray) -> np.ndarray:
        """The weights of logical experts: small integers, so that sums are exact in any order."""
        return np.where(experts < 0, 0, experts + 1).astype(np.float32)

    def _batch(self, rank: int, epoch: int, boundary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `rank` brings to a step; every rank can make it."""
        rng, config = np.random.default_rng([rank, epoch, boundary]), self._config
        tokens = int(rng.integers(0, config.max_tokens_per_rank, endpoint=True))
        shape = (config.max_tokens_per_rank, config.top_k)
        ids = np.stack([rng.permutation(self._experts)[: config.top_k] for _ in range(shape[0])]).astype(np.int32)
        ids[rng.random(shape) < 0.1] = -1
        ids[tokens:] = -1
        x = rng.integers(-99, 99, (shape[0], config.hidden)).astype(np.float32)
        return x, ids, rng.integers(1, 4, shape).astype(np.float32)

    def _make_program(self) -> Any:
        import jax
        import jax.numpy as jnp

        from jax_nixlep.combine import combine
        from jax_nixlep.dispatch import dispatch
        from jax_nixlep.placement import to_slots

        config = self._config

        @jax.jit
        def program(x, ids, weights, experts, placement):
            received = dispatch(x, to_slots(placement, ids), weights, config=config)
            row = jnp.arange(config.num_rows)
            local = jnp.searchsorted(jnp.cumsum(received.group_sizes), row, side="right")
            gain = experts["gain"][jnp.minimum(local, config.experts_per_rank - 1)]
            out = received.tokens * gain[:, None]
            return received.tokens, received.group_sizes, combine(out, received.handle, config=config)

        return program

    def _step(self) -> tuple[Any, tuple[int, int, tuple[int, ...], Any]]:
        group = self._group
        epoch, boundary = group.epoch, group.elastic.boundary
        if self._die:  # somewhere in the call
            delay = float(np.random.default_rng().uniform(0, 2e-3))
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        batch = self._batch(self._rank, epoch, boundary)
        result = self._program(*batch, group.experts, group.placement)
        return result, (epoch, boundary, group.members, group.placement)

    def _check(self, result: Any, epoch: int, boundary: int, members: tuple[int, ...], placement: Any) -> None:
        """Every row against numpy.

        Raises:
          AssertionError: a row is wrong.
        """
        tokens, sizes, y = map(np.asarray, result)
        slots, counts = np.asarray(placement.slots), np.asarray(placement.counts)
        per_rank = self._config.experts_per_rank
        rows: list[list[np.ndarray]] = [[] for _ in range(per_rank)]
        for rank in members:
            x, ids, weights = self._batch(rank, epoch, boundary)
            turn = np.arange(len(ids))[:, None] % np.maximum(counts[ids], 1)
            slot = np.where((ids >= 0) & (counts[ids] > 0), slots[ids, turn], -1)
            for local in range(per_rank):
                rows[local] += list(x[(slot == self._rank * per_rank + local).any(1)])
            if rank == self._rank:
                gain = np.where(slot < 0, 0, self._gain(ids))
                np.testing.assert_array_equal(y, (weights * gain).sum(1, keepdims=True) * x)
        np.testing.assert_array_equal(sizes, [len(r) for r in rows])
        expected = np.zeros_like(tokens)
        flat = [row for local in rows for row in local]
        expected[: len(flat)] = flat if flat else 0
        np.testing.assert_array_equal(tokens, expected)


if __name__ == "__main__":
    sys.exit(main())
