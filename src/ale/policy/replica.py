"""One vLLM server as a run sees it: up or not, with which weights, and brought back when it is gone.

One task, the keeper, does all that changes a server: starts it, loads weights, asks after its health, starts it again.
Others say what they want (`want`, `suspect`) and wait until it is so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ale.errors import AleError, DeadlineExceeded, PolicyError, WorkerDied
from ale.policy.vllm_client import Piece, ServerGone, VllmClient
from ale.policy.vllm_process import ServerProcess
from ale.waiting import named

logger = logging.getLogger(__name__)

_BEAT_S = 5.0
_BEAT_DEADLINE_S = 10.0
_BEATS_MISSED = 3  # in a row, before a server that does not answer is given up
_LOOK_S = 0.2  # between two looks whether a server is up


class Weights(NamedTuple):
    """A version and the directory that holds it. `label` is what the server says of tokens sampled from it."""

    version: int
    path: Path

    @property
    def label(self) -> str:
        return str(self.version)


async def until_up(name: str, client: VllmClient, server: ServerProcess | None, deadline_s: float) -> None:
    """Returns when the server answers; `server`, one of our own, is started first. Raises `DeadlineExceeded`, and
    `WorkerDied` when it has ended by itself."""
    if server is not None:
        await server.start()
    try:
        async with asyncio.timeout(deadline_s):
            while not await client.healthy(_BEAT_DEADLINE_S):
                if server is not None and not server.running:
                    raise await server.death()
                await asyncio.sleep(_LOOK_S)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the start of {name}", deadline_s) from error


class Replica:
    """`weights` are the first, which a server of ours starts with. Without `command` the server is somebody else's."""

    def __init__(
        self,
        name: str,
        client: VllmClient,
        weights: Weights,
        *,
        start_deadline_s: float,
        sync_deadline_s: float,
        silence_s: float,
        restarts: int,
        command: list[str] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.client = client
        self.version: int | None = None
        self.up = False
        self.busy = 0
        """Turns being generated."""
        self.busy_s = 0.0
        """Time with a turn under way, up to the last that ended."""
        self._heard = self._began = 0.0
        self.syncs = 0
        """Changes of weights begun."""
        self.restarted = 0
        self._wanted = self._original = weights
        self._start_deadline_s, self._sync_deadline_s, self._restarts = start_deadline_s, sync_deadline_s, restarts
        self._silence_s, self._beat_s = silence_s, min(_BEAT_S, silence_s / 4)
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._suspected = self._loading = False
        self._failure: AleError | None = None
        self.server = None if command is None else ServerProcess(command, env or {}, self._wake.set)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[Replica]:
        """The keeper's life. Entering does not wait for the server: see `until_up`."""
        keeper = asyncio.create_task(self._keep(), name=f"keeper of {self.name}")
        try:
            yield self
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            if self.server is not None:
                await self.server.stop()
            await self.client.close()

    @property
    def certain(self) -> tuple[int | None, int]:
        """What came between two equal values of this was sampled from the version in it, if there is one in it."""
        return (None if self._loading else self.version), self.syncs

    @asynccontextmanager
    async def turn(self, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[Piece]]:
        """The pieces of one answer. Leaving early has the server drop the request."""
        self.heard()
        if not self.busy:
            self._began = self._heard
        self.busy += 1
        try:
            async with aclosing(self.client.generate(body)) as pieces:
                yield pieces
        finally:
            self.busy -= 1
            if not self.busy:
                self.busy_s += asyncio.get_running_loop().time() - self._began

    def heard(self) -> None:
        """Something has come of a turn: the engine computes."""
        self._heard = asyncio.get_running_loop().time()

    def want(self, weights: Weights) -> None:
        self._wanted = weights
        self._wake.set()

    def suspect(self) -> None:
        """A request has failed: look now whether the server is there."""
        self._suspected = True
        self._wake.set()

    async def until_up(self) -> None:
        """Raises what the server ended of, where it is not brought back."""
        await self._until(lambda: self.up, "to be up")

    async def until_looked_at(self) -> None:
        """Until it is known whether a suspicion is right."""
        await self._until(lambda: not self._suspected, "to be looked at")

    async def until_live(self, version: int) -> None:
        await self._until(lambda: self.up and self.version == version, f"to have version {version}")

    async def until_gone(self) -> AleError:
        """Until it is gone for good; returns why."""
        while self._failure is None:
            with named(f"the end of {self.name}", idle=True):
                await self._changed.wait()
        return self._failure

    async def _until(self, so: Callable[[], bool], what: str = "to get there") -> None:
        while not so():
            if self._failure is not None:
                raise WorkerDied(f"{self.name} is gone for good: {self._failure}") from self._failure
            with named(f"{self.name} {what}", release="its keeper"):  # whoever asks has a deadline
                await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _keep(self) -> None:
        try:
            while True:
                try:
                    await self._come_up()
                    await self._serve()
                except (PolicyError, WorkerDied, DeadlineExceeded) as error:
                    first = self.version is None
                    self.up, self._suspected = False, False
                    self._tell()
                    # What a server says no to, or has never been able to do, it would say no to again.
                    if first or self.restarted >= self._restarts or type(error) is PolicyError:
                        self._failure = error
                        return
                    self.restarted += 1
                    logger.warning("%s is gone and is brought back: %s", self.name, error)
        except Exception as error:  # a keeper must not die in silence
            self._failure = PolicyError(f"{type(error).__name__}: {error}")
            self._failure.__cause__ = error
        finally:
            self.up = False
            self._tell()

    async def _come_up(self) -> None:
        self._loading = False
        await until_up(self.name, self.client, self.server, self._start_deadline_s)
        fresh = self._wanted
        if self.server is not None and fresh == self._original:
            await self.client.label(fresh.label)
            self.version = fresh.version
        elif self.server is not None or self.version is None or await self.client.labelled() != self._wanted.label:
            await self._load()
        self.up = True
        self._tell()

    async def _serve(self) -> None:
        """As long as the server is there. Raises when it is not."""
        missed, heard, silent_s = 0, self._heard, 0.0
        while True:
            if self.version != self._wanted.version:
                await self._load()
                self._tell()
            beat = False
            try:
                async with asyncio.timeout(self._beat_s):
                    await self._wake.wait()
            except TimeoutError:
                beat = True
            self._wake.clear()
            if self.server is not None and not self.server.running:
                raise await self.server.death()
            if not (beat or self._suspected):
                continue
            # Counted in beats: while this process is stopped, or the machine sleeps, nobody can hear anything.
            silent_s = silent_s + beat * self._beat_s if self.busy and heard == self._heard else 0.0
            heard = self._heard
            # It answers, but nothing has come of any turn for so long that its engine must be stuck.
            if self.server is not None and silent_s > self._silence_s:
                raise ServerGone(f"{self.name} has generated nothing for {self._silence_s:g} s, its engine is stuck")
            missed = 0 if await self.client.healthy(_BEAT_DEADLINE_S) else missed + 1
            if missed >= _BEATS_MISSED or (missed and self._suspected):
                raise ServerGone(f"{self.name} does not answer any more")
            self._suspected = False
            self._tell()

    async def _load(self) -> None:
        """Between two tokens: nothing is computed meanwhile, and what was under way goes on under the new weights."""
        weights = self._wanted
        self.syncs += 1
        self._loading = True
        try:
            async with asyncio.timeout(self._sync_deadline_s):
                await self.client.pause()
                await self.client.load(weights.path)
                await self.client.forget_caches()
                await self.client.label(weights.label)
                await self.client.resume()
        except BaseException as error:
            if self.server is None:  # others may be served by it
                with suppress(PolicyError, TimeoutError):
                    async with asyncio.timeout(_BEAT_DEADLINE_S):
                        await self.client.resume()
            if not isinstance(error, TimeoutError):
                raise
            raise DeadlineExceeded(f"version {weights.version} to {self.name}", self._sync_deadline_s) from error
        self.version = weights.version
        self._loading = False
        self.heard()
