"""A process's place in the job that started it, as the launcher tells it through the environment."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class RankEnv:
    """A process's place in the job that started it.

    Attributes:
      rank: of this process, 0 to `num_ranks - 1`.
      num_ranks: processes of the job.
      store: url for `jax_nixlep.store.connect`, which takes the secret from the environment by itself.
      coordinator: a free "host:port" for `jax.distributed.initialize`, or None.
    """

    rank: int
    num_ranks: int
    store: str
    coordinator: str | None = None


def rank_env(environ: Mapping[str, str] | None = None) -> RankEnv | None:
    """This process's place in its job, or None if no launcher started it.

    Reads JAX_NIXLEP_RANK, JAX_NIXLEP_NUM_RANKS, JAX_NIXLEP_STORE and JAX_NIXLEP_COORDINATOR (optional), which the
    launcher sets; another launcher may set them too. ValueError if some are missing or make no sense.
    """
    environ = os.environ if environ is None else environ
    names = ("JAX_NIXLEP_RANK", "JAX_NIXLEP_NUM_RANKS", "JAX_NIXLEP_STORE")
    rank, num_ranks, store = values = [environ.get(name) for name in names]
    if rank is None and num_ranks is None:
        return None
    if rank is None or num_ranks is None or store is None:
        missing = ", ".join(name for name, value in zip(names, values, strict=True) if value is None)
        raise ValueError(f"rank_env: {', '.join(names)} must be set together; got no {missing}; set all or none")
    if not (rank.isdecimal() and num_ranks.isdecimal() and int(rank) < int(num_ranks)):
        raise ValueError(
            f"rank_env: JAX_NIXLEP_RANK must be 0 to JAX_NIXLEP_NUM_RANKS - 1; got {rank!r} and {num_ranks!r}; "
            "correct them"
        )
    return RankEnv(int(rank), int(num_ranks), store, environ.get("JAX_NIXLEP_COORDINATOR"))
