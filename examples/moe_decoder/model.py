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
from tqdm import tqdm

import jax_nixlep as nx
from jax_nixlep.elastic.weights import unflatten
from jax_nixlep.moe import Backend
from moe_decoder.attention import Cache, Where
from moe_decoder.checkpoint import Checkpoint
from moe_decoder.config import read_config
from moe_decoder.decoder import Decoder, Layout, empty_cache
from moe_decoder.parameters import Stored, is_expert, source_of
from moe_decoder.tokenizer import Tokenizer


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
      progress: show a bar while weights are read.

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
      max_length: tokens of the longest text it was made for.
      encode, decode, apply_chat: see `Tokenizer`.
    """

    def __init__(self, folder: Path, layout: Layout, progress: bool = False):
        self.config, self.layout = read_config(folder), layout
        self.num_experts, self.vocab_size = self.config.router.num_experts, self.config.vocab_size
        self.eos_ids, self.max_length = self.config.eos_ids, self.config.max_length
        self._checkpoint, self._progress = Checkpoint(folder), progress
        tokenizer = Tokenizer(folder)
        self.encode, self.decode, self.apply_chat = tokenizer.encode, tokenizer.decode, tokenizer.apply_chat
        self._ep: nx.EpConfig | None = None
        self._graph = functools.cache(self._split)

    def ep_config(self, max_ranks: int, experts_per_rank: int, tokens_per_rank: int) -> nx.EpConfig:
        """The capacities of a group that runs this model; all its MoE layers share them. `forward` uses the last ones.

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
        self._ep = self._capacities(max_ranks, experts_per_rank, tokens_per_rank)
        return self._ep

    def _capacities(self, max_ranks: int, experts_per_rank: int, tokens_per_rank: int) -> nx.EpConfig:
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

    def load_experts(self, expert_ids: Sequence[int]) -> dict[str, Any]:
        """The weights of these experts in all layers: nested dicts of arrays [len(expert_ids), ...]; -1 gives zeros.

        The arrays are still in the files (`Stored`) and are read by whoever takes their values: `group.load` and
        `restore=` need no memory beside the group's but for one array; `place` makes arrays for `forward`.

        Args:
          expert_ids: of this rank's slots, or with a mesh of all its slots.

        Raises:
          ValueError: an id is no expert; or, when read, a tensor is not what it should be: names it, its file and what
            to do.
        """
        ids = tuple(int(e) for e in expert_ids)
        if bad := [e for e in ids if not -1 <= e < self.num_experts]:
            raise ValueError(f"load_experts: ids must be in [-1, {self.num_experts}); got {bad}; correct the placement")
        return self._stored("experts", ids)

    def load_dense(self) -> dict[str, Any]:
        """All other weights, nested dicts of arrays; see `load_experts`."""
        return self._stored("other weights", None)

    def place(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Reads what was loaded into arrays that `forward` takes: on this process's first device, or over the mesh."""

        def put(path: tuple[Any, ...], value: Stored) -> jax.Array:
            if self.layout.mesh is None:
                return jax.device_put(np.asarray(value), may_alias=True)
            sharding = self._sharding["/".join(entry.key for entry in path)]
            return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)

        return jax.tree_util.tree_map_with_path(put, weights)

    def forward(
        self,
        dense: dict[str, Any],
        experts: dict[str, Any],
        placement: nx.Placement | None,
        tokens: jax.Array,
        start: jax.Array,
        lengths: jax.Array,
        cache: list[Cache],
    ) -> tuple[jax.Array, list[Cache]]:
        """One step of a batch, prefill or decode. Pure, to be compiled; a collective of the group of `ep_config`.

        Ranks of one step may bring different S, while B * S is at most `tokens_per_rank`.

        Args:
          dense, experts: from `place`, or the group's; arguments like `placement`, so that a resize compiles nothing.
          tokens: [B, S] int32, of which lengths [B] int32 are live: row b's continue at position start[b]. A row of
            length 0 takes no part, and its part of the cache stays as it is.
          cache: of earlier tokens.

        Returns:
          Logits [B, vocab_size] float32 of each row's last live token, and the cache with the live tokens in it.

        Raises:
          ValueError: more tokens than the cache has room for. Under `jit` only S is known; see `check_room`.
        """
        length = cache[0].keys.shape[1]
        self.check_room(tokens.shape[1], length)
        offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        where = Where(start[:, None] + offsets, offsets < lengths[:, None])
        if self._ep is None:
            raise RuntimeError("forward: the capacities must be known; got none; call ep_config first")
        graph, state = self._graph(self._ep)
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

    @functools.cached_property
    def _variables(self) -> dict[str, nnx.Variable]:
        """The decoder's parameters by path, without values; those of experts with a row for each expert."""
        _, state = self._graph(self._capacities(1, self.num_experts, 1))
        return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}

    @functools.cached_property
    def _sharding(self) -> dict[str, jax.sharding.NamedSharding]:
        specs = nnx.get_partition_spec(self._variables)
        return {p: jax.sharding.NamedSharding(self.layout.mesh, spec.get_value()) for p, spec in specs.items()}

    def _stored(self, what: str, experts: tuple[int, ...] | None) -> dict[str, Any]:
        count = _Progress(what if self._progress else "")
        stored = {}
        for name, variable in self._variables.items():
            path = tuple(name.split("/"))
            if is_expert(path) == (experts is not None):
                shape = variable.shape if experts is None else (len(experts), *variable.shape[1:])
                source, dtype = source_of(self.config, path), np.dtype(variable.dtype)
                stored[name] = Stored(self._checkpoint, self.config, source, shape, dtype, experts, count)
        count.total = sum(value.nbytes for value in stored.values())
        return unflatten(stored)


class _Progress:
    """A bar that appears when reading begins, and goes when all was read."""

    def __init__(self, what: str):
        self.what, self.total, self._bar = what, 0, None

    def __call__(self, num_bytes: int) -> None:
        if not self.what:
            return
        self._bar = self._bar or tqdm(desc=self.what, total=self.total, unit="B", unit_scale=True, mininterval=1)
        self._bar.update(num_bytes)
        if self._bar.n >= self.total:
            self._bar.close()


def _merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts with no leaf in common, as one."""
    return {**a, **b, **{key: _merge(a[key], b[key]) for key in a.keys() & b.keys()}}
