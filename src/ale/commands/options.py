"""What the commands about sandboxes share: options, how a spec is made of them, and how an end is told."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ale.errors import UserError

if TYPE_CHECKING:
    from ale.sandbox import Completed, SandboxSpec

TIMED_OUT = 124  # as timeout(1) has it
PASS_ON: dict[str, Any] = {"allow_interspersed_args": False}

Backend = Annotated[
    Literal["local", "docker", "unsafe-process"],
    typer.Option("--backend", "--sandbox", help="unsafe-process has NO isolation: only for what you trust."),
]
Image = Annotated[str | None, typer.Option(metavar="NAME", help="With --backend docker: the image it stands on.")]
TemplateOption = Annotated[str | None, typer.Option("--template", metavar="NAME", help="Start from one of the hub.")]
Base = Annotated[
    list[Path] | None, typer.Option("--base", metavar="DIR", help="Start from a copy of it; repeatable, lowest first.")
]
Env = Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="Repeatable.")]
MemoryMb = Annotated[int | None, typer.Option(min=1, help="Memory of all its processes.")]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="HOST", help="Let it reach HOST by HTTP(S); repeatable. Default: no network."),
]
TimeoutS = Annotated[float, typer.Option(min=0.01, max=86400, help="Then it is killed, and the exit code is 124.")]
Stdin = Annotated[bool, typer.Option("--stdin", "-i", help="Pass on what comes on standard input, read to its end.")]
Argv = Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="A program and its arguments.")]
MaybeArgv = Annotated[
    list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="With NAME: instead of a shell.")
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A sandbox of the running service.")]
StateFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Where the service says how it is reached (default: ALE_SERVICE).")
]
AsJson = Annotated[bool, typer.Option("--json", help="The same as JSON.")]


def spec_of(
    context: typer.Context | None,
    template: str | None,
    base: list[Path] | None,
    env: list[str] | None,
    memory_mb: int | None,
    allow: list[str] | None,
    image: str | None,
) -> SandboxSpec:
    """What to start. `context`: of the command, until whose end a template stays in the hub. Raises UserError."""
    from msgspec import structs

    from ale.hub import Hub
    from ale.sandbox import Limits, Network, Rule, SandboxSpec

    given = dict[str, str]()
    for pair in env or ():
        variable, equals, value = pair.partition("=")
        if not equals or not variable:
            raise UserError(f"--env {pair}: write NAME=VALUE.")
        given[variable] = value
    for folder in base or ():
        if not folder.is_dir():
            raise UserError(f"--base {folder}: there is no such directory.")
    if template is not None and base:
        raise UserError("--template and --base exclude each other.")
    try:
        network = Network(mode="allow", rules=tuple(Rule(host=host) for host in allow)) if allow else Network()
        spec = SandboxSpec(base=tuple(map(str, base or ())), env=given, network=network, image=image)
        limits = Limits() if memory_mb is None else Limits(memory_mb=memory_mb)
        if template is not None:
            assert context is not None
            found = context.with_resource(Hub.default().using(template))
            spec = structs.replace(
                spec,
                base=tuple(map(str, found.layers)),
                workdir=found.workdir,
                env=found.env | given,
                sessions=found.sessions,
            )
            limits = found.limits if memory_mb is None else structs.replace(found.limits, memory_mb=memory_mb)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    return structs.replace(spec, limits=limits)


def argv_of(command: list[str]) -> tuple[str, ...]:
    """What stands after NAME keeps the "--" that divides it from options."""
    argv = tuple(command[1:] if command[:1] == ["--"] else command)
    if not argv:
        raise UserError("A command is missing: write it after --.")
    return argv


def standard_input() -> bytes:
    """All that comes, within what a command takes."""
    from ale.sandbox.port import MAX_FILE_BYTES

    data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"--stdin takes at most {MAX_FILE_BYTES >> 20} MiB: copy a file in instead.")
    return data


def report(done: Completed, timeout_s: float) -> int:
    """Prints what a command printed; the exit code that stands for how it ended."""
    sys.stdout.flush()
    for stream, data, dropped in ((1, done.stdout, done.stdout_dropped), (2, done.stderr, done.stderr_dropped)):
        cut = f"\n[... {dropped} bytes dropped ...]\n".encode() if dropped else b""
        view = memoryview(data[: len(data) // 2] + cut + data[len(data) // 2 :])
        while view:
            view = view[os.write(stream, view) :]
    if done.timed_out:
        print(f"ale: timed out after {timeout_s:g} s", file=sys.stderr)
        return TIMED_OUT
    if done.signal is not None:
        return 128 + done.signal
    return done.exit_code or 0
