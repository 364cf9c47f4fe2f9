"""NVIDIA's own NIXL-EP kernels, for groups with `initialize(config, kernels="nixl_ep")`: docs/nixl_ep.md."""

from jax_nixlep.nixl_ep.ops import LowLatencyHandle as LowLatencyHandle
from jax_nixlep.nixl_ep.ops import low_latency_combine as low_latency_combine
from jax_nixlep.nixl_ep.ops import low_latency_dispatch as low_latency_dispatch
