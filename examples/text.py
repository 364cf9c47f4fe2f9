"""Real text that every machine has: the source files of Python's own standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def load_corpus(max_bytes: int = 16 << 20) -> np.ndarray:
    """[N] uint8: all .py files of the standard library, without its tests, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    return np.frombuffer(b"\n".join(path.read_bytes() for path in files), np.uint8)[:max_bytes]


def split(corpus: np.ndarray, valid_share: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """The corpus cut into a part to train on and a last part to validate on."""
    cut = int(len(corpus) * (1 - valid_share))
    return corpus[:cut], corpus[cut:]


def unigram_entropy(corpus: np.ndarray) -> float:
    """Nats per byte of a model that knows how frequent each byte is and nothing else."""
    counts = np.bincount(corpus, minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def batch(corpus: np.ndarray, size: int, length: int, seed: int, step: int) -> np.ndarray:
    """[size, length + 1] uint8: random pieces of the corpus, the same for equal arguments."""
    starts = np.random.default_rng((seed, step)).integers(0, len(corpus) - length, size)
    return corpus[starts[:, None] + np.arange(length + 1)]
