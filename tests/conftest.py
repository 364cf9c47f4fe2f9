"""Fixtures shared by the suite: pools of rank processes."""

import os

# Before jax is imported: the test process has eight devices, which is how meshes are tested in one process.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["NPROC"] = "32"  # an exchange blocks a thread of each of them

import pytest
from ranks import RankPool


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
