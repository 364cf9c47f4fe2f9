"""Elastic groups on a GPU, several ranks to each: what tests/test_elastic*.py asks on CPUs, asked of the same ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_elastic
import test_elastic_failures
from ranks import run_to_deaths

TRANSPORTS = ["pointer", "put"]
PLAN = Path(__file__).parents[1] / "plans" / "expansion_fault_contraction.json"


def rank_replays(job, plan, first):
    """As rank_resizes; returns the epochs with a step that called no handler: a replay of what was captured before."""
    import jax_nixlep as nx
    from jax_nixlep import _ffi

    program, replayed = test_elastic.program, set()

    def watched(*args):
        before = _ffi.num_launches()
        y = program(*args)
        if _ffi.num_launches() == before:
            replayed.add(nx.current_group().epoch)
        return y

    watched._cache_size = program._cache_size
    test_elastic.program = watched
    try:
        test_elastic.rank_resizes(job, plan, first)
    finally:
        test_elastic.program = program
    return replayed


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_grows_shrinks_and_leaves_holes(gpu_pools, transport):
    test_elastic.test_grows_shrinks_and_leaves_holes(lambda n, _: gpu_pools(n, transport), transport)


@pytest.mark.kills
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("when", ["call", "prepare"])
def test_survivors_agree_and_go_on(env_of, when, transport):
    test_elastic.check_survivors(when, env_of(transport))


@pytest.mark.kills
@pytest.mark.parametrize("phase", ["prepare", "commit"])
def test_a_coordinator_that_dies(env_of, phase):
    test_elastic_failures.test_a_coordinator_that_dies(phase, env_of())


@pytest.mark.parametrize("buffers", ["graphs", "plain"])
def test_many_resizes(gpu_pools, buffers):
    test_elastic.test_many_resizes(lambda n: gpu_pools(n, "pointer", buffers))


def test_what_was_captured_serves_every_membership(gpu_pools):
    plan = [[0, 1, 2], [0, 2], [0, 1, 2], [0]]
    replayed = gpu_pools(3).run(rank_replays, plan, [0, 1])
    assert len(replayed[0] - {0}) >= 3 and replayed[1] - {0} and replayed[2] - {0}, replayed


def test_a_rank_wrongly_given_up_rejoins(env_of):
    test_elastic.test_a_rank_wrongly_given_up_rejoins(env_of())


def test_a_group_without_work_changes(gpu_pools):
    test_elastic_failures.test_a_group_without_work_changes(gpu_pools)


@pytest.mark.kills
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_lost_experts_come_back(env_of, transport):
    function = test_elastic_failures.rank_leader_dies
    assert set(run_to_deaths(function, num_ranks=3, dead={0, 2}, env=env_of(transport))) == {1}


@pytest.mark.kills
def test_upstream_plans(env_of):
    done = subprocess.run(
        [sys.executable, "-m", "jax_nixlep.plan", str(PLAN)],
        env=os.environ | env_of(),
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all {len(json.loads(PLAN.read_text()))} phases right" in done.stdout
