"""`ale hub ...`: the local registry of environment templates and task packs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from ale.commands.loop import run_to_end
from ale.errors import UserError

app = typer.Typer(help="Keep environment templates and task packs, by name and content hash.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME")]
AsJson = Annotated[bool, typer.Option("--json", help="The same as JSON.")]


@app.command("add")
def add(
    name: Name,
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Tasks, or the layers of a template (lowest first), or a checkpoint."),
    ],
    workdir: Annotated[str, typer.Option(help="Of a template: where its layers appear.")] = "/app",
    memory_mb: Annotated[int | None, typer.Option(min=1, help="Of a template: memory of its sandboxes.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="Of a template.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of what has this name.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Of a template: time how long it takes to start.")] = False,
    sandbox: Annotated[Literal["local", "unsafe-process"], typer.Option(help="What --measure starts it in.")] = "local",
) -> None:
    """Add a directory of tasks (every one has to load), or layers that sandboxes start from, or a checkpoint file."""
    from ale.envs.task_dir import load_tasks
    from ale.hub import Hub
    from ale.sandbox import Limits, open_engine

    hub = Hub.default()
    is_tasks = len(sources) == 1 and _holds_tasks(sources[0])
    if is_tasks and (measure or memory_mb or env or workdir != "/app"):
        raise UserError(f"{sources[0]} holds tasks: --workdir, --memory-mb, --env and --measure are for templates.")
    if is_tasks:
        count = len(load_tasks(sources[0]))
        entry = hub.add_tasks(name, sources[0], replace=replace)
        print(f'{name}  {entry.sha256[:12]}  {count} tasks: tasks.source = "hub:{name}"')
        return
    pairs = dict(pair.partition("=")[::2] for pair in env or ())
    limits = None if memory_mb is None else Limits(memory_mb=memory_mb)
    try:
        if len(sources) == 1 and sources[0].is_file():
            entry = hub.add_checkpoint(name, sources[0], replace=replace)
        else:
            entry = hub.add_template(name, sources, workdir=workdir, env=pairs, limits=limits, replace=replace)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    print(f"{name}  {entry.sha256[:12]}  {len(entry.trees)} layers")
    if measure:

        async def timed() -> None:
            async with open_engine(sandbox, label=f"ale hub add {name}") as engine:
                starts = await hub.measure(name, engine)
            print(f"start to first command: {starts.cold_ms:.0f} ms cold, {starts.cached_ms:.0f} ms with layers cached")

        run_to_end(timed())


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List what the hub has."""
    import msgspec

    from ale.hub import Hub

    hub = Hub.default()
    entries = hub.entries()
    for damaged in hub.damaged():
        print(damaged, file=sys.stderr)
    if as_json:
        print(msgspec.json.encode(entries).decode())
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        added = time.strftime("%Y-%m-%d", time.localtime(entry.added_at))
        print(f"{entry.name:<{width}}  {entry.kind:<8}  {entry.sha256[:12]}  {added}")
    print(f"{len(entries)} in the hub")


@app.command("show")
def show(name: Name, as_json: AsJson = False) -> None:
    """Show one entry: its hash, its trees with their sizes, and how long it takes to start."""
    import msgspec

    from ale.hub import Hub

    hub = Hub.default()
    entry, starts = hub.entry(name), hub.starts(name) if hub.entry(name).kind == "template" else None
    trees = [(tree, files) for tree in entry.trees for files in [hub.files(tree)]]
    sizes = {tree: {"files": sum(file.kind == "f" for file in files), "bytes": sum(file.size for file in files)}
             for tree, files in trees}  # fmt: skip
    if as_json:
        print(msgspec.json.encode({"entry": entry, "trees": sizes, "starts": starts}).decode())
        return
    print(f"{entry.name}: a {'template' if entry.kind == 'template' else 'task pack'}, sha256 {entry.sha256}")
    for tree, size in sizes.items():
        print(f"  {tree[:12]}  {size['files']} files, {size['bytes'] / 1e6:.1f} MB")
    if entry.kind == "template":
        print(f"  workdir {entry.workdir}, memory {entry.limits.memory_mb} MB, {len(entry.sessions)} sessions")
    if starts is not None:
        print(f"  starts in {starts.cold_ms:.0f} ms cold, {starts.cached_ms:.0f} ms with its layers cached")


@app.command("verify")
def verify(name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None) -> None:
    """Read everything again and name what is not as it was added; exit code 2 when anything is not."""
    from ale.hub import Hub

    wrong = Hub.default().verify(name)
    for said in wrong:
        print(said)
    if wrong:
        raise typer.Exit(2)
    print("everything is as it was added")


@app.command("remove")
def remove(name: Name) -> None:
    """Forget a name; `gc` frees its disk."""
    from ale.hub import Hub

    Hub.default().remove(name)


@app.command("gc")
def gc() -> None:
    """Delete what no name stands for any more."""
    from ale.hub import Hub

    freed = Hub.default().gc()
    in_use = f"; {freed.in_use} are in use and stay for the next time" if freed.in_use else ""
    print(f"freed {freed.trees} trees and {freed.files} contents, {freed.bytes / 1e6:.1f} MB{in_use}")


def _holds_tasks(path: Path) -> bool:
    if (path / "task.toml").exists():
        return True
    return path.is_dir() and any((entry / "task.toml").exists() for entry in path.iterdir() if entry.is_dir())
