"""Ranks of an elastic group as processes of this machine, for programs that put the group to the test: each checks
every row that it gets against numpy, and does what it is told.

`Crew` starts, tells and kills; a rank is `python -m jax_nixlep.crew SETTINGS`.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from jax_nixlep import launch
from jax_nixlep.store import Store, StoreError, connect
from jax_nixlep.store.tcp import StoreServer

_PREFIX = "crew/"
_REPORT_S = 0.02


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all ranks of a crew have in common.

    Attributes:
      detect_s: how long a rank waits for another (`timeout_s` of the group).
      bulk: float32 values of each expert's weights, and of the dense weights.
      rejoins: a rank that is out waits to be taken in again; otherwise it ends.
    """

    max_ranks: int
    num_experts: int
    experts_per_rank: int = 4
    tokens: int = 16
    hidden: int = 64
    top_k: int = 2
    detect_s: float = 2.0
    join_s: float = 120.0
    bulk: int = 0
    move_bytes_per_s: float | None = None
    rejoins: bool = False


# What a rank can be told. `die` takes "at": "now", "call" (in the middle of one), "prepare", "sending" (its weights are
# being read) or "commit" (of the change that runs or comes), and "delay_s" after that.
Command = dict[str, Any]


class CrewError(RuntimeError):
    """A rank did something wrong, or nothing."""


class Crew:
    """Starts ranks and tells them what to do. It is no rank itself."""

    def __init__(self, settings: Settings, *, timeout_s: float, env: dict[str, str] | None = None):
        """`timeout_s`: for whatever is waited for."""
        self.settings, self._timeout_s, self._env = settings, timeout_s, env or {}
        self._server = StoreServer()
        self.store: Store = connect(self._server.url)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._expected: set[int] = set()  # ranks that are to end
        self._commands = 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        self.store.close()
        self._server.close()

    @property
    def running(self) -> set[int]:
        return set(self._processes)

    def start(self, rank: int, members: Sequence[int] | None = None) -> None:
        """As one of the first `members`, or as a newcomer."""
        self.store.delete(f"{_PREFIX}now/{rank}")
        self.store.delete(f"{_PREFIX}to/{rank}")
        who = {"rank": rank, "store": self._server.url, "members": members, **dataclasses.asdict(self.settings)}
        env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", **os.environ, **self._env}
        command = launch.with_parent([sys.executable, "-m", "jax_nixlep.crew", json.dumps(who)])
        self._processes[rank] = subprocess.Popen(command, env=env)

    def tell(self, rank: int, **command: Any) -> int:
        """Returns the number under which `answer` knows the command."""
        self._commands += 1
        command["number"] = self._commands
        if command["do"] in ("die", "end"):
            self._expected.add(rank)
        self.store.put(f"{_PREFIX}to/{rank}", json.dumps(command).encode())
        return self._commands

    def answer(self, number: int) -> str | None:
        """What went wrong with a command, "" for nothing; None if it has not ended."""
        value = self.store.get(f"{_PREFIX}answer/{number}")
        return None if value is None else value.decode()

    def reports(self) -> dict[int, dict[str, Any]]:
        """What each running rank said last: "epoch", "members", "right" (steps right in this epoch), "steps" (right in
        all), "compiled"."""
        return {r: v for r, v in self._scan("now").items() if r in self._processes}

    def switches(self, epoch: int) -> dict[int, dict[str, Any]]:
        """What each rank said about its first right step of an epoch: "right_at" (time.monotonic()), "blocked_s", and
        how many "epochs" there were since its step before, with whom they "lost"."""
        return self._scan(f"first/{epoch}")

    def died(self, rank: int) -> float:
        """time.monotonic() when a rank that was told to die did so last."""
        return self._scan("died")[rank]

    def measure(self, rank: int) -> dict[str, int]:
        """What the process of a rank uses: "rss_bytes", "descriptors", "threads", "regions" and "compiled"."""
        number = self.tell(rank, do="measure")
        self.wait(lambda: self.answer(number) is not None, f"rank {rank} to measure")
        return self._scan("measured")[rank]

    def wait_right(self, members: Collection[int], steps: int) -> int:
        """Until each of `members`, and nobody else, is a member and has done `steps` right; returns the epoch."""
        wanted = sorted(members)
        epochs: list[int] = []

        def done() -> bool:
            epochs[:] = [r["epoch"] for r in self.reports().values() if r["members"] == wanted and r["right"] >= steps]
            return len(epochs) == len(wanted) and len(set(epochs)) == 1

        self.wait(done, f"ranks {wanted} to do {steps} steps right")
        return epochs[0]

    def wait_settled(self, steps: int, *, after: int = 0, dead: Collection[int] = ()) -> tuple[int, list[int]]:
        """Until running ranks agree who is a member, in an epoch later than `after` and without the `dead`, and have
        done `steps` right; returns epoch and members."""
        found: list[tuple[int, list[int]]] = []

        def done() -> bool:
            reports = self.reports()
            newest = max((r["epoch"] for r in reports.values()), default=0)
            members: list[int] = next((r["members"] for r in reports.values() if r["epoch"] == newest), [])
            agree = [r for r in members if r in reports and reports[r]["epoch"] == newest]
            found[:] = [(newest, members)]
            right = agree == members and all(reports[r]["right"] >= steps for r in members)
            return right and newest > after and not set(dead) & set(members)

        self.wait(done, f"the survivors to do {steps} steps right")
        return found[0]

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """
        Raises:
          CrewError: it takes too long, or a rank ended that was not told to.
        """
        end = time.monotonic() + self._timeout_s
        while not done():
            self.reap()
            if time.monotonic() > end:
                for process in self._processes.values():
                    process.send_signal(signal.SIGUSR1)  # prints where its threads are
                time.sleep(1)
                raise CrewError(
                    f"crew: waiting for {what} must end within {self._timeout_s:g} s; got {self.reports()}; see the "
                    "output of the ranks"
                )
            time.sleep(0.01)

    def reap(self) -> None:
        """Forgets ranks that ended as they were told.

        Raises:
          CrewError: another one ended.
        """
        for rank in [r for r, p in self._processes.items() if p.poll() is not None]:
            status = self._processes[rank].returncode
            wanted = (0, -signal.SIGKILL) if rank in self._expected else ()
            if status not in wanted and not (status == 0 and not self.settings.rejoins):
                raise CrewError(f"crew: rank {rank} must go on; got exit status {status}; see its output")
            del self._processes[rank]
            self._expected.discard(rank)

    def wait_gone(self, ranks: Iterable[int]) -> None:
        wanted = set(ranks)
        self.wait(lambda: not wanted & self.running, f"ranks {sorted(wanted)} to end")  # which reaps

    def _scan(self, what: str) -> dict[int, Any]:
        prefix = f"{_PREFIX}{what}/"
        return {int(key[len(prefix) :]): json.loads(value) for key, value in self.store.scan(prefix).items()}


class _Rank:
    """One process of a crew."""

    def __init__(self, who: dict[str, Any]):
        self._rank, self._url, self._members = int(who.pop("rank")), who.pop("store"), who.pop("members")
        self._settings = settings = Settings(**who)
        self._die = self._end = False
        self._store = connect(self._url)
        self._group: Any = None
        self._program: Any = None

        import jax.numpy as jnp

        from jax_nixlep.config import EpConfig

        self._config = EpConfig(
            max_ranks=settings.max_ranks,
            experts_per_rank=settings.experts_per_rank,
            max_tokens_per_rank=settings.tokens,
            hidden=settings.hidden,
            top_k=settings.top_k,
            dtype=jnp.float32,
        )

    def run(self) -> None:
        import jax

        import jax_nixlep as nx

        settings, first = self._settings, self._members is not None
        options: dict[str, Any] = {"members": self._members, "elastic": True} if first else {"join": True}
        self._right = self._epoch = self._steps = 0
        self._say(0, [])
        for thread in (self._report, self._obey):
            threading.Thread(target=thread, daemon=True).start()
        self._group = group = nx.initialize(
            self._config,
            rank=self._rank,
            store=self._url,
            num_experts=settings.num_experts,
            timeout_s=settings.detect_s,
            init_timeout_s=settings.join_s,
            restore=lambda ids: self._experts(np.array(ids)),
            move_bytes_per_s=settings.move_bytes_per_s,
            **options,
        )
        if first:
            group.load(self._experts(self._row(group.table)), self._dense())
        self._program = _make_program(self._config)
        jax.block_until_ready(self._program(*self._batch(self._rank, 0, 0), group.experts, group.placement))
        while not self._end:
            try:
                result, where = group.run(self._step)
            except nx.ElasticError:
                if group.members:
                    raise
                self._say(0, [])
                if not settings.rejoins or self._end:
                    break
                group.rejoin()
                continue
            self._check(result, *where)
            self._note_right()
        nx.shutdown()

    def _note_right(self) -> None:
        group = self._group
        self._steps += 1
        self._right = self._right + 1 if group.epoch == self._epoch else 1
        if group.epoch != self._epoch:
            new = [switch for switch in group.elastic.history if switch.epoch > self._epoch]
            self._epoch = group.epoch
            said = {"right_at": time.monotonic(), "blocked_s": new[-1].blocked_s, "epochs": len(new)}
            self._put(f"first/{self._epoch}/{self._rank}", said | {"lost": [r for switch in new for r in switch.lost]})
        self._say(self._epoch, group.members)

    def _say(self, epoch: int, members: Sequence[int]) -> None:
        right, compiled = self._right if epoch else 0, self._program._cache_size() if self._program else 0
        self._now = {"epoch": epoch, "members": members, "right": right, "steps": self._steps, "compiled": compiled}

    def _put(self, key: str, value: Any) -> None:
        self._store.put(_PREFIX + key, json.dumps(value).encode())

    def _report(self) -> None:
        said: dict[str, Any] = {}
        while True:
            now = self._now
            if now is not said:
                said = now
                self._put(f"now/{self._rank}", now)
            time.sleep(_REPORT_S)

    # --- What it is told. ---

    def _obey(self) -> None:
        done = 0
        while not self._end:
            command = json.loads(self._store.get(f"{_PREFIX}to/{self._rank}") or b'{"number": 0}')
            if command["number"] > done:
                done = command["number"]
                threading.Thread(target=self._do, args=(command,), daemon=True).start()
            time.sleep(0.01)

    def _do(self, command: Command) -> None:
        error = ""
        try:
            getattr(self, f"_do_{command['do']}")(command)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        self._store.put(f"{_PREFIX}answer/{command['number']}", error.encode())

    def _do_resize(self, command: Command) -> None:
        self._group.resize(command["members"], deadline_s=command.get("deadline_s", 60.0))

    def _do_end(self, command: Command) -> None:
        """All leave at one step, whether or not this rank could serve all experts."""
        del command
        table = self._group.table
        mine = np.arange(len(table)) // self._config.experts_per_rank == self._rank
        self._group.resize([self._rank], table=np.where(mine, table, -1))
        self._end = True

    def _do_measure(self, command: Command) -> None:
        del command
        gc.collect()
        links = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                continue  # the one that lists
        with open("/proc/self/statm") as file:
            rss = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
        used = {"rss_bytes": rss, "descriptors": len(links), "threads": len(os.listdir("/proc/self/task"))}
        used["regions"] = sum("memfd:jax_nixlep" in link for link in links)
        self._put(f"measured/{self._rank}", used | {"compiled": self._program._cache_size()})

    def _do_die(self, command: Command) -> None:
        from jax_nixlep.elastic.preparation import CHANGES

        at, delay_s = command["at"], command["delay_s"]
        if at == "call":
            self._delay_s, self._die = delay_s, True
            return
        seen, end = False, time.monotonic() + 10
        while at != "now" and time.monotonic() < end:
            time.sleep(0.0005)
            if self._group is None:  # it joins
                if any(key.endswith(f"/hello/{self._rank}") for key in self._store.scan(CHANGES)):
                    break
                continue
            phase = self._group.elastic.phase
            if seen and not phase:
                break  # missed; it dies all the same
            seen = seen or bool(phase)
            if phase == at or (at == "commit" and phase == "switch"):
                break
            if at == "sending" and any(key.endswith(f"/weights/{self._rank}") for key in self._store.scan(CHANGES)):
                break
        time.sleep(delay_s)
        self._kill_self()

    def _kill_self(self) -> None:
        self._put(f"died/{self._rank}", time.monotonic())  # before: when a process has ended shows late
        os.kill(os.getpid(), signal.SIGKILL)

    # --- One step. ---

    def _row(self, table: np.ndarray) -> np.ndarray:
        return table[self._rank * self._config.experts_per_rank :][: self._config.experts_per_rank]

    def _experts(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The weights of logical experts: small integers, so that sums are exact in any order."""
        gain = np.where(ids < 0, 0, ids + 1).astype(np.float32)
        return {"gain": gain, "bulk": gain[:, None] * np.ones(self._settings.bulk, np.float32)}

    def _dense(self) -> dict[str, np.ndarray]:
        return {"bulk": np.arange(self._settings.bulk, dtype=np.float32)}

    def _batch(self, rank: int, epoch: int, boundary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `rank` brings to a step; every rank can make it."""
        rng, config = np.random.default_rng([rank, epoch, boundary]), self._config
        tokens = int(rng.integers(0, config.max_tokens_per_rank, endpoint=True))
        shape = (config.max_tokens_per_rank, config.top_k)
        ids = np.argsort(rng.random((shape[0], self._settings.num_experts)), axis=1)[:, : config.top_k].astype(np.int32)
        ids[rng.random(shape) < 0.1] = -1
        ids[tokens:] = -1
        x = rng.integers(-99, 99, (shape[0], config.hidden)).astype(np.float32)
        return x, ids, rng.integers(1, 4, shape).astype(np.float32)

    def _step(self) -> tuple[Any, tuple[int, int, tuple[int, ...], Any]]:
        group = self._group
        epoch, boundary = group.epoch, group.elastic.boundary
        if self._die:  # somewhere in the call
            threading.Timer(self._delay_s, self._kill_self).start()
        if epoch != self._epoch:
            self._check_weights()
        batch = self._batch(self._rank, epoch, boundary)
        result = self._program(*batch, group.experts, group.placement)
        return result, (epoch, boundary, group.members, group.placement)

    def _check_weights(self) -> None:
        """The weights that came with an epoch.

        Raises:
          AssertionError: not those of the experts of its table.
        """
        placement, group = self._group.placement, self._group
        mine = np.full(self._config.num_slots, -1)
        for expert, count in enumerate(np.asarray(placement.counts)):
            mine[np.asarray(placement.slots)[expert, :count]] = expert
        served = self._row(mine) >= 0
        for name, wanted in self._experts(self._row(mine)).items():
            np.testing.assert_array_equal(np.asarray(group.experts[name])[served], wanted[served], name)
        np.testing.assert_array_equal(np.asarray(group.dense["bulk"]), self._dense()["bulk"])

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
                gain = np.where(slot < 0, 0, np.where(ids < 0, 0, ids + 1))
                np.testing.assert_array_equal(y, (weights * gain).sum(1, keepdims=True) * x)
        np.testing.assert_array_equal(sizes, [len(r) for r in rows])
        expected = np.zeros_like(tokens)
        flat = [row for local in rows for row in local]
        expected[: len(flat)] = flat if flat else 0
        np.testing.assert_array_equal(tokens, expected)


def _make_program(config: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from jax_nixlep.combine import combine
    from jax_nixlep.dispatch import dispatch
    from jax_nixlep.placement import to_slots

    @jax.jit
    def program(x, ids, weights, experts, placement):
        received = dispatch(x, to_slots(placement, ids), weights, config=config)
        row = jnp.arange(config.num_rows)
        local = jnp.searchsorted(jnp.cumsum(received.group_sizes), row, side="right")
        gain = experts["gain"][jnp.minimum(local, config.experts_per_rank - 1)]
        out = received.tokens * gain[:, None]
        return received.tokens, received.group_sizes, combine(out, received.handle, config=config)

    return program


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    try:
        _Rank(json.loads(sys.argv[1])).run()
    except StoreError:
        raise SystemExit(3) from None  # the crew is gone
