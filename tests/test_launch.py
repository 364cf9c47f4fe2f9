"""The launcher: what the ranks see, what the user sees, and that nothing is left behind."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from jax_nixlep import launch
from jax_nixlep.launch import RankEnv, rank_env, run

ROOT = pathlib.Path(launch.__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
# `jax_nixlep` without its __init__, which imports jax: that takes longer than most of these tests.
BARE = f"""
import sys, types
package = sys.modules["jax_nixlep"] = types.ModuleType("jax_nixlep")
package.__path__ = [{str(ROOT / "jax_nixlep")!r}]
"""
LAUNCH = [sys.executable, "-c", BARE + "from jax_nixlep.launch import main; sys.exit(main())"]
LAUNCH_AS_USERS_DO = [sys.executable, "-m", "jax_nixlep.launch"]


@pytest.fixture
def script(tmp_path: pathlib.Path) -> Callable[[str], str]:
    """Writes a script of a rank, with some names at hand; returns its path."""

    def write(body: str) -> str:
        path = tmp_path / "script.py"
        head = BARE + "import os, signal, subprocess, sys, time\nrank = int(os.environ['JAX_NIXLEP_RANK'])\n"
        path.write_text(head + textwrap.dedent(body))
        return str(path)

    return write


def launched(*args: str, command: list[str] = LAUNCH) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *args], env=ENV, capture_output=True, text=True, check=False, timeout=25.0)


@contextlib.contextmanager
def launching(*args: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*LAUNCH, *args], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def is_alive(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_gone(pids: list[int], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.02)


def read_pids(process: subprocess.Popen[str], num_pids: int) -> list[int]:
    """The ids in the first lines "[rank] id"."""
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[1]) for _ in range(num_pids)]


def test_ranks_see_their_place_and_meet_in_the_store(script: Callable[[str], str]) -> None:
    path = script("""
        from jax_nixlep.launch import rank_env
        from jax_nixlep.store import connect
        me = rank_env()
        assert me.rank == rank and me.num_ranks == 3 and me.coordinator.startswith("127.0.0.1:"), me
        assert os.environ["PYTHONUNBUFFERED"] == "1" and sys.stdin.read() == ""
        assert os.environ["JAX_NIXLEP_SECRET"] not in open("/proc/%d/cmdline" % os.getppid()).read()
        with connect(me.store) as store:
            store.put(f"rank/{rank}", b"%d" % rank)
            print(sorted(store.wait([f"rank/{i}" for i in range(3)], 20.0)), sys.argv[1:])
    """)
    done = launched("-n", "3", path, "-n", "7", "-m", "--timeout", "x")
    assert done.returncode == 0, done.stderr
    line = "['rank/0', 'rank/1', 'rank/2'] ['-n', '7', '-m', '--timeout', 'x']"
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] {line}" for rank in range(3)]
    assert done.stderr == ""


def test_modules_and_python_m() -> None:
    done = launched("-n", "1", "-m", "timeit", "-n", "1", "-r", "1", "pass", command=LAUNCH_AS_USERS_DO)
    assert done.returncode == 0
    assert done.stdout.startswith("[0] 1 loop")
    assert done.stderr == ""  # runpy warns if `import jax_nixlep` already imports jax_nixlep.launch


def test_each_stream_goes_to_its_own(script: Callable[[str], str]) -> None:
    path = script("""
        print("out", "put")
        print("err", file=sys.stderr)
        sys.stdout.buffer.write("\\xff gr\\u00fc\\u00df".encode() + b"\\xfe\\n")
        for i in range(3):
            sys.stderr.write(f"\\r{i}/3"); sys.stderr.flush()
        sys.stderr.write("\\r\\n\\nno newline")
    """)
    done = launched("-n", "1", path)
    assert done.returncode == 0
    assert done.stdout == "[0] out put\n[0] \xff gr\u00fc\u00df\ufffd\n"
    assert done.stderr == "".join(f"[0] {line}\n" for line in ("err", "0/3", "1/3", "2/3", "", "no newline"))


def test_much_output_is_complete_and_in_order(script: Callable[[str], str]) -> None:
    path = script("sys.stdout.write(''.join(f'{i} {rank}\\n' for i in range(20000)))")
    done = launched("-n", "2", path)
    lines = done.stdout.splitlines()
    for rank in range(2):
        mine = [line for line in lines if line.startswith(f"[{rank}]")]
        assert mine == [f"[{rank}] {i} {rank}" for i in range(20000)]


def test_the_rank_that_fails_first_is_named(script: Callable[[str], str]) -> None:
    path = script("""
        signal.signal(signal.SIGTERM, lambda *args: sys.exit(9))  # what the stopped ranks return does not count
        if rank == 1:
            for i in range(100):
                print("line", i)
            raise ValueError("no such expert")
        time.sleep(30)
    """)
    began = time.monotonic()
    done = launched("-n", "3", path)
    assert time.monotonic() - began < 8.0
    assert done.returncode == 1
    summary = done.stderr[done.stderr.index("launch:") :].splitlines()
    assert summary[0] == "launch: rank 1 of 3 failed first: exit status 1; stopped the others (rank 0, 2)"
    assert summary[1] == "launch: last lines of rank 1:"
    assert summary[-1] == "launch:   ValueError: no such expert"
    assert len(summary) == 2 + launch.LAST_LINES
    assert "Traceback" in done.stderr
    assert "[1] ValueError: no such expert" in done.stderr


def test_first_means_first(script: Callable[[str], str]) -> None:
    path = script("""
        from jax_nixlep.store import connect
        with connect(os.environ["JAX_NIXLEP_STORE"]) as store:
            if rank != 2:  # fails a moment after rank 2, as a rank whose peer is gone does
                store.wait(["dying"], 20.0)
                time.sleep(0.01)
                os._exit(5)
            store.put("dying", b"")
            os._exit(7)
    """)
    for _ in range(3):
        done = launched("-n", "4", path)
        assert done.returncode == 7
        assert "launch: rank 2 of 4 failed first: exit status 7" in done.stderr


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_death_by_a_signal_is_named(script: Callable[[str], str], name: str) -> None:
    path = script(f"""
        print("alive")
        if rank == 0:
            import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(os.getpid(), signal.{name})
        time.sleep(30)
    """)
    done = launched("-n", "2", path)
    assert done.returncode == 128 + signal.Signals[name]
    assert f"launch: rank 0 of 2 failed first: killed by {name}; stopped the others (rank 1)" in done.stderr
    assert "launch:   alive" in done.stderr


def test_a_missing_script_is_reported() -> None:
    done = launched("-n", "2", "/nonexistent.py")
    assert done.returncode == 2
    assert "failed first: exit status 2" in done.stderr
    assert "can't open file '/nonexistent.py'" in done.stderr


def test_timeout(script: Callable[[str], str]) -> None:
    path = script("""
        if rank == 0:
            sys.exit(0)
        print("stuck at", rank)
        time.sleep(30)
    """)
    began = time.monotonic()
    done = launched("-n", "3", "--timeout", "1.0", path)
    assert time.monotonic() - began < 6.0
    assert done.returncode == launch.TIMEOUT_STATUS
    assert "launch: the job did not end within 1.0 s; stopped what still ran (rank 1, 2)" in done.stderr
    assert "launch: last lines of rank 2:\nlaunch:   stuck at 2" in done.stderr


def test_a_rank_that_ignores_sigterm_is_killed(script: Callable[[str], str]) -> None:
    path = script("""
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open(sys.argv[1], "w").close()
            time.sleep(30)
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.01)
        sys.exit(4)
    """)
    began = time.monotonic()
    assert run([path, path + ".ready"], 2, grace_s=0.5) == 4
    assert 0.5 < time.monotonic() - began < 8.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_all_ranks(script: Callable[[str], str], number: signal.Signals) -> None:
    path = script("print(os.getpid()); time.sleep(30)")
    with launching("-n", "3", path) as process:
        pids = read_pids(process, 3)
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert f"launch: stopped by {number.name}" in errors
    assert "Traceback" not in errors
    wait_gone(pids)


def test_a_second_ctrl_c_does_not_wait(script: Callable[[str], str]) -> None:
    path = script("signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid()); time.sleep(30)")
    with launching("-n", "2", path) as process:
        pids = read_pids(process, 2)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.4)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert time.monotonic() - began < 4.0
    wait_gone(pids)


def test_no_rank_outlives_a_killed_launcher(script: Callable[[str], str]) -> None:
    path = script("signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid()); time.sleep(30)")
    with launching("-n", "3", path) as process:
        pids = read_pids(process, 3)
        assert all(map(is_alive, pids))
        process.kill()
        process.wait(10)
        wait_gone(pids)


def test_children_of_a_rank_do_not_outlive_it(script: Callable[[str], str]) -> None:
    path = script("""
        child = subprocess.Popen(["sleep", "60"])  # holds the pipe open, too
        print(child.pid)
    """)
    began = time.monotonic()
    done = launched("-n", "2", path)
    assert done.returncode == 0
    assert time.monotonic() - began < 8.0
    wait_gone([int(line.split()[1]) for line in done.stdout.splitlines()])


def test_run_from_a_program(script: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> None:
    path = script("""
        print(os.environ["EXTRA"])
        sys.exit(6 if rank == 1 else 0)
    """)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    num_files = len(os.listdir("/proc/self/fd"))
    statuses: list[int] = []
    assert run([path], 2, env={"EXTRA": "thing"}) == 6
    thread = threading.Thread(target=lambda: statuses.append(run([path], 2, env={"EXTRA": "thing"})))
    thread.start()
    thread.join(20.0)
    assert statuses == [6]
    assert {number: signal.getsignal(number) for number in before} == before
    deadline = time.monotonic() + 5.0
    while len(os.listdir("/proc/self/fd")) > num_files and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(os.listdir("/proc/self/fd")) <= num_files
    captured = capfd.readouterr()
    assert "[1] thing" in captured.out
    assert captured.err.count("launch: rank 1 of 2 failed first: exit status 6") == 2


def test_ranks_share_gpus(script: Callable[[str], str]) -> None:
    path = script("""
        names = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_PREALLOCATE", "CUDA_MODULE_LOADING")
        print(*map(os.environ.get, (*names, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")))
    """)
    done = launched("-n", "3", "--gpus", "2", path)
    assert sorted(done.stdout.splitlines()) == [
        f"[{r}] cuda {r % 2} false EAGER {(50, 100)[r % 2]}" for r in range(3)
    ], done.stderr
    done = launched("-n", "2", "--gpus", "4", path)
    assert sorted(done.stdout.splitlines()) == [f"[{r}] cuda {r} None None None" for r in range(2)], done.stderr
    mine = launch.gpu_env(1, 2, 1, {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"})
    assert mine["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true" and mine["CUDA_VISIBLE_DEVICES"] == "0"
    visible = {"CUDA_VISIBLE_DEVICES": "5,2"}
    assert [launch.gpu_env(r, 2, 2, visible)["CUDA_VISIBLE_DEVICES"] for r in range(2)] == ["5", "2"]
    with pytest.raises(ValueError, match="gpus must be at most the 2 of CUDA_VISIBLE_DEVICES=5,2; got 3; name more"):
        launch.gpu_env(0, 3, 3, visible)


def test_bad_arguments() -> None:
    for num_ranks, argv in [(0, ["x.py"]), (2, [])]:
        with pytest.raises(ValueError, match="run: num_ranks and argv must not be empty"):
            run(argv, num_ranks)
    with pytest.raises(
        ValueError, match="run: gpus must be at least 1, or None; got 0; leave it out to let JAX choose"
    ):
        run(["x.py"], 2, gpus=0)
    for args in (["-n", "2"], ["-n", "0", "x.py"], ["x.py"], ["-n", "2", "--gpus", "0", "x.py"]):
        done = launched(*args)
        assert done.returncode == 2
        assert "usage:" in done.stderr


def test_rank_env() -> None:
    place = {"JAX_NIXLEP_RANK": "1", "JAX_NIXLEP_NUM_RANKS": "2", "JAX_NIXLEP_STORE": "tcp://h:1"}
    assert rank_env({}) is None
    assert rank_env({"JAX_NIXLEP_STORE": "tcp://h:1"}) is None  # a store alone is no place
    assert rank_env(place) == RankEnv(1, 2, "tcp://h:1", None)
    assert rank_env({**place, "JAX_NIXLEP_COORDINATOR": "h:2"}) == RankEnv(1, 2, "tcp://h:1", "h:2")
    with pytest.raises(ValueError, match="got no JAX_NIXLEP_NUM_RANKS, JAX_NIXLEP_STORE; set all or none"):
        rank_env({"JAX_NIXLEP_RANK": "0"})
    for rank in ("2", "-1", "x"):
        with pytest.raises(ValueError, match="JAX_NIXLEP_RANK must be 0 to JAX_NIXLEP_NUM_RANKS - 1"):
            rank_env({**place, "JAX_NIXLEP_RANK": rank})


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self) -> bool:
        return True


def test_progress_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    stream, last = Terminal(), collections.deque[str](maxlen=5)
    output = launch._Output(3, 2, stream, last)

    def shown(data: bytes) -> str:
        stream.seek(0)
        stream.truncate()
        output.feed(data)
        return stream.getvalue()

    assert shown(b"\r 10%") == "[ 3]  10%\x1b[K\r"  # shown at once, to be overwritten
    assert shown(b"\r 20%") == "[ 3]  10%\x1b[K\r[ 3]  20%\x1b[K\r"
    assert shown(b" " + b"#" * 30) == "[ 3]  20% #########\x1b[K\r"  # not wider than the terminal
    assert shown(b"\r100%\r") == "[ 3]  20% #########\x1b[K\r[ 3] 100%\x1b[K\r"
    assert shown(b"\n") == "[ 3] 100%\x1b[K\n"  # the \r was half of \r\n
    assert list(last) == ["100%"]
    assert shown("gr\u00fcn\n".encode()) == "[ 3] gr?n\x1b[K\n"
    monkeypatch.delenv("NO_COLOR")
    launch._Output(3, 1, stream, last).feed(b"x\n")
    assert stream.getvalue().endswith("\x1b[32m[3] \x1b[0mx\x1b[K\n")


def test_an_endless_line_is_broken() -> None:
    stream, last = io.StringIO(), collections.deque[str](maxlen=5)
    output = launch._Output(0, 1, stream, last)
    for _ in range(20):
        output.feed(b"x" * 10_000)
    output.finish()
    assert max(map(len, stream.getvalue().splitlines())) <= launch._MAX_LINE_BYTES + 10_004
    assert stream.getvalue().count("x") == 200_000
