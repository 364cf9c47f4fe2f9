"""What the two modules share: hyperparameters, the parameters that follow from them, and the call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_nixlep.config import EpConfig
from jax_nixlep.group import current_group
from jax_nixlep.moe import Backend, MoeAux, nixlep_moe
from jax_nixlep.placement import Placement
from jax_nixlep.router import Router

Initializer = Callable[..., jax.Array]

_LECUN_NORMAL = jax.nn.initializers.lecun_normal()


class ParamSpec(NamedTuple):
    """One parameter.

    Attributes:
      init: init(key) -> array, the whole parameter.
      axes: a logical name of each dimension: "exp", "embed", "mlp", and "exp_router" for the router's outputs.
      trained: False if no gradient ever reaches it.
    """

    init: Callable[[jax.Array], jax.Array]
    axes: tuple[str, ...]
    trained: bool = True


def logical_axis_rules(
    axis: str | tuple[str, ...] = "ep", tensor_axis: str | None = None
) -> tuple[tuple[str, str | tuple[str, ...] | None], ...]:
    """Logical names -> mesh axes as `nixlep_moe` expects them, for `logical_axis_rules` of nnx and linen."""
    return (("exp", axis), ("embed", None), ("mlp", tensor_axis), ("exp_router", None))


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Hyperparameters:
    """Hyperparameters of `NixlEpMoE`. Those not described here are `jax_nixlep.nixlep_moe`'s.

    The number of ranks decides only where a parameter lives: expert slot s of the whole group is initialised from
    (seed, s), wherever it is.

    Attributes:
      config: the group's capacities. Weights are cast to `config.dtype` where they are used.
      router: how experts are chosen.
      mlp_dim: F, hidden size of an expert.
      shared_mlp_dim: F', hidden size of the expert that every token visits; 0 = there is none.
      gated: `act(x @ wi_0) * (x @ wi_1)` instead of `act(x @ wi_0)`.
      use_bias: experts have "bi_0", "bi_1" (if gated) and "bo".
      use_gate_bias: the router's logits have a bias.
      use_score_bias: a bias that chooses experts and does not weigh them; it starts at zero and gets no gradient:
        update it from `aux.load` yourself.
      param_dtype: of all parameters but `score_bias`, which is float32.
      kernel_init: of one expert's [H, F] or [F, H], and of "gate" [H, L].
      mesh: S = experts_per_rank * ranks along `axis` expert slots. None: this process holds the S = experts_per_rank
        slots of its rank.
      rank: whose slots those are; None = this process's rank in the current group.
    """

    config: EpConfig = dataclasses.field(kw_only=False)
    router: Router = dataclasses.field(kw_only=False)
    mlp_dim: int = dataclasses.field(kw_only=False)
    shared_mlp_dim: int = 0
    activation: str | Callable[..., jax.Array] = "silu"
    gated: bool = True
    use_bias: bool = False
    use_gate_bias: bool = False
    use_score_bias: bool = False
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = _LECUN_NORMAL
    mesh: jax.sharding.Mesh | None = None
    rank: int | None = None
    axis: str | tuple[str, ...] = "ep"
    token_axes: tuple[str, ...] | None = None
    tensor_axis: str | None = None
    chunk_tokens: int | None = None
    recv_capacity: int | None = None
    backend: Backend = "native"


def param_specs(h: Hyperparameters) -> dict[str, ParamSpec]:
    """The parameters of `nixlep_moe` that `h` asks for, by name."""
    hidden, features, experts = h.config.hidden, h.mlp_dim, h.router.num_experts
    zeros = jax.nn.initializers.zeros

    def whole(init: Initializer, shape: tuple[int, ...], *axes: str, dtype: Any = h.param_dtype) -> ParamSpec:
        return ParamSpec(lambda key: init(key, shape, dtype), axes)

    def stacked(init: Initializer, shape: tuple[int, ...], *axes: str) -> ParamSpec:
        def init_slots(key: jax.Array) -> jax.Array:
            first, count = _slots(h)
            keys = jax.vmap(lambda slot: jax.random.fold_in(key, slot))(first + jnp.arange(count))
            return jax.vmap(lambda slot_key: init(slot_key, shape, h.param_dtype))(keys)

        return ParamSpec(init_slots, ("exp", *axes))

    specs = {"gate": whole(h.kernel_init, (hidden, experts), "embed", "exp_router")}
    if h.use_gate_bias:
        specs["gate_bias"] = whole(zeros, (experts,), "exp_router")
    if h.use_score_bias:
        specs["score_bias"] = whole(zeros, (experts,), "exp_router", dtype=jnp.float32)._replace(trained=False)
    for name in ("0", "1") if h.gated else ("0",):
        specs[f"wi_{name}"] = stacked(h.kernel_init, (hidden, features), "embed", "mlp")
        if h.use_bias:
            specs[f"bi_{name}"] = stacked(zeros, (features,), "mlp")
        if h.shared_mlp_dim:
            specs[f"shared_wi_{name}"] = whole(h.kernel_init, (hidden, h.shared_mlp_dim), "embed", "mlp")
    specs["wo"] = stacked(h.kernel_init, (features, hidden), "mlp", "embed")
    if h.use_bias:
        specs["bo"] = stacked(zeros, (hidden,), "embed")
    if h.shared_mlp_dim:
        specs["shared_wo"] = whole(h.kernel_init, (h.shared_mlp_dim, hidden), "mlp", "embed")
    return specs


def apply(
    h: Hyperparameters,
    params: Mapping[str, jax.Array],
    x: jax.Array,
    token_mask: jax.Array | None,
    placement: Placement | None,
    after: jax.Array | None,
) -> tuple[jax.Array, MoeAux]:
    """`nixlep_moe` with the hyperparameters of `h`."""
    return nixlep_moe(
        x.astype(h.config.dtype),
        params,
        config=h.config,
        router=h.router,
        placement=placement,
        activation=h.activation,
        token_mask=token_mask,
        mesh=h.mesh,
        axis=h.axis,
        token_axes=h.token_axes,
        tensor_axis=h.tensor_axis,
        chunk_tokens=h.chunk_tokens,
        recv_capacity=h.recv_capacity,
        backend=h.backend,
        after=after,
    )


def _slots(h: Hyperparameters) -> tuple[int, int]:
    """The first expert slot that this process initialises, and how many."""
    per_rank = h.config.experts_per_rank
    if h.mesh is not None:
        axes = (h.axis,) if isinstance(h.axis, str) else h.axis
        return 0, per_rank * math.prod(h.mesh.shape[name] for name in axes)
    if h.rank is not None:
        return h.rank * per_rank, per_rank
    return (current_group().rank if h.backend == "native" else 0) * per_rank, per_rank
