"""`ale sandbox ...`. `run` and `shell` without NAME have a sandbox of their own in this process; what lives between two
commands is owned by the service (`ale sandbox serve`), and NAME is the name of a sandbox there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ale.commands import boxes
from ale.commands.loop import run_to_end
from ale.commands.options import (
    PASS_ON,
    Allow,
    Argv,
    Backend,
    Base,
    Env,
    Image,
    MaybeArgv,
    MemoryMb,
    StateFile,
    Stdin,
    TemplateOption,
    TimeoutS,
    argv_of,
    report,
    spec_of,
    standard_input,
)

if TYPE_CHECKING:
    from ale.sandbox import Completed, Sandbox

app = typer.Typer(help="Run and keep sandboxes.", no_args_is_help=True)

# -- in this process


@app.command("run", context_settings=PASS_ON)
def run(
    context: typer.Context,
    command: Argv,
    backend: Backend = "local",
    image: Image = None,
    template: TemplateOption = None,
    base: Base = None,
    env: Env = None,
    memory_mb: MemoryMb = None,
    allow: Allow = None,
    timeout_s: TimeoutS = 3600.0,
    stdin: Stdin = False,
) -> None:
    """Run one command in a sandbox of its own, print what it printed, and end with its exit code."""
    from ale.sandbox import Command, open_engine

    spec = spec_of(context, template, base, env, memory_mb, allow, image)
    wanted = Command(argv=argv_of(command), stdin=standard_input() if stdin else b"", timeout_s=timeout_s)

    async def once() -> Completed:
        async with (
            open_engine(backend, label=f"ale sandbox run {' '.join(command)}") as engine,
            engine.start(spec) as sandbox,
        ):
            return await sandbox.exec(wanted)

    raise typer.Exit(report(run_to_end(once()), timeout_s))


@app.command("shell", context_settings=PASS_ON)
def shell(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A sandbox of the running service; none: a fresh one.")
    ] = None,
    command: MaybeArgv = None,
    backend: Backend = "local",
    image: Image = None,
    template: TemplateOption = None,
    base: Base = None,
    env: Env = None,
    memory_mb: MemoryMb = None,
    allow: Allow = None,
    state_file: StateFile = None,
) -> None:
    """Work in a sandbox from this terminal. The end of the shell is the end of a fresh sandbox."""
    from ale.commands.attach import attach, size
    from ale.sandbox import Command, open_engine

    wanted = Command(
        argv=argv_of(command) if command else None,
        shell=None if command else 'if [ -x "$(command -v bash)" ]; then exec bash; else exec sh; fi',
        env={"TERM": os.environ.get("TERM") or "xterm"},
    )

    async def work(sandbox: Sandbox) -> int:
        rows, columns = size()
        async with sandbox.terminal(wanted, rows=rows, columns=columns) as terminal:
            return await attach(terminal)

    async def session() -> int:
        if name is not None:
            async with boxes.service_at(state_file) as service:
                return await work(await service.attach(name))
        spec = spec_of(context, template, base, env, memory_mb, allow, image)
        async with open_engine(backend, label="ale sandbox shell") as engine, engine.start(spec) as sandbox:
            return await work(sandbox)

    raise typer.Exit(run_to_end(session()))


# -- the service


@app.command("serve")
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    beyond_loopback: Annotated[
        bool, typer.Option("--beyond-loopback", help="Allow another host than loopback; put TLS in front.")
    ] = False,
    backend: Backend = "local",
    image: Image = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Further tenants: lines of NAME TOKEN; mode 0600.")
    ] = None,
    sandboxes: Annotated[int, typer.Option(min=1, help="At most so many of one token.")] = 64,
    memory_mb: Annotated[int | None, typer.Option(min=1, help="Memory promised to all sandboxes together.")] = None,
    warm: Annotated[int, typer.Option(min=0, help="Sandboxes kept warm for each kind that is asked for.")] = 0,
    idle_s: Annotated[float, typer.Option(min=1, help="Close what nothing was asked of for so long.")] = 1800.0,
    state_file: StateFile = None,
) -> None:
    """Keep sandboxes for other programs and commands, over REST, until Ctrl-C. Closing it closes them all."""
    from ale.commands.serve import Settings, serve_until_told

    settings = Settings(
        host=host,
        port=port,
        beyond_loopback=beyond_loopback,
        backend=backend,
        image=image,
        token_file=token_file,
        sandboxes=sandboxes,
        memory_mb=memory_mb,
        warm=warm,
        idle_s=idle_s,
        state_file=state_file,
    )
    run_to_end(serve_until_told(settings, lambda said: print(said, flush=True)))


app.command("start")(boxes.start)
app.command("exec", context_settings=PASS_ON)(boxes.execute)
app.command("stop")(boxes.stop)
app.command("ps")(boxes.ps)
app.command("logs")(boxes.logs)
app.command("stats")(boxes.stats)
app.command("cp")(boxes.copy)
app.command("fork")(boxes.fork)


@app.command("sweep")
def sweep(
    docker: Annotated[
        bool, typer.Option("--docker", help="Also what dead engines left with the Docker daemon.")
    ] = False,
    state_file: StateFile = None,
) -> None:
    """Remove what engines and services that were killed left. Never touches what is alive, or not an engine's."""
    from ale.sandbox import sweep as sweep_engines
    from ale.service import address

    swept = sweep_engines()
    for engine in swept:
        print(f"removed {engine.name}: process {engine.pid}, {boxes.one_line(engine.label)}")
    count = len(swept)
    if address.forget_dead(state_file):
        print("removed the address of a service that was killed")
        count += 1
    if docker:
        for name in run_to_end(_sweep_docker()):
            print(f"removed from Docker what {name} left")
            count += 1
    if not count:
        print("nothing was left behind")


async def _sweep_docker() -> list[str]:
    from ale.sandbox.docker.daemon import connect
    from ale.sandbox.docker.sweep import sweep

    daemon = await connect(None)
    try:
        return await sweep(daemon)
    finally:
        await daemon.close()
