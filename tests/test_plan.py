"""The runner of upstream's plan files: files as upstream writes them, holes, kills and returns, and refusals."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from ranks import child_env

from jax_nixlep import plan

PLANS = pathlib.Path(__file__).parent / "plans"


def run(path, *options, transport="shared"):
    programs = os.environ["JAX_COMPILATION_CACHE_DIR"]  # ranks that come later compile nothing
    env = child_env(JAX_NIXLEP_P2P="0" if transport == "nixl" else "1", JAX_COMPILATION_CACHE_DIR=programs)
    command = [sys.executable, "-m", "jax_nixlep.plan", str(path), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(PLANS.iterdir()), ids=lambda path: path.stem)
def test_upstream_plans(path):
    out, phases = run(path), json.loads(path.read_text())
    assert f"all {len(phases)} phases right" in out
    killed = [[-r for r in phase if r < 0] for phase in phases]
    assert [line.split(";")[0].split("killed ")[1] for line in out.splitlines() if "killed" in line] == [
        str(sorted(ranks)) for ranks in killed if ranks
    ]


def test_holes_kills_and_returns(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps([[0, 1, 2], [0, -2], [3, 0, 2], [-0, 3, 1, -2], [3]]))
    assert "all 5 phases right" in run(path, transport="nixl")


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({}, "must be a list of phases; got {}"),
        ([[0, 1], [0, "1"]], r"phase 1 must be a list of distinct rank ids; got \[0, '1'\]"),
        ([[1, -1]], "phase 0 must be a list of distinct rank ids"),
        ([[0, 1], [-1]], "phase 1 must leave a survivor"),
        ([[0, 1], [2, 3]], "phase 1 must keep a member of the phase before"),
    ],
)
def test_bad_plans(phases, message):
    with pytest.raises(ValueError, match=message):
        plan.check_plan(phases)
