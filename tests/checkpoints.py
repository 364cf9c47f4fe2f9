"""Checkpoints of models that learned nothing."""

from pathlib import Path

from flax import nnx
from model import ByteLM, Layout, ModelConfig, save_checkpoint


def random_checkpoint(folder: Path) -> Path:
    """A small byte-level model with random weights, in the form that train_lm.py writes."""
    config = ModelConfig(layers=2, hidden=64, heads=2, experts=8, top_k=2, mlp_dim=64, window=64)
    model = ByteLM(config, Layout(1, 1, rank=0), nnx.Rngs(0))
    path = folder / "checkpoint.safetensors"
    save_checkpoint(path, config, nnx.state(model, nnx.Param))
    return path
