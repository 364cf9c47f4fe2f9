"""`NixlEpMoE` for `flax.linen`."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from jax_nixlep.flax import _spec
from jax_nixlep.flax._spec import logical_axis_rules
from jax_nixlep.moe import MoeAux
from jax_nixlep.placement import Placement

__all__ = ["NixlEpMoE", "logical_axis_rules"]


class NixlEpMoE(_spec.Hyperparameters, nn.Module):
    __doc__ = f"""A mixture-of-experts layer whose experts live on many ranks.

    Parameters have the names and shapes of `jax_nixlep.nixlep_moe` and are boxed with their logical axis names
    (`nn.with_logical_partitioning`); `logical_axis_rules(axis, tensor_axis)` maps those to mesh axes. `score_bias`,
    which no gradient reaches, is in the collection "router_state" and not in "params".

        layer = NixlEpMoE(config=config, router=nx.Router(num_experts=8, top_k=2), mlp_dim=512)
        variables = nn.unbox(layer.init(jax.random.key(0), x))
        y, aux = layer.apply(variables, x)

    {_spec.Hyperparameters.__doc__}
    """

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        token_mask: jax.Array | None = None,
        placement: Placement | None = None,
        after: jax.Array | None = None,
    ) -> tuple[jax.Array, MoeAux]:
        """x [..., H], token_mask [...] bool -> y [..., H] in `config.dtype` and `MoeAux`. See `nixlep_moe`."""
        params: dict[str, Any] = {}
        for name, spec in _spec.param_specs(self).items():
            init = nn.with_logical_partitioning(spec.init, spec.axes)
            if spec.trained:
                params[name] = self.param(name, init)
            else:
                state = self.variable("router_state", name, lambda init=init: init(self.make_rng("params")))
                params[name] = state.value
        return _spec.apply(self, params, x, token_mask, placement, after)
