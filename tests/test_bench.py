"""The benchmark as a user starts it: every row, right results, a table. Nothing here depends on how fast it is."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys

import pytest
from ranks import child_env

from jax_nixlep import bench

OPS = ("dispatch", "combine", "dispatch+combine", "chained", "layer")
RUNTIMES = ("nixlep", "all_to_all", "all_gather")
SIZES = {"ranks": 2, "tokens": 8, "hidden": 64, "experts": 4, "top_k": 2, "mlp_dim": 16, "iterations": 4, "chain": 2}


def test_bench(tmp_path: pathlib.Path) -> None:
    sizes = [word for name, size in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    out, png = tmp_path / "bench.json", tmp_path / "bench.png"
    command = [sys.executable, "-m", "jax_nixlep.bench", *sizes, "--json", str(out), "--plot", str(png)]
    done = subprocess.run(command, env=child_env(), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())

    assert SIZES.items() <= result["settings"].items()
    assert [(row["op"], row["runtime"]) for row in result["rows"]] == [(op, name) for op in OPS for name in RUNTIMES]
    assert result["correct"] is True
    row_bytes = 2 * SIZES["hidden"]
    selections = SIZES["ranks"] * SIZES["tokens"] * SIZES["top_k"]
    for row in result["rows"]:
        assert row["correct"] is True, row
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p99_ms"] < math.inf, row
        assert row["samples"] >= 4
        if row["op"] in ("dispatch", "combine"):
            assert row["logical_bytes"] == selections * row_bytes
        measured = row["runtime"] == "nixlep" and row["op"] != "layer"
        assert ("physical_bytes" in row) == ("memcpy_fraction" in row) == measured
        if measured:
            assert row["physical_bytes"] > 0 and 0 < row["memcpy_fraction"] < math.inf

    medians = {(row["op"], row["runtime"]): row["median_ms"] for row in result["rows"]}
    best = min(medians["dispatch+combine", name] for name in RUNTIMES[1:])
    assert result["speedup_vs_best_baseline"] == pytest.approx(best / medians["dispatch+combine", "nixlep"])
    assert set(result["speedups"]) == set(OPS)
    assert result["machine"]["transport"] == "shared memory"
    assert result["memcpy_bytes_per_s"] > 0
    assert png.read_bytes().startswith(b"\x89PNG")

    table = [line.removeprefix("[0] ").split() for line in done.stdout.splitlines()]
    for op in OPS:
        for name in RUNTIMES:
            (error,) = (float(words[-1]) for words in table if words[:2] == [op, name])
            assert 0 <= error < bench.MAX_ERROR  # of two ranks, all have the same bound


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ranks", "0"), "--ranks must be positive; got 0"),
        (("--ranks", "3"), "--experts must be a multiple of --ranks, and at least --top-k; got 32"),
        (("--top-k", "33"), "--experts must be a multiple of --ranks, and at least --top-k; got 32"),
    ],
)
def test_bad_sizes(args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        bench.parse([*args])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
