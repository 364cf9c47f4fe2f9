"""`NixlEpMoE`, the layer of `jax_nixlep.nixlep_moe` as a Flax module: `flax.nnx` or `flax.linen`."""
