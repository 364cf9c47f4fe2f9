"""The examples as a user starts them: training, its files and figures, and generation from its checkpoint."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import random_mixtral
from ranks import child_env
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[1] / "examples"
FIGURES = {"loss_first", "loss_last", "unigram_entropy", "tokens_per_s", "ranks", "dense_max_abs_diff"}


def run_example(script, *options, timeout_s=150, **env):
    command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    return subprocess.run(command, env=child_env(**env), capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture
def refusal(monkeypatch, capsys):
    """What a script says to options that it refuses. In this process, which has imported jax already."""

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *map(str, options)])
        with pytest.raises(SystemExit) as refused:
            runpy.run_path(sys.argv[0], run_name="__main__")
        assert refused.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    options = ["--ranks", 2, "--steps", 4, "--batch", 4, "--length", 32]
    done = run_example("train_lm.py", *options, "--out", out, "--json", out / "figures.json")
    assert done.returncode == 0, done.stderr
    return out, done


def test_training_matches_the_dense_run(trained):
    out, done = trained
    figures = json.loads((out / "figures.json").read_text())
    assert set(figures) >= FIGURES
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["ranks"] == 2 and figures["steps"] == 4
    assert figures["loss_last"] < figures["loss_first"]
    assert figures["dense_max_abs_diff"] < 1e-4
    assert 2.5 < figures["unigram_entropy"] < 4
    assert "tokens/s" in done.stderr
    others = [line for line in done.stdout.splitlines() if line.startswith("[1]") and "[Gloo]" not in line]
    assert not others, "only rank 0 reports"


def test_training_writes_a_checkpoint_and_a_plot(trained):
    out, _ = trained
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(out / "checkpoint.safetensors", "numpy") as file:
        model = json.loads(file.metadata()["model"])
        assert model["window"] == 32
        shape = (model["experts"], model["hidden"], model["mlp_dim"])
        for layer in range(model["layers"]):
            assert file.get_tensor(f"blocks.{layer}.moe.wi_0").shape == shape
        assert all(np.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118  it is no dict


def test_every_number_of_ranks_generates_the_same_text(trained):
    out, _ = trained
    results, prompts = [], ["def ", "class A", "import "]
    for ranks, checkpoint in ((1, out), (2, out / "checkpoint.safetensors")):
        options = ["--checkpoint", checkpoint, "--ranks", ranks, "--steps", 12, "--json", out / f"{ranks}.json"]
        done = run_example("generate.py", *options, "--prompt", *prompts, JAX_LOG_COMPILES="1")
        assert done.returncode == 0, done.stderr
        compiled = done.stderr.count("Finished XLA compilation of jit(step)")
        assert compiled == 2 * ranks, "prefill and decode, once each"
        results.append(json.loads((out / f"{ranks}.json").read_text()))
        assert results[-1]["ranks"] == ranks and results[-1]["tokens_per_s"] > 0
    assert results[0]["completions"] == results[1]["completions"]
    for prompt, completion in zip(prompts, results[0]["completions"], strict=True):
        assert completion["prompt"] == prompt and completion["text"].startswith(prompt)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return random_mixtral(tmp_path_factory.mktemp("mixtral"))


def test_a_folder_of_hugging_face_continues_texts(mixtral):
    """With samples, which depend on no rank either."""
    results = []
    for ranks in (1, 3):  # of 4 experts and 2 prompts: the last rank has none, and takes part
        out = mixtral / f"{ranks}.json"
        options = ["--model", mixtral, "--ranks", ranks, "--steps", 6, "--temperature", 0.8, "--json", out]
        done = run_example("generate.py", *options, "--prompt", "hello user", "hello")
        assert done.returncode == 0, done.stderr
        assert "experts: 100%" in done.stderr and "prefill" in done.stdout
        results.append(json.loads(out.read_text()))
        assert results[-1]["prefill_tokens_per_s"] > 0 and results[-1]["tokens_per_s"] > 0
    assert results[0]["completions"] == results[1]["completions"]
    assert results[0]["completions"][0]["text"].startswith("hello user")


def test_a_folder_of_hugging_face_has_bounds(mixtral, refusal):
    hello = ["generate.py", "--model", mixtral, "--prompt", "hello"]
    assert "--length must be at least 8" in refusal(*hello, "--steps", 6, "--length", 7)
    assert "must be at most 64 tokens" in refusal(*hello, "--steps", 63)
    assert "must have a chat template" in refusal(*hello, "--chat")
    assert "config.json must exist" in refusal("generate.py", "--model", mixtral / "nowhere")
    done = run_example("serve.py", "--model", mixtral, "--context", 65)  # which catches signals
    assert done.returncode == 2 and "--context must be at most 64" in done.stderr


def test_the_decode_benchmark_compares_equal_programs(tmp_path):
    sizes = {"layers": 2, "hidden": 32, "experts": 4, "top-k": 2, "expert-dim": 16, "heads": 2, "kv-heads": 1}
    sizes |= {"head-dim": 16, "vocab": 64, "length": 32, "steps": 4, "batch": 3, "tokens": 8}
    options = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    done = run_example("bench_decode.py", *options, "--dtype", "float32", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    (step,), (layer,) = result["decode"], result["layer"]
    assert (step["batch"], step["operations"], layer["tokens"]) == (3, 4, 8)
    for row in (step, layer):
        assert row["us"] > 0 and row["local_us"] > 0 and row["profile"] is None
        assert row["max_relative_difference"] < 1e-4
    assert "decode, batch 3: " in done.stdout and "no profile of kernels" in done.stdout


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("train_lm.py", ["--ranks", "3"], "--ranks must divide"),
        ("train_lm.py", ["--steps", "0"], "--steps must be at least 1"),
        ("generate.py", ["--checkpoint", "nowhere"], "--checkpoint must exist"),
        ("bench_decode.py", ["--batch", "0"], "--batch must be at least 1; got [0]"),
        ("bench_decode.py", ["--top-k", "65"], "--top-k must be at most --experts"),
        ("bench_decode.py", ["--length", "80"], "--length must be at least 408; got 80; raise it, or lower --steps"),
        ("generate.py", ["--gpus", "0"], "--gpus must be at least 1; got 0; leave it out to run on CPUs"),
    ],
)
def test_bad_options_are_refused(refusal, script, options, words):
    assert words in refusal(script, *options)
