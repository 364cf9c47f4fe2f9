"""One rank of `test_namespaces`: python namespaces.py RANK STORE. Prints how it reached its peer."""

import sys

import numpy as np
from test_ops import make_config, make_input

import jax_nixlep as nx

rank, store = int(sys.argv[1]), sys.argv[2]
config = make_config()
group = nx.initialize(config, rank=rank, members=[0, 1], store=store, init_timeout_s=60, timeout_s=30)
x, ids, weights = make_input(config, rank, 6, 0)
for _ in range(20):
    received = nx.dispatch(x, ids, weights, config=config)
    y = nx.combine(received.tokens, received.handle, config=config)
served = np.where((ids >= 0) & (ids < config.num_slots), weights, 0).sum(1, keepdims=True)
np.testing.assert_allclose(y, served * x, rtol=1e-5, atol=1e-4)
print("right, over", group.health().peers[1 - rank].path, flush=True)
nx.shutdown()
