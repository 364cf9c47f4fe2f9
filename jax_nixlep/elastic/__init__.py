"""Groups that grow, shrink and survive deaths while they serve. `EpGroup` is their public face.

protocol.py     who is a member: the log's meaning, a pure function
log.py          the log in the store
rank.py         one rank: what its user calls
boundary.py     between two steps: stop, switch, go on
follower.py     the thread that follows the log
preparation.py  connecting, and filling new slots, while all serve
state.py        what the threads of a rank share, and tell its user
links.py        the ranks this one is connected to        weights.py  weights that other ranks can read
mesh.py         `ElasticMesh`: the mesh and the placement of a model, from membership to membership
"""

from jax_nixlep.elastic.mesh import ElasticMesh
from jax_nixlep.elastic.rank import Elastic, run
from jax_nixlep.elastic.state import Change, ElasticError, Restore, Switch

__all__ = ["Change", "Elastic", "ElasticError", "ElasticMesh", "Restore", "Switch", "run"]
