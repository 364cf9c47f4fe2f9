"""The byte-level model that train_lm.py trains, as a `serving.model.Model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model import BYTES, ByteLM, Cache, Layout, empty_cache, read_config
from safetensors import safe_open

import jax_nixlep as nx
from serving.model import Tree

_EXPERT_PARAMS = ("wi_0", "wi_1", "wo")


class ByteModel:
    """See `serving.model.Model`. A token is a byte; none ends a sequence."""

    vocab_size = BYTES
    eos_ids: frozenset[int] = frozenset()
    max_length = None  # a token sees those of its window only

    def __init__(self, checkpoint: Path):
        self._path, self._config = checkpoint, read_config(checkpoint)
        self.num_experts = self._config.experts

    def ep_config(self, max_ranks: int, experts_per_rank: int, tokens_per_rank: int) -> nx.EpConfig:
        layout = Layout(max_ranks, tokens_per_rank, slots=experts_per_rank, rank=0)
        self._graph, abstract = nnx.split(nnx.eval_shape(lambda: ByteLM(self._config, layout, nnx.Rngs(0))))
        self._params = nnx.to_flat_state(abstract)
        return layout.ep_config(self._config)

    def empty_cache(self, batch: int, length: int) -> list[Cache]:
        return empty_cache(self._config, batch, length)

    def load_experts(self, expert_ids: list[int]) -> Tree:
        # One row at a time: a checkpoint may hold many more experts than this rank.
        def read(file, name: str) -> np.ndarray:
            stored = file.get_slice(name)
            rows = np.zeros((len(expert_ids), *stored.get_shape()[1:]), np.float32)
            for row, expert in zip(rows, expert_ids, strict=True):
                if expert >= 0:
                    row[:] = stored[expert]
            return rows

        with safe_open(self._path, "numpy") as file:
            return {name: read(file, name) for name in file.keys() if _is_expert(name)}  # noqa: SIM118  it is no dict

    def load_dense(self) -> Tree:
        with safe_open(self._path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys() if not _is_expert(name)}  # noqa: SIM118

    def forward(
        self,
        dense: Tree,
        experts: Tree,
        placement: nx.Placement,
        tokens: jax.Array,
        start: jax.Array,
        lengths: jax.Array,
        cache: list[Cache],
    ) -> tuple[jax.Array, list[Cache]]:
        arrays = {**dense, **experts}
        flat = [(path, param.replace(arrays[".".join(map(str, path))])) for path, param in self._params]
        model = nnx.merge(self._graph, nnx.from_flat_state(flat))
        offsets = jnp.arange(tokens.shape[1])
        out = model(tokens, start[:, None] + offsets, cache, offsets < lengths[:, None], placement)
        return out.logits[jnp.arange(len(tokens)), jnp.maximum(lengths, 1) - 1], out.cache

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def apply_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """It knows no conversations; lines in the form of a play are something to go on."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant:")


def _is_expert(name: str) -> bool:
    """Whether a parameter is stacked by expert; its name is "blocks.{layer}.moe.{parameter}"."""
    return name.rpartition(".")[2] in _EXPERT_PARAMS
