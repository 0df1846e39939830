"""The commands about sandboxes that live in the running service; NAME is what they are called there."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ale.commands.loop import run_to_end
from ale.commands.options import (
    Allow,
    Argv,
    AsJson,
    Base,
    Env,
    Image,
    MemoryMb,
    Name,
    StateFile,
    Stdin,
    TemplateOption,
    TimeoutS,
    argv_of,
    report,
    spec_of,
    standard_input,
)
from ale.errors import UserError

if TYPE_CHECKING:
    from ale.sandbox import Completed
    from ale.sandbox.remote import RemoteEngine


def start(
    name: Name,
    template: TemplateOption = None,
    base: Base = None,
    image: Image = None,
    env: Env = None,
    memory_mb: MemoryMb = None,
    allow: Allow = None,
    label: Annotated[str, typer.Option(help="The run that it belongs to.")] = "",
    state_file: StateFile = None,
) -> None:
    """Start a sandbox in the running service."""
    from msgspec import structs

    spec = structs.replace(spec_of(None, None, base, env, memory_mb, allow, image), label=label)

    async def begin() -> None:
        async with service_at(state_file) as service:
            await service.make(name, spec, template=template)

    run_to_end(begin())
    print(name)


def execute(
    name: Name,
    command: Argv,
    session: Annotated[str | None, typer.Option(help="Of a shell whose directory and variables carry over.")] = None,
    timeout_s: TimeoutS = 3600.0,
    stdin: Stdin = False,
    state_file: StateFile = None,
) -> None:
    """Run one command in a sandbox of the service, print what it printed, and end with its exit code."""
    from ale.sandbox import Command

    wanted = Command(argv=argv_of(command), stdin=standard_input() if stdin else b"", timeout_s=timeout_s)

    async def once() -> Completed:
        async with service_at(state_file) as service:
            sandbox = await service.attach(name)
            return await sandbox.run(wanted, session)

    raise typer.Exit(report(run_to_end(once()), timeout_s))


def stop(names: Annotated[list[str], typer.Argument(metavar="NAME...")], state_file: StateFile = None) -> None:
    """Stop sandboxes of the service; nothing of them is left."""

    async def end() -> None:
        async with service_at(state_file) as service:
            for name in names:
                await service.attach(name)  # so that a name that is wrong is told
            await service.stop(names)

    run_to_end(end())


def ps(as_json: AsJson = False, state_file: StateFile = None) -> None:
    """List the sandboxes of the running service, and the engines of this machine with the runs that they belong to."""
    import msgspec

    from ale.sandbox import engines
    from ale.sandbox.wire import SandboxInfo
    from ale.service import address

    async def listed() -> tuple[SandboxInfo, ...]:
        async with service_at(state_file) as service:
            return await service.sandboxes()

    found = address.read(state_file or address.default_path())
    sandboxes = run_to_end(listed()) if found is not None and found.alive else ()
    machine = engines()
    if as_json:
        print(msgspec.json.encode({"sandboxes": sandboxes, "engines": machine}).decode())
        return
    rows: list[tuple[str, ...]] = [("NAME", "ID", "AGE", "IDLE", "COMMANDS", "ALARMS")]
    for one in sandboxes:
        idle = "busy" if one.busy else _duration(one.idle_s)
        commands = str(one.seen.statistics.commands)
        rows.append((one.name, one.id, _duration(one.age_s), idle, commands, str(len(one.seen.alarms))))
    _table(rows)
    print()
    rows = [("ENGINE", "PROCESS", "AGE", "SANDBOXES", "RUN")]
    for engine in machine:
        said = str(engine.pid) if engine.alive else "dead: sweep"
        age = _duration(time.time() - engine.started_at)
        rows.append((engine.name, said, age, str(engine.sandboxes), engine.label))
    _table(rows)


def logs(name: Name, as_json: AsJson = False, state_file: StateFile = None) -> None:
    """Show what a sandbox was asked to do, what it tried to reach, and the alarms that it raised."""
    import msgspec

    from ale.sandbox.wire import Log

    async def asked() -> Log:
        async with service_at(state_file) as service:
            return await (await service.attach(name)).read_log()

    log = run_to_end(asked())
    if as_json:
        print(msgspec.json.encode(log).decode())
        return
    for entry in log.commands:
        end = (
            "timed out" if entry.timed_out else f"signal {entry.signal}" if entry.signal else f"exit {entry.exit_code}"
        )
        took = "did not end" if entry.duration_s is None else f"{end}, {entry.duration_s:.3f} s"
        print(f"{time.strftime('%H:%M:%S', time.localtime(entry.at))}  {one_line(entry.line)}  [{took}]")
    for event in log.events:
        verdict = "allowed" if event.allowed else f"refused: {event.reason}"
        print(f"command {event.command}  {event.kind} {one_line(f'{event.host}:{event.port}')}  [{verdict}]")
    for alarm in log.alarms:
        print(f"command {alarm.command}  alarm {alarm.rule} ({alarm.action}): {one_line(alarm.evidence)}")


def stats(as_json: AsJson = False, state_file: StateFile = None) -> None:
    """Show what the service has done, what it may use, and what its machine enforces."""
    import msgspec

    from ale.sandbox.wire import ServiceInfo

    async def asked() -> ServiceInfo:
        async with service_at(state_file) as service:
            return await service.info()

    info = run_to_end(asked())
    if as_json:
        print(msgspec.json.encode(info).decode())
        return
    rows: list[tuple[str, ...]] = [(name, f"{value:g}") for name, value in info.statistics.items()]
    rows += [("sandboxes of this token", f"{info.sandboxes} of {info.max_sandboxes}"), *info.capabilities.items()]
    _table(rows)


def copy(
    source: Annotated[str, typer.Argument(help="A path here, or NAME:PATH.")],
    target: Annotated[str, typer.Argument(help="NAME:PATH, or a path here.")],
    max_mb: Annotated[int, typer.Option(min=1, help="Largest copy.")] = 4096,
    state_file: StateFile = None,
) -> None:
    """Copy a file or tree into a sandbox of the service, or out of one."""
    inside, outside = _place(source), _place(target)
    if (inside is None) == (outside is None):
        raise UserError("cp: exactly one of the two is NAME:PATH, a path in a sandbox; ./a:b is a path here.")

    here = Path(target)
    if inside is not None and here.is_dir():
        here /= Path(inside[1]).name

    async def transfer() -> None:
        async with service_at(state_file) as service:
            if outside is not None:
                sandbox = await service.attach(outside[0])
                await sandbox.upload(Path(source), outside[1], max_bytes=max_mb << 20)
            elif inside is not None:
                sandbox = await service.attach(inside[0])
                left_out = await sandbox.download(inside[1], here, max_bytes=max_mb << 20)
                if left_out:
                    print(f"{left_out} devices, pipes and sockets were left out", file=sys.stderr)

    try:
        run_to_end(transfer())
    except OSError as error:
        raise UserError(f"cp: {error.filename or source}: {error.strerror}.") from error


def fork(
    name: Name,
    names: Annotated[list[str], typer.Argument(metavar="NEW...", help="What the copies are called.")],
    state_file: StateFile = None,
) -> None:
    """Start copies of a sandbox of the service: its files and sessions. Its running processes end."""

    async def split() -> None:
        async with service_at(state_file) as service:
            await (await service.attach(name)).branch(names)

    run_to_end(split())
    print("\n".join(names))


@asynccontextmanager
async def service_at(state_file: Path | None) -> AsyncIterator[RemoteEngine]:
    """A client of the running service. Raises UserError when there is none."""
    from ale.sandbox.remote import open_remote
    from ale.service.address import find

    address = find(state_file)
    async with open_remote(address.url, address.token) as engine:
        yield engine


def _place(path: str) -> tuple[str, str] | None:
    """The sandbox and path of NAME:PATH; None: a path here."""
    name, colon, inside = path.partition(":")
    return (name, inside) if colon and inside and "/" not in name else None


def one_line(text: str) -> str:
    """What came from inside must not steer this terminal."""
    return "".join(char if char.isprintable() else "\\n" if char == "\n" else "?" for char in text)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (one_line(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
