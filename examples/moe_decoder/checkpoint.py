"""The files of a Hugging Face checkpoint: safetensors shards, memory-mapped, with bounds on all that they say.

A tensor is read where it is needed and nowhere else: its pages belong to the page cache, not to this process.
Layout of a file: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from moe_decoder.config import read_json

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # OCP MX spec, E2M1


class Tensor(NamedTuple):
    """Where a tensor is; `start` is in bytes from the beginning of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class Checkpoint:
    """All tensors of a folder, by name. Files are mapped when first used and stay so."""

    def __init__(self, folder: Path):
        """
        Raises:
          FileNotFoundError, ValueError: a shard is missing or truncated, or not what the index says; names it.
        """
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self._maps: dict[Path, np.memmap] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
                raise ValueError(f"load: weight_map in {index} must map names to files; got {where!r:.80}; repair it")
        else:
            where = {"": "model.safetensors"}
        for name in sorted(set(where.values())):
            file = folder / name
            if file.parent != folder or not file.exists():
                raise FileNotFoundError(
                    f"load: shard {file} must exist in {folder}; got no such file; download the checkpoint again"
                )
            self.tensors |= dict(_read_header(file))
        if missing := [name for name in where if name and name not in self.tensors]:
            raise ValueError(
                f"load: {folder / where[missing[0]]} must hold the tensor {missing[0]} that {index.name} places in it; "
                f"got none ({len(missing)} are missing); download the shard again"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of its file.

        Raises:
          ValueError: there is none.
        """
        if name not in self.tensors:
            raise ValueError(
                f"load: {self.folder} must hold the tensor {name}; got {len(self.tensors)} others; "
                "config.json and the shards do not belong together: download both again"
            )
        tensor = self.tensors[name]
        if tensor.file not in self._maps:
            self._maps[tensor.file] = np.memmap(tensor.file, np.uint8, "r")
        size = tensor.dtype.itemsize * int(np.prod(tensor.shape, dtype=np.int64))
        return self._maps[tensor.file][tensor.start : tensor.start + size].view(tensor.dtype).reshape(tensor.shape)

    def file_of(self, name: str) -> Path:
        return self.tensors[name].file


def _read_header(file: Path) -> Iterator[tuple[str, Tensor]]:
    size = file.stat().st_size

    def damaged(what: str) -> ValueError:
        return ValueError(f"load: {file} must be a whole safetensors file; got {what}; download the shard again")

    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise damaged(f"{size} bytes with a header of {length}")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise damaged(f"a header that is no JSON ({error})") from None
    for name, entry in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            first, last = entry["data_offsets"]
            whole = all(isinstance(n, int) and n >= 0 for n in (*shape, first, last))
        except (KeyError, TypeError, ValueError):
            raise damaged(f"an entry {entry!r:.80} for {name}") from None
        count = 1
        for n in shape if whole else ():
            count *= n  # in Python's integers, which do not overflow
        if not whole or last - first != dtype.itemsize * count:
            raise damaged(f"{name} as {entry['dtype']} {list(shape)} in bytes {first} to {last}")
        if 8 + length + last > size:
            raise damaged(f"{size} bytes, and {name} ends at {8 + length + last}")
        yield name, Tensor(file, dtype, shape, 8 + length + first)


# --- Quantised tensors. ---


def dequantize_fp8(values: np.ndarray, scales: np.ndarray, block: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """[M, N] float8 times the float32 scale of each of its blocks (DeepSeek-V3: `weight_scale_inv`) -> [M, N].

    Raises:
      ValueError: scales are not [ceil(M / block[0]), ceil(N / block[1])].
    """
    rows, columns = block
    shape = (-(-values.shape[0] // rows), -(-values.shape[1] // columns))
    if scales.shape != shape:
        raise ValueError(f"be {list(shape)} for {list(values.shape)} in blocks of {list(block)}; got {scales.shape}")
    out = np.empty(values.shape, dtype)
    for i in range(shape[0]):
        part = slice(i * rows, (i + 1) * rows)
        scale = np.repeat(scales[i].astype(np.float32), columns)[: values.shape[1]]
        out[part] = (values[part].astype(np.float32) * scale).astype(dtype)
    return out


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """[M, G, 16] bytes of two 4-bit values each, the lower half first, times 2**(scales [M, G] - 127) -> [M, 32 G].

    Source of the format: OCP Microscaling Formats v1.0, section 5.
    """
    values = np.stack([_FP4[blocks & 15], _FP4[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], -1)
    return np.ldexp(values, scales[..., None].astype(np.int32) - 127).astype(dtype).reshape(blocks.shape[0], -1)
