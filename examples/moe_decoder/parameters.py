"""Which tensors of a checkpoint make up which parameter of the decoder, and reading a part of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_decoder.checkpoint import Checkpoint, dequantize_fp8, dequantize_mxfp4
from moe_decoder.config import ModelConfig

Path = tuple[str, ...]  # of a parameter, such as ("layers", "3", "moe", "wi_0")

_ALIGN = 64  # bytes; jax then uses the memory as it is


@dataclasses.dataclass(frozen=True)
class Source:
    """One parameter, or one expert's part of it, in the files.

    Attributes:
      name: of the tensor; "{expert}" where each expert has one.
      stacked: the tensor has all experts, along its first axis.
      transposed: matrices are [out, in] in the files and [in, out] here.
      first, step: which columns of the last axis, after transposing.
    """

    name: str
    stacked: bool = False
    transposed: bool = False
    first: int = 0
    step: int = 1


def is_expert(path: Path) -> bool:
    """Whether the parameter has a row for each expert slot."""
    return path[-2:-1] == ("moe",) and path[-1] in ("wi_0", "wi_1", "wo", "bi_0", "bi_1", "bo")


def source_of(config: ModelConfig, path: Path) -> Source:
    """Where the parameter is. Names of attention, norms and MLPs are the checkpoints' own."""
    if path[0] != "layers":
        name = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}[path[0]]
        return Source(f"{name}.weight", transposed=path[0] == "lm_head")
    layer, *module, name = path[1:]
    prefix = f"model.layers.{layer}."
    if module == ["moe"]:
        return _moe_source(config, prefix, name)
    if module:
        prefix += f"{module[0]}."
    if name == "sinks":
        return Source(prefix + name)
    if name.endswith("_bias"):
        return Source(f"{prefix}{name.removesuffix('_bias')}.bias")
    return Source(f"{prefix}{name}.weight", transposed="_proj" in name)


def _moe_source(config: ModelConfig, prefix: str, name: str) -> Source:
    block = prefix + ("block_sparse_moe." if config.family == "mixtral" else "mlp.")
    gate = block + ("router" if config.family == "gpt_oss" else "gate")
    if name in ("gate", "gate_bias", "score_bias"):
        suffix = {"gate": ".weight", "gate_bias": ".bias", "score_bias": ".e_score_correction_bias"}[name]
        return Source(gate + suffix, transposed=name == "gate")
    if config.family == "gpt_oss":  # gate and up are the even and the odd columns of one matrix, [in, out]
        joined = "down_proj" if name in ("wo", "bo") else "gate_up_proj"
        first, step = {"0": (0, 2), "1": (1, 2)}.get(name[-1], (0, 1))
        return Source(f"{block}experts.{joined}{'_bias' * name.startswith('b')}", stacked=True, first=first, step=step)
    names = ("w1", "w3", "w2") if config.family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    projection = dict(zip(("wi_0", "wi_1", "wo"), names, strict=True))[name.removeprefix("shared_")]
    where = "shared_experts" if name.startswith("shared_") else "experts.{expert}"
    return Source(f"{block}{where}.{projection}.weight", transposed=True)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter that is still in the files: an array as far as its shape and dtype go; indexing it, `np.asarray` and
    `jnp.asarray` read it.

    Attributes:
      shape, dtype: of the parameter here.
      experts: the expert in each row, -1 for none; None: not a parameter of experts.
      count: called with the number of bytes of each part that was read.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    source: Source
    shape: tuple[int, ...]
    dtype: np.dtype
    experts: tuple[int, ...] | None
    count: Callable[[int], Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[()].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        """index: a tuple of slices, shorter than the shape or as long.

        Raises:
          ValueError: the tensor is missing or of another shape; names its file, and what to do.
        """
        index = tuple(index)
        out = _aligned(_sliced(self.shape, index), self.dtype)
        if self.experts is None:
            np.copyto(out, self._tensor(None, self.shape)[index], casting="unsafe")
        else:
            for row, expert in zip(out, self.experts[index[0] if index else slice(None)], strict=True):
                if expert < 0:
                    row[...] = 0
                else:
                    np.copyto(row, self._tensor(expert, self.shape[1:])[index[1:]], casting="unsafe")
        self.count(out.nbytes)
        return out

    def _tensor(self, expert: int | None, shape: tuple[int, ...]) -> np.ndarray:
        """The whole tensor, of one expert if it is one of experts; a view of the file where nothing is quantised."""
        files, source = self.checkpoint, self.source
        name = source.name.format(expert=expert)
        if source.stacked and f"{name}_blocks" in files:
            value = dequantize_mxfp4(files[f"{name}_blocks"][expert], files[f"{name}_scales"][expert], self.dtype).T
            name += "_blocks"
        else:
            value = files[name]
            value = value[expert] if source.stacked and value.ndim and expert < len(value) else value
            if f"{name}_scale_inv" in files:
                try:
                    value = dequantize_fp8(value, files[f"{name}_scale_inv"], self.config.block, self.dtype)
                except ValueError as error:
                    raise ValueError(
                        f"load: tensor {name}_scale_inv in {files.file_of(f'{name}_scale_inv')} must {error}; "
                        "correct weight_block_size in config.json"
                    ) from None
            elif value.dtype.itemsize == 1:
                raise ValueError(
                    f"load: tensor {name} in {files.file_of(name)} must come with {name}_scale_inv, being "
                    f"{value.dtype}; got none; convert the checkpoint to bfloat16"
                )
        if source.transposed:
            value = value.T
        value = value[..., source.first :: source.step]
        if value.shape != shape:
            raise ValueError(
                f"load: tensor {name} in {files.file_of(name)} must be {list(shape)} as read (transposed: "
                f"{source.transposed}); got {list(value.shape)}; config.json and the shards do not belong together"
            )
        return value


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + _ALIGN, np.uint8)
    first = -memory.ctypes.data % _ALIGN
    return memory[first : first + size].view(dtype).reshape(shape)


def _sliced(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
    parts = [len(range(*part.indices(size))) for size, part in zip(shape, index, strict=False)]
    return (*parts, *shape[len(parts) :])
