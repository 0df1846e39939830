"""The engine's launcher, and its successors: one that was killed is started again in its place.

Every sandbox dies with its launcher, which is told to whoever uses it; the files of the engine stay, so the next
sandboxes start as if nothing had been. A launcher that ended by itself has removed them: then there is no other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque

from ale.errors import SandboxError
from ale.sandbox.launcher_client import NAME, LauncherClient, LauncherConfig
from ale.sandbox.shielded import shielded
from ale.waiting import named, register

logger = logging.getLogger(__name__)

_RESTARTS, _WINDOW_S = 3, 3600.0


class Launchers:
    def __init__(self, config: LauncherConfig, client: LauncherClient) -> None:
        self._config, self._client = config, client
        self._lock = asyncio.Lock()
        self._restarted: deque[float] = deque()
        self._closed = False

    @classmethod
    async def start(cls, config: LauncherConfig) -> Launchers:
        return cls(config, await LauncherClient.start(config))

    @property
    def pid(self) -> int:
        """Of the one there is now."""
        return self._client.pid

    async def living(self) -> LauncherClient:
        """Raises `SandboxError` when it died and there can be no other."""
        if not self._client.gone or self._closed:
            return self._client
        with named("the restart of the sandbox launcher", on=f"process {NAME}"):  # who holds it has deadlines
            async with self._lock:
                if self._client.gone and not self._closed:
                    await shielded(self._restart())
        return self._client

    async def _restart(self) -> None:
        now = time.monotonic()
        while self._restarted and self._restarted[0] <= now - _WINDOW_S:
            self._restarted.popleft()
        if len(self._restarted) >= _RESTARTS:
            raise SandboxError(f"the sandbox launcher died, after {_RESTARTS} restarts within an hour")
        if not os.path.isdir(os.path.join(self._config.directory, "tools")):  # noqa: ASYNC240  a stat, once
            raise SandboxError("the sandbox launcher has ended, and the engine's files with it: open another engine")
        self._restarted.append(now)
        logger.warning("the sandbox launcher died, and every sandbox with it; it is started again")
        await self._client.close()
        self._client = await LauncherClient.start(self._config)
        register().counters["sandbox_launcher_restarts"] += 1

    async def close(self) -> None:
        self._closed = True
        async with self._lock:  # a restart under way ends first, or its launcher would outlive this
            await self._client.close()
