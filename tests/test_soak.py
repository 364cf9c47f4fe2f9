"""The soak, shortened. Everything it looks for fails it by itself; see jax_nixlep/soak.py for the full one."""

import json
import os
import subprocess
import sys

import pytest
from ranks import child_env


@pytest.mark.parametrize(("transport", "seed"), [("shared", 11), ("nixl", 12)])
def test_soak(tmp_path, transport, seed):
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "jax_nixlep.soak", "--resizes", "10", "--kills", "4", "--transport", transport]
    command += ["--seed", str(seed), "--json", str(out)]
    env = child_env(JAX_COMPILATION_CACHE_DIR=os.environ["JAX_COMPILATION_CACHE_DIR"])
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["resizes"] == 10 and result["kills"] == 4
    assert result["recompiles"] == 0 and result["leaks"] == [] and result["refused"] == []
    assert result["commits"] >= 10 and 0 < result["blocked_ms_median"] <= result["blocked_ms_max"]
