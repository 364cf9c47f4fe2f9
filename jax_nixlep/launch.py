"""Start the ranks of a job on this machine: `python -m jax_nixlep.launch -n 4 script.py args...`.

The launcher hosts the rendezvous store, so that the death of any rank leaves it standing, and tells each rank its place
through the environment (see `rank_env` and, with `--gpus`, `gpu_env`). It prints what the ranks print, line by line
behind "[rank] ". When a rank fails it stops the others and says which failed first and why. No rank outlives it, even
if it is killed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import math
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from jax_nixlep.rank_env import RankEnv as RankEnv
from jax_nixlep.rank_env import rank_env as rank_env
from jax_nixlep.store import SECRET_VARIABLE
from jax_nixlep.store.tcp import StoreServer

TIMEOUT_STATUS = 124  # exit status of a job that ran out of time, as of timeout(1)
LAST_LINES = 20  # of a failed rank, repeated in the summary
_POLL_S = 0.1  # how late a signal or the time limit may be noticed
_LINE_END = re.compile(rb"\r?\n|\r(?=.)", re.DOTALL)  # a final \r may be half of \r\n
_MAX_LINE_BYTES = 1 << 16  # a longer line is broken
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Runs in the new process and becomes the command; the kernel kills it when the thread that started it ends, however
# that comes about. Not a preexec_fn: that would fork, in what may be a process of many threads.
_PR_SET_PDEATHSIG = 1
_DIE_WITH_PARENT = f"""
import ctypes, os, sys
failed = ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}, 0, 0, 0)
if failed or os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
_COLOURS = (36, 33, 35, 32, 34, 31)


def gpu_env(rank: int, num_ranks: int, gpus: int, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the environment of `rank` must have so that `num_ranks` ranks use the first `gpus` GPUs of this machine.

    Rank r uses GPU r % gpus, of those that CUDA_VISIBLE_DEVICES names if it is set. Ranks that share one take memory as
    they need it, instead of three quarters each, and load kernels when they start: one that is loaded late waits for a
    kernel of its own process that waits for a peer. Where CUDA's MPS lets them run at the same time, each has its part
    of the multiprocessors: a kernel that waits must leave some to the peer it waits for. What the user's environment
    says about these three stays.

    Raises:
      ValueError: CUDA_VISIBLE_DEVICES names fewer GPUs.
    """
    environ = os.environ if environ is None else environ
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    devices = list(map(str, range(gpus))) if visible is None else visible.split(",")
    if len(devices) < gpus:
        raise ValueError(
            f"gpu_env: gpus must be at most the {len(devices)} of CUDA_VISIBLE_DEVICES={visible}; got {gpus}; "
            "name more there"
        )
    env = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": devices[rank % gpus]}
    if num_ranks > gpus:
        shared = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "CUDA_MODULE_LOADING": "EAGER",
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // len(range(rank % gpus, num_ranks, gpus))),
        }
        env |= {name: environ.get(name, value) for name, value in shared.items()}
    return env


def run(
    argv: Sequence[str],
    num_ranks: int,
    *,
    gpus: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    grace_s: float = 5.0,
) -> int:
    """Run `python *argv` as `num_ranks` ranks on this machine and wait for all of them.

    A script can start its own ranks: `if rank_env() is None: sys.exit(run(sys.argv, num_ranks=4))`.

    Args:
      argv: what follows `python` on the command line: ["script.py", ...] or ["-m", "module", ...].
      num_ranks: processes to start.
      gpus: the ranks run on this machine's first so many GPUs, rank r on number r % gpus; see `gpu_env`. None: what
        they run on is for JAX and the environment to say.
      env: environment variables to set for the ranks, besides those of this process.
      timeout_s: stop the job after so long; None = no limit.
      grace_s: time between SIGTERM and SIGKILL for ranks that have to stop.

    Returns:
      0 if every rank returned 0. Else the exit status of the rank that failed first (128 + signal number if a signal
      killed it), 124 after `timeout_s`, or 128 + signal number if SIGINT, SIGTERM or SIGHUP stopped this process.
    """
    if num_ranks < 1 or not argv:
        raise ValueError(f"run: num_ranks and argv must not be empty; got {num_ranks} and {list(argv)}; name a script")
    if gpus is not None and gpus < 1:
        raise ValueError(f"run: gpus must be at least 1, or None; got {gpus}; leave it out to let JAX choose")
    secret = secrets.token_hex(32)
    with socket.create_server(("127.0.0.1", 0)) as free:
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    with StoreServer(secret=secret) as server:
        job_env = {
            **os.environ,
            "JAX_NIXLEP_NUM_RANKS": str(num_ranks),
            "JAX_NIXLEP_STORE": server.url,
            "JAX_NIXLEP_COORDINATOR": coordinator,
            SECRET_VARIABLE: secret,
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
        }
        rank_envs = [{"JAX_NIXLEP_RANK": str(rank)} for rank in range(num_ranks)]
        if gpus is not None:
            rank_envs = [mine | gpu_env(rank, num_ranks, gpus, job_env) for rank, mine in enumerate(rank_envs)]
        return _Job([sys.executable, *argv], [job_env | mine for mine in rank_envs], grace_s).run(timeout_s)


class _Output:
    """One stream of one rank: cuts it into lines and prints each behind the rank's prefix.

    A line that ends in a carriage return (a progress bar) is overwritten by the next one, as far as `stream` can.
    """

    def __init__(self, rank: int, width: int, stream: TextIO, last_lines: collections.deque[str]) -> None:
        self._stream, self._last_lines = stream, last_lines
        self._tty = stream.isatty()
        self._prefix = f"[{rank:{width}}] "
        self._colour = _COLOURS[rank % len(_COLOURS)] if self._tty and "NO_COLOR" not in os.environ else 0
        self._partial = b""
        self._transient: str | None = None  # the newest line of ours in `last_lines`, if it is to be overwritten

    def feed(self, data: bytes) -> None:
        """Print the lines that `data` completes, and on a terminal also what is there of the next."""
        data, begin = self._partial + data, 0
        for end in _LINE_END.finditer(data):
            self._line(data[begin : end.start()], final=end[0] != b"\r")
            begin = end.end()
        self._partial = data[begin:]
        if len(self._partial) > _MAX_LINE_BYTES:
            self.finish()
        elif self._tty and self._partial:
            self._print(self._partial.rstrip(b"\r").decode("utf-8", "replace"), final=False)

    def finish(self) -> None:
        """Print an unfinished line."""
        if self._partial:
            self._line(self._partial.rstrip(b"\r"), final=True)
            self._partial = b""

    def _line(self, data: bytes, *, final: bool) -> None:
        if not data and not final:
            return  # the carriage return before a progress bar
        text = data.decode("utf-8", "replace")
        if self._last_lines and self._last_lines[-1] is self._transient:
            self._last_lines.pop()
        self._last_lines.append(text)
        self._transient = None if final else text
        self._print(text, final=final)

    def _print(self, text: str, *, final: bool) -> None:
        prefix, end = self._prefix, "\n"
        if self._tty:
            if not final:  # a line that wraps cannot be overwritten
                text = text[: max(shutil.get_terminal_size().columns - len(prefix) - 1, 0)]
            end = "\x1b[K\n" if final else "\x1b[K\r"
            if self._colour:
                prefix = f"\x1b[{self._colour}m{prefix}\x1b[0m"
        encoding = self._stream.encoding or "utf-8"
        self._stream.write((prefix + text + end).encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def with_parent(command: Sequence[str]) -> list[str]:
    """`command`, of an absolute program, as a child of the calling thread that is killed when that ends."""
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


class _Job:
    """The ranks of one `run`, watched by one thread."""

    def __init__(self, command: Sequence[str], envs: Sequence[Mapping[str, str]], grace_s: float) -> None:
        self._command, self._num_ranks, self._envs, self._grace_s = command, len(envs), envs, grace_s
        self._selector = selectors.DefaultSelector()  # its data are the functions to call
        self._live: dict[int, subprocess.Popen[bytes]] = {}  # not yet waited for: their ids are still theirs
        self._outputs: dict[int, list[tuple[int, _Output]]] = {}
        self._last_lines = [collections.deque[str](maxlen=LAST_LINES) for _ in envs]
        self._kill_at: float | None = None  # set once the job has to stop
        self._signal = 0
        self._status = 0
        self._summary: list[str] = []

    def run(self, timeout_s: float | None) -> int:
        previous = {}
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        try:
            for rank in range(self._num_ranks):
                self._start(rank)
            while self._live:
                for key, _ in self._selector.select(_POLL_S):
                    if key.fileobj in self._selector.get_map():  # else closed by the exit just before it
                        key.data()
                if self._kill_at is None and self._signal:
                    self._stop(128 + self._signal, [f"stopped by {signal.Signals(self._signal).name}"])
                if self._kill_at is None and time.monotonic() >= deadline:
                    self._stop(TIMEOUT_STATUS, self._timeout_summary(timeout_s))
                if self._kill_at is not None and time.monotonic() >= self._kill_at:
                    self._signal_all(signal.SIGKILL)
        finally:
            self._signal_all(signal.SIGKILL)
            for process in self._live.values():
                with process:  # closes the pipes
                    process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._selector.close()
        for line in self._summary:
            print(f"launch: {line}", file=sys.stderr, flush=True)
        return self._status

    def _start(self, rank: int) -> None:
        process = self._live[rank] = subprocess.Popen(
            with_parent(self._command),
            env=self._envs[rank],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C is for the launcher; it stops a rank's children with the rank
        )
        self._outputs[rank] = []
        for pipe, stream in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            output = _Output(rank, len(str(self._num_ranks - 1)), stream, self._last_lines[rank])
            self._outputs[rank].append((pipe.fileno(), output))
            self._selector.register(
                pipe, selectors.EVENT_READ, functools.partial(self._on_output, pipe.fileno(), output)
            )
        # The kernel queues exits in the order in which they happen: the first one seen is the first.
        exited = os.pidfd_open(process.pid)
        self._selector.register(exited, selectors.EVENT_READ, functools.partial(self._on_exit, rank, exited))

    def _on_output(self, pipe: int, output: _Output) -> bool:
        """Print what `pipe` holds; returns whether there was anything."""
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return False
        if data:
            output.feed(data)
        elif pipe in self._selector.get_map():
            self._selector.unregister(pipe)
        return bool(data)

    def _on_exit(self, rank: int, exited: int) -> None:
        self._selector.unregister(exited)
        os.close(exited)
        process = self._live[rank]
        _signal_group(process, signal.SIGKILL)  # the children it left behind
        for pipe, output in self._outputs.pop(rank):
            for _ in range(16):  # more than a pipe holds, and bounded if a stranger keeps writing to it
                if not self._on_output(pipe, output):
                    break
            output.finish()
            if pipe in self._selector.get_map():
                self._selector.unregister(pipe)
        with process:  # closes the pipes
            status = process.wait()
        del self._live[rank]
        if status != 0 and self._kill_at is None:
            cause = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            summary = [f"rank {rank} of {self._num_ranks} failed first: {cause}"]
            if self._live:
                summary[0] += f"; stopped the others ({_names(self._live)})"
            self._stop(128 - status if status < 0 else status, summary + self._quote(rank, LAST_LINES))

    def _on_signal(self, number: int, frame: object) -> None:
        if self._signal and self._kill_at is not None:
            self._kill_at = 0.0  # asked twice: do not wait for the ranks
        self._signal = self._signal or number

    def _stop(self, status: int, summary: list[str]) -> None:
        self._status, self._summary = status, summary
        self._kill_at = time.monotonic() + self._grace_s
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for process in self._live.values():
            _signal_group(process, number)

    def _timeout_summary(self, timeout_s: float | None) -> list[str]:
        summary = [f"the job did not end within {timeout_s} s; stopped what still ran ({_names(self._live)})"]
        return summary + [line for rank in self._live for line in self._quote(rank, 3)]

    def _quote(self, rank: int, num_lines: int) -> list[str]:
        lines = [*self._last_lines[rank]][-num_lines:]
        return [f"last lines of rank {rank}:", *(f"  {line}" for line in lines)] if lines else []


def _names(ranks: Iterable[int]) -> str:
    return "rank " + ", ".join(map(str, ranks))


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def main() -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_nixlep.launch",
        usage="%(prog)s -n RANKS [--gpus COUNT] [--timeout SECONDS] (script.py | -m module) [args ...]",
        description="Start the ranks of a job on this machine.",
    )
    parser.add_argument("-n", "--ranks", type=int, required=True, help="processes to start")
    parser.add_argument(
        "--gpus", type=int, metavar="COUNT", help="run on this machine's first COUNT GPUs, rank r on number r %% COUNT"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="stop the job after so long")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module, and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script, and its arguments")
    args = parser.parse_args()
    argv = ["-m", *args.module] if args.module else args.script
    if args.ranks < 1 or not argv:
        parser.error(f"-n must be at least 1 and a script or module given; got -n {args.ranks} and {argv}")
    if args.gpus is not None and args.gpus < 1:
        parser.error(f"--gpus must be at least 1; got {args.gpus}; leave it out to let JAX choose")
    return run(argv, args.ranks, gpus=args.gpus, timeout_s=args.timeout)


if __name__ == "__main__":
    sys.exit(main())
