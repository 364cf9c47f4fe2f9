"""A rank's process, as the front end holds it: started, told, heard and stopped."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from jax_nixlep.store import SECRET_VARIABLE
from serving.worker import Settings

_EXAMPLES = Path(__file__).parents[1]
_LAST_LINES = 20  # of what a rank printed, to say why it ended
_STOP_S = 5.0  # between asking a process to end and killing it
_MAX_LINE_BYTES = 1 << 20
_log = logging.getLogger(__name__)


class RankProcess:
    """See `serving.worker` for what is said. It ends when this process does.

    Attributes:
      settings: what it was started with.
    """

    def __init__(self, settings: Settings, process: asyncio.subprocess.Process):
        self.settings, self._process = settings, process
        self._last_lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._errors = asyncio.create_task(self._follow_errors())

    @classmethod
    async def start(cls, settings: Settings, secret: str, program_cache: str) -> RankProcess:
        """Starts `settings.rank`.

        Args:
          secret: of the store.
          program_cache: folder of compiled programs. All ranks compile the same: those that come later find them.
        """
        env = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",  # ranks share the cores; each uses few
            "NPROC": str(max(1, len(os.sched_getaffinity(0)) // settings.max_ranks)),
            "JAX_COMPILATION_CACHE_DIR": program_cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_EXAMPLES), os.environ.get("PYTHONPATH")])),
            SECRET_VARIABLE: secret,
        }
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serving.worker"),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=env,
            limit=_MAX_LINE_BYTES,
            start_new_session=True,  # a terminal's Ctrl-C is for the front end
        )
        started = cls(settings, process)
        started.tell(**dataclasses.asdict(settings))
        return started

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, **message: Any) -> None:
        """Sends a message; it is dropped if the process is ending."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """What it says, until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if line.endswith(b"\n"):  # a killed process may leave half a line
                yield json.loads(line)

    async def wait(self) -> str:
        """Returns how it ended: the status and its last lines."""
        status = await self._process.wait()
        await self._errors
        return "\n".join([f"status {status}", *self._last_lines])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            self._process.kill()

    async def stop(self) -> None:
        """Asks it to end, and sees to it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_S)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    async def _follow_errors(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            self._last_lines.append(text)
            _log.info("rank %d: %s", self.settings.rank, text)
