"""Two hosts: network namespaces joined by a virtual cable. Only NIXL can carry tokens between them."""

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import child_env

HOSTS = {"nixlep-a": "10.213.77.1", "nixlep-b": "10.213.77.2"}


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True, timeout=10)


@pytest.fixture
def hosts():
    names = list(HOSTS)
    if shutil.which("ip") is None or os.geteuid() != 0 or ip("netns", "add", names[0], check=False).returncode:
        if os.environ.get("JAX_NIXLEP_REQUIRE_NETNS") == "1":
            pytest.fail("network namespaces cannot be made here, and JAX_NIXLEP_REQUIRE_NETNS=1")
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "nixlep0", "netns", names[0], "type", "veth", "peer", "name", "nixlep0", "netns", names[1])
        for name, address in HOSTS.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "nixlep0")
            for link in ("lo", "nixlep0"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def test_two_hosts(hosts):
    # They share /proc, so the shared-memory path has to be switched off; between real hosts it finds nothing to map.
    env = child_env(JAX_NIXLEP_P2P="0", JAX_NIXLEP_SECRET=secrets.token_hex(8))
    program, store = str(Path(__file__).parent / "namespaces.py"), f"tcp://{HOSTS['nixlep-a']}:7411"
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, program, str(rank), store],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, host in enumerate(hosts)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output
        assert "right, over nixl" in output
