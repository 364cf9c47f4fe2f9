"""`NixlEpMoE` for `flax.nnx`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx
from flax.core.spmd import get_logical_axis_rules

from jax_nixlep.flax import _spec
from jax_nixlep.flax._spec import logical_axis_rules
from jax_nixlep.moe import MoeAux
from jax_nixlep.placement import Placement

__all__ = ["NixlEpMoE", "RouterState", "logical_axis_rules"]


class RouterState(nnx.Variable[jax.Array]):
    """A router value that no gradient reaches: `score_bias`."""


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class NixlEpMoE(_spec.Hyperparameters, nnx.Module):
    __doc__ = f"""A mixture-of-experts layer whose experts live on many ranks.

    Parameters have the names and shapes of `jax_nixlep.nixlep_moe` and carry logical axis names, with the rules
    that map them to mesh axes: those of the surrounding `nnx.logical_axis_rules`, else `logical_axis_rules(axis,
    tensor_axis)`. With a mesh they are made in their place; in a job of several processes, make them under `jax.jit`.

        layer = NixlEpMoE(config=config, router=nx.Router(num_experts=8, top_k=2), mlp_dim=512, rngs=nnx.Rngs(0))
        y, aux = layer(x)

    {_spec.Hyperparameters.__doc__}
      rngs: its "params" stream.
    """

    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, rngs: nnx.Rngs) -> None:
        rules = dict(logical_axis_rules(self.axis, self.tensor_axis)) | dict(get_logical_axis_rules())
        specs = _spec.param_specs(self)
        for name, spec in specs.items():
            variable = nnx.Param if spec.trained else RouterState
            metadata: dict[str, Any] = {"out_sharding": spec.axes, "sharding_rules": tuple(rules.items())}
            if self.mesh is not None:
                metadata["mesh"] = self.mesh
            setattr(self, name, variable(spec.init(rngs.params()), eager_sharding=self.mesh is not None, **metadata))
        self.param_names = tuple(specs)

    def __call__(
        self,
        x: jax.Array,
        token_mask: jax.Array | None = None,
        placement: Placement | None = None,
        after: jax.Array | None = None,
    ) -> tuple[jax.Array, MoeAux]:
        """x [..., H], token_mask [...] bool -> y [..., H] in `config.dtype` and `MoeAux`. See `nixlep_moe`."""
        params = {name: getattr(self, name)[...] for name in self.param_names}
        return _spec.apply(self, params, x, token_mask, placement, after)
