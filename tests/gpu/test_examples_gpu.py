"""Generation by several ranks that share the GPUs: the tokens are those of the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import random_checkpoint, random_mixtral
from ranks import child_env

NUM_GPUS = int(os.environ.get("JAX_NIXLEP_TEST_GPUS", "1"))
EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "UCX_LOG_LEVEL": "error"}


def generate(out, *options):
    command = [sys.executable, EXAMPLES / "generate.py", *options, "--json", out]
    done = subprocess.run(
        [*map(str, command)], env=child_env(**SETTINGS), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["--checkpoint", "--model"])
def test_tokens_are_those_of_the_cpu(tmp_path, kind, ranks):
    prompts = {"--checkpoint": ["def ", "class A", "import "], "--model": ["hello user", "hello"]}[kind]
    model = {"--checkpoint": random_checkpoint, "--model": random_mixtral}[kind](tmp_path)
    options = [kind, model, "--steps", 24, "--prompt", *prompts]
    on_gpu = generate(tmp_path / "gpu.json", *options, "--ranks", ranks, "--gpus", NUM_GPUS)
    on_cpu = generate(tmp_path / "cpu.json", *options, "--ranks", 1)
    print(on_gpu)
    assert on_gpu["device"] != on_cpu["device"]
    assert on_gpu["completions"] == on_cpu["completions"]
