"""Finds the library with NVIDIA's NIXL-EP kernels, and what it can do."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import mmap
import re
import sysconfig
from pathlib import Path

import jax.numpy as jnp

from jax_nixlep._ffi import NixlError
from jax_nixlep.config import EpConfig

_REMEDY = 'or use kernels="native"'

# What the library does not say, read from the source of nixl 1.4 and 1.5 (examples/device/ep/csrc).
RANKS_PER_HOST = 8  # max_ranks: fewer, or a multiple
MAX_TOKENS = 1024  # per rank; more was not seen in use
ROWS = 4  # max_ranks * max_tokens_per_rank: a multiple
FP8_HIDDEN = 512  # hidden with wire="fp8_e4m3": a multiple
EXPERTS_PER_SM = 14  # experts of all ranks: at most so many for each SM, and at least two


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a library was compiled for, read from the names of its kernels."""

    hidden: tuple[int, ...]
    top_k: int


def find_library() -> Path:
    """Path of nixl_ep_cpp_torch*.so of the installed wheel, ready to be loaded: torch, which it links, is imported.

    Raises:
      NixlError: the wheel has none for this Python.
      ImportError: torch is missing.
    """
    spec = importlib.util.find_spec("nixl_ep_cu13")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    found = {
        (int(match[1]), int(match[2])): path
        for path in (folder.glob(f"nixl_ep_cpp_torch*{suffix}") if folder else ())
        if (match := re.fullmatch(r"nixl_ep_cpp_torch(\d)(\d+)", path.name[: -len(suffix)]))
    }
    if not found:
        raise NixlError(
            f'initialize: kernels="nixl_ep" must find nixl_ep_cpp_torch*{suffix} in the nixl-cu13 wheel; it is not in '
            f"{folder or 'any installed one'}; `pip install --no-deps nixl nixl-cu13` (1.5 or newer), {_REMEDY}"
        )
    try:
        import torch  # the library links torch's: they are then in the process
    except ImportError as error:
        raise ImportError(
            'initialize: kernels="nixl_ep" must have torch, since NVIDIA\'s kernels are in an extension of it (nothing '
            f"else here uses torch); importing it failed: {error}; `pip install torch`, {_REMEDY}"
        ) from error
    running = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    # The kernels use nothing of torch, so that a library for another version of it serves as well.
    return found[min(found, key=lambda version: (version != running, abs(version[1] - running[1])))]


@functools.cache
def read_limits(library: Path) -> Limits:
    """Of the kernels in `library`.

    Raises:
      NixlError: they have other names than in nixl 1.4 and 1.5.
    """
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        kernels = set(re.findall(rb"nixl_ep10ep_kernels7combineILb0ELi(\d+)ELi(\d+)ELi\d+E", data))
    if not kernels:
        raise NixlError(
            f"initialize: {library.name} must hold nixl_ep::ep_kernels::combine<false, hidden, top_k, ...> (so do nixl "
            f"1.4.1 and 1.5.1); it does not; install one of these versions, {_REMEDY}"
        )
    return Limits(tuple(sorted(int(hidden) for hidden, _ in kernels)), min(int(top_k) for _, top_k in kernels))


def check_config(config: EpConfig, limits: Limits, num_sms: int) -> None:
    """Refuses what the kernels cannot do.

    Raises:
      ValueError: names the field, what it must be, and what to do.
    """

    def require(ok: bool, name: str, must: str, got: object = None) -> None:
        if not ok:
            got = getattr(config, name) if got is None else got
            raise ValueError(f'initialize: {name} must {must} for kernels="nixl_ep"; got {got}; change it, {_REMEDY}')

    ranks, experts, tokens = config.max_ranks, config.num_slots, config.max_tokens_per_rank
    require(config.dtype == jnp.bfloat16, "dtype", "be bfloat16", config.dtype.name)
    require(config.hidden in limits.hidden, "hidden", f"be one of {list(limits.hidden)}")
    require(
        config.wire != "fp8_e4m3" or config.hidden % FP8_HIDDEN == 0,
        "hidden",
        f'be a multiple of {FP8_HIDDEN} with wire="fp8_e4m3"',
    )
    require(config.top_k <= limits.top_k, "top_k", f"be at most {limits.top_k}")
    require(
        ranks < RANKS_PER_HOST or ranks % RANKS_PER_HOST == 0,
        "max_ranks",
        f"be less than {RANKS_PER_HOST} or a multiple of it",
    )
    require(tokens <= MAX_TOKENS, "max_tokens_per_rank", f"be at most {MAX_TOKENS}")
    require(ranks * tokens % ROWS == 0, "max_ranks * max_tokens_per_rank", f"be a multiple of {ROWS}", ranks * tokens)
    most = EXPERTS_PER_SM * num_sms
    require(2 <= experts <= most, "max_ranks * experts_per_rank", f"be in [2, {most}]", experts)
    require(
        config.recv_capacity is None or config.recv_capacity >= config.worst_case_rows(),
        "recv_capacity",
        f"be None, or at least {config.worst_case_rows()}, since its kernels drop nothing",
    )
