"""Fixtures shared by the suite: pools of rank processes."""

import os
import shutil
import tempfile

# Before jax is imported: the test process has eight devices, which is how meshes are tested in one process.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["NPROC"] = "32"  # an exchange blocks a thread of each of them
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # tests compile much and compute little: less than half the time
# Ranks compile the same programs: those that come later find them.
PROGRAMS = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="nixlep-programs-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import pytest
from ranks import RankPool, without_job


def pytest_unconfigure():
    shutil.rmtree(PROGRAMS, ignore_errors=True)


@pytest.fixture(scope="session")
def pools():
    """pool(n, transport): n rank processes, kept for the whole session; "shared" memory or "nixl" between them."""
    made: dict[tuple[int, str], RankPool] = {}

    def pool(num_ranks: int, transport: str = "shared") -> RankPool:
        key = (num_ranks, transport)
        if key not in made or not made[key].alive():
            made[key] = RankPool(num_ranks, {"JAX_NIXLEP_P2P": "0" if transport == "nixl" else "1"})
        return made[key]

    yield pool
    for p in made.values():
        p.close()


@pytest.fixture(scope="session")
def on_fake_devices():
    """call(function, *args): function(*args) in a process, kept for the session, that has eight CPU devices."""
    made = []

    def call(function, *args, **kwargs):
        if not made or not made[-1].alive():
            made.append(RankPool(1, {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "32"}))
        made[-1].run(without_job, function.__module__, function.__name__, args, kwargs, timeout_s=240)

    yield call
    for p in made:
        p.close()
