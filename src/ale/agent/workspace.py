"""Where the tools act: the user's directory, behind the sandbox port. `open_workspace` chooses between two.

"local": a private copy of the directory in a sandbox (`copied.py`); changes are brought back when a task has ended.
"host": the directory itself, by processes of this user, with no isolation (`host.py`); only by explicit choice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from ale.agent.events import Settled
from ale.agent.settings import SandboxSettings
from ale.sandbox import Sandbox


class Workspace(Protocol):
    @property
    def root(self) -> str:
        """The absolute path of the workspace as the tools see it."""

    @property
    def scratch(self) -> str:
        """An absolute path for what is no part of the work: outputs that are too long for the dialogue."""

    @property
    def sandbox(self) -> Sandbox: ...

    @property
    def isolated(self) -> bool: ...

    async def refresh(self) -> tuple[str, ...]:
        """Takes in what the user changed in the directory; a line for each thing that the agent should know."""

    async def settle(self) -> Settled | None:
        """Brings the agent's changes to the user's directory; None where they are there already."""


@asynccontextmanager
async def open_workspace(
    directory: Path, settings: SandboxSettings, *, keep: Path, outputs: Path, secret: Sequence[str] = ()
) -> AsyncIterator[Workspace]:
    """`keep`: a folder outside the directory for what must not be lost (the user's former files, conflicts); `outputs`:
    one for what is too long for the dialogue. `secret`: variables of this process that commands do not get.

    Raises `SandboxUnavailable` with the cure, and `SandboxError`.
    """
    match settings.kind:
        case "local":
            from ale.agent.copied import open_copied

            async with open_copied(directory, settings, keep=keep) as copied:
                yield copied
        case "host":
            from ale.agent.host import open_host

            async with open_host(directory, scratch=outputs, secret=secret) as host:
                yield host
