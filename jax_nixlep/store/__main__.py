"""`python -m jax_nixlep.store`: a store server of its own, until Ctrl-C or SIGTERM.

The secret comes from the environment variable JAX_NIXLEP_SECRET only: a command line is visible to every user.
"""

from __future__ import annotations

import argparse
import signal
import sys

from jax_nixlep.store import StoreError
from jax_nixlep.store.tcp import StoreServer


def main() -> int:
    """Serve, print the url, and wait."""
    parser = argparse.ArgumentParser(prog="python -m jax_nixlep.store", description="Serve a jax_nixlep store.")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; other than loopback needs a secret")
    parser.add_argument("--port", type=int, default=7011, help="0 = any free port")
    args = parser.parse_args()
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # before the server's threads, which inherit it
    try:
        with StoreServer(args.host, args.port) as server:
            print(server.url, flush=True)
            signal.sigwait(stops)
    except StoreError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
