"""What a model must offer to be served, and how each process opens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

import jax_nixlep as nx

Tree = Mapping[str, Any]  # nested dicts of arrays; keys are str without "/"


class Model(Protocol):
    """A decoder. Making one reads no weights: the front end and ranks that join make one too.

    Attributes:
      num_experts: logical experts of a layer; all MoE layers have as many, and share one placement.
      vocab_size: V; token ids are below it.
      eos_ids: tokens that end a sequence; may be empty.
      max_length: tokens of the longest sequence it was made for; None: any.
    """

    num_experts: int
    vocab_size: int
    eos_ids: frozenset[int]
    max_length: int | None

    def ep_config(self, max_ranks: int, experts_per_rank: int, tokens_per_rank: int) -> nx.EpConfig:
        """The group's capacities. Called once, before `forward`, which uses the same."""

    def empty_cache(self, batch: int, length: int) -> Any:
        """The cache of `batch` sequences of `length` tokens each: a pytree of arrays [batch, ...]."""

    def load_experts(self, expert_ids: list[int]) -> Tree:
        """Weights of these logical experts in all layers, from the files: arrays with a row for each id, zeros for -1.

        The form that `EpGroup.load` and `restore=` take; shapes and dtypes depend on the number of ids only.
        """

    def load_dense(self) -> Tree:
        """All other parameters, from the files."""

    def forward(
        self,
        dense: Tree,
        experts: Tree,
        placement: nx.Placement,
        tokens: jax.Array,
        start: jax.Array,
        lengths: jax.Array,
        cache: Any,
    ) -> tuple[jax.Array, Any]:
        """Reads more tokens of each sequence. Pure, to be compiled: a change of the group changes arguments only.

        Collective. Which operations (dispatch, combine) it runs must not depend on S: ranks may bring different S to
        one step.

        Args:
          dense, experts: as `load_dense` and `load_experts` gave them; of experts, those in this rank's slots.
          tokens: [B, S] int32, with B * S <= tokens_per_rank. Those from lengths[b] on are padding: they go to no
            expert, and what they leave in the cache is overwritten before a later token looks at it.
          start: [B] int32, position of tokens[:, 0]; start + S is at most the cache's length. 0 begins a new sequence,
            whatever the cache holds.
          lengths: [B] int32, 0 to S; a row of length 0 takes no part, and its cache up to `start` is left alone.
          cache: of `empty_cache`, or what the last call returned.

        Returns:
          [B, V] float32 logits after the last live token of each row (anything for rows of length 0), and the cache.
        """

    def encode(self, text: str) -> list[int]:
        """Text as tokens."""

    def decode(self, ids: list[int]) -> str:
        """Tokens as text; an incomplete character at the end becomes U+FFFD."""

    def apply_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt for the assistant's next message after `messages`, {"role": ..., "content": ...} each.

        Raises:
          ValueError: the model cannot take them; says why.
          FileNotFoundError: the model was not made for conversations.
        """


def open_model(source: Mapping[str, str]) -> Model:
    """{"checkpoint": file} is one that train_lm.py wrote, {"folder": directory} one of Hugging Face.

    Raises:
      ValueError: neither.
    """
    if "checkpoint" in source:
        from serving.byte_model import ByteModel

        return ByteModel(Path(source["checkpoint"]))
    if "folder" in source:
        import moe_decoder

        return moe_decoder.load(Path(source["folder"]))
    raise ValueError(f'open_model: source must have "checkpoint" or "folder"; got {sorted(source)}; give one of them')


def find_checkpoint(path: Path) -> Path:
    """The checkpoint file that `path`, itself or the --out of train_lm.py, stands for.

    Raises:
      ValueError: there is none; says which command makes one.
    """
    file = path / "checkpoint.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"--checkpoint must exist; got {file}; make one with "
            f"`python examples/train_lm.py --ranks 4 --no-dense --out {path}`"
        )
    return file
