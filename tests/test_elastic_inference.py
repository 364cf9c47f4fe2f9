"""examples/elastic_inference.py as a user starts it, shortened: nothing is lost, and nothing comes out differently."""

import json
import subprocess
import sys
from pathlib import Path

from checkpoints import random_checkpoint
from ranks import child_env

SCRIPT = Path(__file__).parents[1] / "examples" / "elastic_inference.py"


def run(*options):
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, env=child_env(), capture_output=True, text=True, timeout=240)


def test_the_group_grows_shrinks_and_loses_a_rank_while_it_answers(tmp_path):
    figures, picture = tmp_path / "out.json", tmp_path / "elastic.png"
    sizes = ["--prompts", 8, "--tokens", 48, "--streams", 12, "--rows", 4, "--hold", 1, "--rebalances", 2, "--drain", 0]
    done = run("--checkpoint", random_checkpoint(tmp_path), "--json", figures, "--plot", picture, *sizes)
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    assert [len(members) for _, members in result["members_timeline"]] == [2, 4, 3, 2]
    assert result["members_timeline"][-1][1] == [0, 2], "the rank in the middle was killed"
    assert result["resizes"] >= 2 + 4 * 2 and len(result["blocked_ms"]) == result["resizes"]
    assert 0 < result["blocked_ms_median"] <= result["blocked_ms_max"]
    assert result["recompiles"] == 0 and result["requests_lost"] == 0 and result["tokens_identical"] is True
    assert result["requests"] >= 12 and result["tokens"] == 48 * result["requests"]
    assert result["requests_restarted"] > 0, "of the ranks that left and died"
    assert 0 < result["kill_to_epoch_ms"] <= result["kill_to_step_ms"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "kill rank 1" in done.stderr and "epoch" in done.stderr


def test_a_missing_checkpoint_is_named_with_the_command_that_makes_one(tmp_path):
    done = run("--checkpoint", tmp_path / "nothing")
    assert done.returncode == 2 and "train_lm.py --ranks 4 --no-dense --out" in done.stderr
