"""Elastic expert parallelism for JAX over NIXL."""

from jax_nixlep._ffi import EpError as EpError
from jax_nixlep._ffi import NixlError as NixlError
from jax_nixlep.combine import combine as combine
from jax_nixlep.config import EpConfig as EpConfig
from jax_nixlep.dispatch import dispatch as dispatch
from jax_nixlep.elastic import Change as Change
from jax_nixlep.elastic import ElasticError as ElasticError
from jax_nixlep.group import EpGroup as EpGroup
from jax_nixlep.group import current_group as current_group
from jax_nixlep.group import initialize as initialize
from jax_nixlep.group import shutdown as shutdown
from jax_nixlep.moe import MoeAux as MoeAux
from jax_nixlep.moe import nixlep_moe as nixlep_moe
from jax_nixlep.moe import param_specs as param_specs
from jax_nixlep.placement import Placement as Placement
from jax_nixlep.router import Router as Router
from jax_nixlep.routing import PEER_ABSENT as PEER_ABSENT
from jax_nixlep.routing import PEER_OK as PEER_OK
from jax_nixlep.routing import PEER_TIMED_OUT as PEER_TIMED_OUT
from jax_nixlep.routing import Handle as Handle
from jax_nixlep.routing import Received as Received
from jax_nixlep.routing import Status as Status
from jax_nixlep.split import combine_finish as combine_finish
from jax_nixlep.split import combine_start as combine_start
from jax_nixlep.split import dispatch_finish as dispatch_finish
from jax_nixlep.split import dispatch_start as dispatch_start
