"""Shell sessions: each command runs in a fresh shell that takes up the state of the last and leaves its own.

The state is a script that the shell itself wrote; the engine keeps it and never reads it. So a session survives the end
of all processes, can be forked with a snapshot, and a command that is killed costs nothing but its own changes.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Awaitable, Callable

from msgspec import structs

from ale.errors import SandboxError
from ale.sandbox.port import Command, Completed
from ale.sandbox.rocklet.wire import MAX_SESSION_BYTES, SESSION_FD

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_COMPLETE = b"# complete\n"  # the last line of a state that was written to its end

_BASH_STATE = r"""declare -p; declare -f; alias -p; shopt -p; printf 'cd -- %q\n' "$PWD"; umask -p; set +o"""
_SH_STATE = r"""export -p; alias -p; umask -S | sed 's/^/umask /'; export PWD; echo 'cd -- "$PWD"'; set +o"""
# What a read-only variable of the shell itself says to being declared again is not worth a word.
_SCRIPT = """\
__ale_save() {{ unset __ale_command; {{ {state}; echo '# complete'; }} > {file} 2>/dev/null; }}
[ ! -s {file} ] || . {file} 2>/dev/null
: > {file}
__ale_command=$1; shift
trap __ale_save EXIT
eval "$__ale_command"
"""

Run = Callable[[Command, bytes], Awaitable[tuple[Completed, bytes]]]


class ShellSession:
    """`run` runs a command with a session's state and gives the new one. `shell`: the path of bash, or of any sh."""

    def __init__(self, name: str, state: bytes, run: Run, shell: str) -> None:
        self.name, self.state = name, state
        self._run = run
        self._turn = asyncio.Lock()
        saved = _BASH_STATE if shell.endswith("bash") else _SH_STATE
        self._argv = (shell, "-c", _SCRIPT.format(state=saved, file=f"/dev/fd/{SESSION_FD}"), shell)

    async def exec(self, command: Command) -> Completed:
        line = command.shell if command.shell is not None else shlex.join(command.argv or ())
        typed = [f"export {_name(name)}={shlex.quote(value)}" for name, value in command.env.items()]
        if command.cwd is not None:
            typed.append(f"cd -- {shlex.quote(command.cwd)} || exit 126")
        full = structs.replace(command, argv=(*self._argv, "\n".join([*typed, line])), shell=None, env={}, cwd=None)
        async with self._turn:
            completed, state = await self._run(full, self.state)
            if state.endswith(_COMPLETE) and not completed.timed_out:
                self.state = state
            elif len(state) >= MAX_SESSION_BYTES:
                raise SandboxError(f"session {self.name!r}: its state is larger than {MAX_SESSION_BYTES} bytes")
        return completed


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"Command.env: a shell session cannot hold a variable called {name!r}")
    return name
