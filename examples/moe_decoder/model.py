"""`load`: a checkpoint as something that can be served: its parameters by placement, and one pure function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from moe_decoder.attention import Cache, Where
from moe_decoder.checkpoint import Checkpoint
from moe_decoder.config import read_config
from moe_decoder.decoder import Decoder, Layout, empty_cache
from moe_decoder.parameters import Stored, as_dtype, is_expert, source_of
from moe_decoder.tokenizer import Tokenizer
from tqdm import tqdm

import jax_nixlep as nx
from jax_nixlep.moe import Backend
from jax_nixlep.weights import unflatten


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    tensor_axis: str | None = None,
    backend: Backend = "native",
    progress: bool = False,
) -> Model:
    """Opens a Hugging Face folder; reads `config.json` and the headers of the shards, and no weights yet.

    Args:
      dtype: of parameters and computation; default: the checkpoint's own.
      mesh: load for `jit` over this mesh: parameters become global arrays, each device getting its own part from the
        files by the logical axis rules; experts are spread over axis "ep". None: this process is a rank by itself.
      tensor_axis: mesh axis that splits heads, vocabulary and MLPs; rows of a batch are spread over all others.
      backend: see `nixlep_moe`.
      progress: show a progress bar while weights are read.

    Raises:
      FileNotFoundError, ValueError: names the file or value, and what to do.
    """
    folder = Path(folder)
    config = read_config(folder)
    return Model(folder, Layout(mesh, tensor_axis, backend, dtype or config.dtype), progress)


class Model:
    """A checkpoint that was opened by `load`. It holds no weights.

    Attributes:
      config: `ModelConfig`.
      num_experts: logical experts of each layer that has any.
      vocab_size: of the logits.
      eos_ids: tokens that end a text.
      encode, decode, apply_chat: see `Tokenizer`.
    """

    def __init__(self, folder: Path, layout: Layout, progress: bool = False):
        self.config, self.layout = read_config(folder), layout
        self.num_experts, self.vocab_size = self.config.router.num_experts, self.config.vocab_size
        self.eos_ids = self.config.eos_ids
        self._checkpoint, self._progress = Checkpoint(folder), progress
        tokenizer = Tokenizer(folder)
        self.encode, self.decode, self.apply_chat = tokenizer.encode, tokenizer.decode, tokenizer.apply_chat
        self._graph = functools.cache(self._split)

    def ep_config(self, max_ranks: int, experts_per_rank: int, tokens_per_rank: int) -> nx.EpConfig:
        """The capacities of a group that runs this model; all its MoE layers share them.

        Args:
          tokens_per_rank: that a rank brings to one exchange; longer inputs are cut.

        Raises:
          ValueError: fewer slots than experts.
        """
        if max_ranks * experts_per_rank < self.num_experts:
            raise ValueError(
                f"ep_config: max_ranks * experts_per_rank must be at least the model's {self.num_experts} experts; got "
                f"{max_ranks} * {experts_per_rank} slots; raise one of them"
            )
        return nx.EpConfig(
            max_ranks=max_ranks,
            experts_per_rank=experts_per_rank,
            max_tokens_per_rank=tokens_per_rank,
            hidden=self.config.hidden,
            top_k=self.config.router.top_k,
            dtype=self.layout.dtype,
        )

    def empty_cache(self, batch: int, length: int) -> list[Cache]:
        """A cache for `batch` rows of at most `length` tokens: [batch, length, heads, values] arrays in each layer."""
        return empty_cache(self.config, self.layout, batch, length)

    def load_experts(self, expert_ids: Sequence[int], *, lazy: bool = False) -> dict[str, Any]:
        """The weights of these experts in all layers, nested dicts of arrays [len(expert_ids), ...]; -1 gives zeros.

        With a mesh the ids are those of all its slots, and the arrays are global ones.

        Args:
          lazy: leaves that read themselves when numpy asks for their values, as `group.load` does: it then needs no
            memory beside that of the group, but for one array.

        Raises:
          ValueError: an id is no expert; or of a tensor: names it, its file and what to do.
        """
        ids = tuple(int(e) for e in expert_ids)
        if bad := [e for e in ids if not -1 <= e < self.num_experts]:
            raise ValueError(f"load_experts: ids must be in [-1, {self.num_experts}); got {bad}; correct the placement")
        return self._load("experts", ids, lazy)

    def load_dense(self, *, lazy: bool = False) -> dict[str, Any]:
        """All other weights, nested dicts of arrays; see `load_experts`."""
        return self._load("dense", None, lazy)

    def forward(
        self,
        dense: dict[str, Any],
        experts: dict[str, Any],
        placement: nx.Placement | None,
        tokens: jax.Array,
        start: jax.Array,
        lengths: jax.Array,
        cache: list[Cache],
        *,
        ep: nx.EpConfig | None = None,
    ) -> tuple[jax.Array, list[Cache]]:
        """One step of a batch, prefill or decode. Pure; a collective of the group, under `jax.jit`.

        Args:
          dense, experts: as loaded; runtime arguments, as is `placement`, so that a resize compiles nothing.
          tokens: [B, S] int32, of which lengths [B] int32 are live: row b's continue at position start[b]. A row of
            length 0 takes no part, and its part of the cache stays as it is.
          cache: of earlier tokens.
          ep: capacities; None: those of the current group.

        Returns:
          Logits [B, vocab_size] float32 of each row's last live token, and the cache with the live tokens in it.

        Raises:
          ValueError: more tokens than the cache has room for. Under `jit` only S is known; see `check_room`.
        """
        length = cache[0].keys.shape[1]
        self.check_room(tokens.shape[1], length)
        offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        where = Where(start[:, None] + offsets, offsets < lengths[:, None])
        graph, state = self._graph(ep or nx.current_group().config)
        state = jax.tree.map(lambda v: v, state)  # a copy: filled in place
        nnx.replace_by_pure_dict(state, _merge(dense, experts))
        return nnx.merge(graph, state)(tokens, where, jnp.maximum(lengths - 1, 0), cache, placement)

    def check_room(self, num_tokens: int, length: int) -> None:
        """
        Raises:
          ValueError: a text of `num_tokens`, prompt and continuation, does not fit into a cache of `length`.
        """
        if num_tokens > length:
            raise ValueError(
                f"forward: a text must be at most {length} tokens, the length of its cache; got {num_tokens}; make the "
                "cache longer, or the prompt shorter"
            )

    def _split(self, ep: nx.EpConfig) -> tuple[nx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: Decoder(self.config, ep, self.layout, nnx.Rngs(0))))

    def _load(self, kind: str, experts: tuple[int, ...] | None, lazy: bool) -> dict[str, Any]:
        _, state = self._graph(self.ep_config(1, self.num_experts, 1))
        bar = tqdm(desc=f"read {kind}", unit="B", unit_scale=True, disable=not self._progress or lazy, mininterval=1)
        stored, shardings = {}, {}
        for where, variable in nnx.to_flat_state(state):
            path = tuple(str(part) for part in where)
            if is_expert(path) == (experts is None):
                continue
            shape = variable.shape if experts is None else (len(experts), *variable.shape[1:])
            source, dtype = source_of(self.config, path), as_dtype(variable.dtype)
            stored["/".join(path)] = Stored(self._checkpoint, self.config, source, shape, dtype, experts, bar.update)
            if self.layout.mesh is not None:
                spec = nnx.get_partition_spec({"": variable})[""].get_value()
                shardings["/".join(path)] = jax.sharding.NamedSharding(self.layout.mesh, spec)
        if lazy:
            return unflatten(stored)
        bar.reset(total=sum(value.nbytes for value in stored.values()))
        with bar:
            return unflatten({name: _placed(value, shardings.get(name)) for name, value in stored.items()})


def _placed(value: Stored, sharding: jax.sharding.NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(np.asarray(value), may_alias=True)
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def _merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts with no leaf in common, as one."""
    both = {key: _merge(a[key], b[key]) for key in a.keys() & b.keys()}
    return {**a, **b, **both}
