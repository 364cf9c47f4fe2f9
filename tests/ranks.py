"""Processes that are ranks of a test: each runs functions of the test modules, named by the test process.

Imports no jax: the test process must stay free to choose its own devices.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from jax_nixlep import launch
from jax_nixlep.store.tcp import StoreServer


def child_env(**changes: str) -> dict[str, str]:
    """The environment of a program started by a test: the user's, without what is meant for the test process."""
    ours = ("XLA_FLAGS", "NPROC", "JAX_NIXLEP_P2P", "JAX_COMPILATION_CACHE_DIR")
    return {name: value for name, value in os.environ.items() if name not in ours} | {"JAX_PLATFORMS": "cpu"} | changes


class RankError(AssertionError):
    """A rank raised; carries its traceback. `errors` maps each failing rank to "Type: message", `results` the others to
    what they returned."""

    def __init__(self, errors: dict[int, str], tracebacks: dict[int, str], results: dict[int, Any] | None = None):
        super().__init__("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in tracebacks.items()))
        self.errors = errors
        self.results = results or {}


class RankPool:
    """`num_ranks` processes and a store. `run` calls one function on each and collects what they return."""

    def __init__(self, num_ranks: int, env: dict[str, str] | None = None):
        context = multiprocessing.get_context("spawn")
        self.num_ranks = num_ranks
        self._server = StoreServer()
        self._pipes, self._processes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, num_ranks, self._server.url, list(sys.path))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            with _environment(rank, num_ranks, env or {}):
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable, *args: Any, timeout_s: float = 90, only: list[int] | None = None, **kwargs: Any):
        """function(job, *args, **kwargs) on every rank (or `only` some); returns their results, by rank.

        Raises:
          RankError: some rank raised, died or did not answer in time; the pool is closed in the last two cases.
        """
        ranks = list(range(self.num_ranks)) if only is None else only
        for rank in ranks:
            self._pipes[rank].send((function.__module__, function.__name__, args, kwargs))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        tracebacks: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        for rank in ranks:
            try:
                if not self._pipes[rank].poll(max(0, deadline - time.monotonic())):
                    errors[rank] = tracebacks[rank] = f"did not answer within {timeout_s} s"
                    continue
                ok, value = self._pipes[rank].recv()
            except (EOFError, ConnectionError):
                self._processes[rank].join(5)
                errors[rank] = tracebacks[rank] = f"died with exit code {self._processes[rank].exitcode}"
                continue
            if ok:
                results[rank] = value
            else:
                errors[rank], tracebacks[rank] = value
        if any(text.startswith(("did not", "died")) for text in errors.values()):
            self.close()
        if errors:
            raise RankError(errors, tracebacks, results)
        return [results[rank] for rank in ranks]

    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:  # each has shut its group down, if it answered: there is nothing to wait for
            process.kill()
        for process in self._processes:
            process.join(3)
        self._server.close()


def transport_env(transport: str) -> dict[str, str]:
    """What makes ranks of one machine use "shared" memory, or "nixl"."""
    return {"JAX_NIXLEP_P2P": "0" if transport == "nixl" else "1"}


def run_to_deaths(
    function: Callable, *args: Any, num_ranks: int, dead: set[int], env: dict[str, str] | None = None
) -> dict:
    """`function` on processes of its own, of which just the `dead` kill themselves; what the others returned."""
    pool = RankPool(num_ranks, env)
    try:
        pool.run(function, *args, timeout_s=60)
    except RankError as error:
        assert set(error.errors) == dead and all("exit code -9" in text for text in error.errors.values()), error
        return error.results
    finally:
        pool.close()
    raise AssertionError(f"ranks {sorted(dead)} live")


class Job:
    """What a rank function is told."""

    def __init__(self, rank: int, num_ranks: int, store: str):
        self.rank, self.num_ranks, self.store = rank, num_ranks, store

    def initialize(self, config, **options):
        """`jax_nixlep.initialize` for this rank; members default to all ranks of the pool."""
        import jax_nixlep

        options = {"rank": self.rank, "members": range(self.num_ranks), "store": self.store, "timeout_s": 20} | options
        return jax_nixlep.initialize(config, **options)


@contextlib.contextmanager
def _environment(rank: int, num_ranks: int, env: dict[str, str]) -> Iterator[None]:
    """That of a process that is started now: it reads its own before it can be told anything, as jax is imported."""
    before = dict(os.environ)
    os.environ.pop("NPROC", None)
    os.environ.update({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"} | env)
    if num_gpus := int(env.get("JAX_NIXLEP_TEST_GPUS", 0)):
        os.environ.update(launch.gpu_env(rank, num_ranks, num_gpus))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe, rank: int, num_ranks: int, store: str, path: list[str]) -> None:
    sys.path[:] = path
    job = Job(rank, num_ranks, store)
    while True:
        try:
            module, name, args, kwargs = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = (True, getattr(importlib.import_module(module), name)(job, *args, **kwargs))
        except BaseException as error:
            answer = (False, (f"{type(error).__name__}: {error}", traceback.format_exc()))
        if "jax_nixlep" in sys.modules:
            sys.modules["jax_nixlep"].shutdown()
        pipe.send(answer)


def without_job(_job: Job, module: str, name: str, args: tuple, kwargs: dict) -> None:
    """For functions that make their own group, of a mesh."""
    getattr(importlib.import_module(module), name)(*args, **kwargs)
