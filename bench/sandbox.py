"""Local sandboxes: starts, commands, forks, a thousand at once; and `--soak N` lifecycles with flat memory, fds, disk.

    python -m bench.sandbox                                     the rows below
    python -m bench.sandbox --swe-rex /path/to/venv/bin/python  paired with SWE-ReX's local runtime, installed there
    python -m bench.sandbox --soak 20000                        no timing: prints what grew

SWE-ReX's local runtime isolates nothing; it is what a command costs there against what it costs behind namespaces.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from ale.sandbox import Capacity, Command, Limits, SandboxEngine, SandboxSpec, open_engine, open_pool
from bench.harness import benchmark, median_ms

T = TypeVar("T")

STARTS, COMMANDS, FORKS = 15, 200, 20
WAYS, AT_ONCE, ALIVE = 64, 64, 1000
FILES = 2000
TRUE = Command(argv=("true",))
SMALL = Limits(memory_mb=64, pids=16, tmp_mb=1)
# Below this many, a soak has not yet reached what it settles at.
SETTLE = 200

SWE_REX = """
import asyncio, statistics, sys, time
from swerex.deployment.local import LocalDeployment
from swerex.runtime.abstract import BashAction, Command, CreateBashSessionRequest

async def median_ms(times, once):
    figures = []
    for _ in range(times):
        begin = time.perf_counter()
        await once()
        figures.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(figures)

async def main(figure, commands, ways):
    deployment = LocalDeployment()
    begin = time.perf_counter()
    await deployment.start()
    runtime = deployment.runtime
    await runtime.execute(Command(command=["true"]))
    value = (time.perf_counter() - begin) * 1e3
    if figure == "command_ms":
        value = await median_ms(commands, lambda: runtime.execute(Command(command=["true"])))
    if figure == "session_ms":
        await runtime.create_session(CreateBashSessionRequest())
        value = await median_ms(commands // 10, lambda: runtime.run_in_session(BashAction(command="true")))
    if figure == "rate":
        async def client():
            for _ in range(commands // 10):
                await runtime.execute(Command(command=["true"]))
        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(ways)))
        value = ways * (commands // 10) / (time.perf_counter() - begin)
    await deployment.stop()
    print("figure:", value)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


@contextmanager
def on_loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


class Bench:
    """The measurements, each of one figure, on one open engine."""

    def __init__(self, engine: SandboxEngine, tree: Path) -> None:
        self.engine, self.tree = engine, tree

    async def cold_ms(self) -> float:
        figures = []
        for _ in range(STARTS):
            begin = time.perf_counter()
            async with self.engine.start(SandboxSpec()) as sandbox:
                await sandbox.exec(TRUE)
                figures.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(figures)

    async def warm_ms(self) -> float:
        figures = []
        async with open_pool(self.engine, Capacity(count=16), max_warm=2) as pool:
            async with pool.start(SandboxSpec()):
                pass
            for _ in range(STARTS):
                while not pool.pool_statistics().warm:  # noqa: ASYNC110  the time in which an episode would run
                    await asyncio.sleep(0.002)
                begin = time.perf_counter()
                async with pool.start(SandboxSpec()) as sandbox:
                    await sandbox.exec(TRUE)
                    figures.append((time.perf_counter() - begin) * 1e3)
            if pool.pool_statistics().hits != STARTS:
                raise RuntimeError(f"not all starts were warm: {pool.pool_statistics()}")
        return statistics.median(figures)

    async def command_ms(self) -> float:
        async with self.engine.start(SandboxSpec()) as sandbox:
            return await median_ms(COMMANDS, lambda: sandbox.exec(TRUE))

    async def session_ms(self) -> float:
        async with self.engine.start(SandboxSpec()) as sandbox:
            session = sandbox.session()
            return await median_ms(COMMANDS // 4, lambda: session.exec(Command(shell="true")))

    async def commands_per_s(self) -> float:
        """64 sandboxes, each with one command after another."""
        async with AsyncExitStack() as stack:
            sandboxes = [
                await stack.enter_async_context(self.engine.start(SandboxSpec(limits=SMALL))) for _ in range(WAYS)
            ]

            async def client(number: int) -> None:
                for _ in range(COMMANDS // 4):
                    await sandboxes[number].exec(TRUE)

            begin = time.perf_counter()
            await asyncio.gather(*map(client, range(WAYS)))
            return WAYS * (COMMANDS // 4) / (time.perf_counter() - begin)

    async def fork_ms(self) -> float:
        """A live sandbox of 2,000 files and a change of its own, forked; its processes end, the fork's start later."""
        figures = []
        async with self.engine.start(SandboxSpec(base=(str(self.tree),))) as sandbox:
            for number in range(FORKS):
                await sandbox.write_file(f"change{number}", b"x")
                begin = time.perf_counter()
                async with sandbox.fork(1):
                    figures.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(figures)

    async def fork_to_command_ms(self) -> float:
        figures = []
        async with self.engine.start(SandboxSpec(base=(str(self.tree),))) as sandbox:
            for number in range(STARTS):
                await sandbox.write_file(f"change{number}", b"x")
                begin = time.perf_counter()
                async with sandbox.fork(1) as (fork,):
                    await fork.exec(TRUE)
                    figures.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(figures)

    async def forks_ms(self) -> float:
        async with self.engine.start(SandboxSpec(base=(str(self.tree),))) as sandbox:
            await sandbox.write_file("change", b"x")
            begin = time.perf_counter()
            async with sandbox.fork(AT_ONCE):
                return (time.perf_counter() - begin) * 1e3

    async def thousand(self) -> tuple[float, float]:
        """(seconds to start 1,000 that stay alive, private MB of each: the rocklet and bwrap's monitor)."""
        gate = asyncio.Semaphore(16)
        async with AsyncExitStack() as stack:

            async def start() -> None:
                async with gate:
                    manager = self.engine.start(SandboxSpec(limits=SMALL))
                    sandbox = await manager.__aenter__()
                    stack.push_async_exit(manager)
                    await sandbox.exec(TRUE)

            begin = time.perf_counter()
            await asyncio.gather(*(start() for _ in range(ALIVE)))
            took_s = time.perf_counter() - begin
            if self.engine.statistics().alive != ALIVE:
                raise RuntimeError(f"{self.engine.statistics().alive} alive")
            return took_s, private_kb(self.engine) / ALIVE / 1024


def private_kb(engine: SandboxEngine) -> int:
    """Memory that only the engine's sandboxes hold: private pages of every process in them."""
    name = Path(engine.capabilities()["state"]).name
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes()
            inside = words.startswith(b"/.rocklet") and f"/{name}/" in (entry / "mountinfo").read_text()
            monitor = b"/bwrap\0" in words[:200] and name.encode() in words
            if inside or monitor:
                rollup = (entry / "smaps_rollup").read_text()
                total += sum(map(int, re.findall(r"^Private_\w+:\s+(\d+) kB", rollup, re.MULTILINE)))
        except (OSError, ValueError):
            continue
    return total


def make_tree(folder: Path) -> None:
    for number in range(FILES):
        path = folder / str(number // 100) / str(number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(10_000))


@asynccontextmanager
async def opened() -> AsyncIterator[Bench]:
    with tempfile.TemporaryDirectory() as folder:
        make_tree(Path(folder))
        async with open_engine("local") as engine:
            yield Bench(engine, Path(folder))


async def is_right(measured: Bench) -> bool:
    """Output, exit code, state of a session, and the files of a fork are what they should be."""
    async with measured.engine.start(SandboxSpec(base=(str(measured.tree),))) as sandbox:
        done = await sandbox.exec(Command(shell="find . -type f | wc -l; exit 3"))
        await sandbox.session().exec(Command(shell="cd 3; x=1"))
        await sandbox.write_file("change", b"mine")
        async with sandbox.fork(2) as (one, two):
            await one.write_file("change", b"other")
            seen = await two.read_file("change"), await one.read_file("change")
            state = await two.session().exec(Command(shell="echo $x; ls | wc -l"))
    return (done.text(), done.exit_code, seen, state.text()) == (f"{FILES}\n", 3, (b"mine", b"other"), "1\n100\n")


def swe_rex(python: str, figure: str) -> float:
    """One figure of SWE-ReX's local runtime: start_ms, command_ms, session_ms or rate."""
    command = [python, "-c", SWE_REX, figure, str(COMMANDS), str(WAYS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        raise SystemExit(f"SWE-ReX did not run: {done.stderr[-2000:]}")
    # Its log goes to the same place.
    (said,) = re.findall(r"^figure: (\S+)$", done.stdout, re.MULTILINE)
    return float(said)


def compare(python: str | None) -> None:
    with on_loop() as loop, benchmark("sandbox", pairs=3) as bench:
        manager = opened()
        measured = loop.run(manager.__aenter__())
        try:
            rows(bench, loop.run, measured, python)
        finally:
            loop.run(manager.__aexit__(None, None, None))


def rows(bench: Any, run: Callable[[Coroutine[Any, Any, Any]], Any], measured: Bench, python: str | None) -> None:
    bench.check("commands, sessions and forks are right", lambda: run(is_right(measured)))
    against = "SWE-ReX local, no isolation" if python else None

    def theirs(name: str) -> Callable[[], float] | None:
        return (lambda: swe_rex(python, name)) if python else None

    def row(kind: str, name: str, ours: Callable[[], Awaitable[float]], unit: str, their: str | None = None) -> None:
        baseline = theirs(their) if their else None
        getattr(bench, kind)(
            name, ours=lambda: run(ours()), baseline=baseline, against=against if baseline else None, unit=unit
        )

    row("latency", "start_to_first_command/cold_p50", measured.cold_ms, "ms", "start_ms")
    row("latency", "start_to_first_command/warm_p50", measured.warm_ms, "ms")
    row("latency", "command_p50", measured.command_ms, "ms", "command_ms")
    row("latency", "session_command_p50", measured.session_ms, "ms", "session_ms")
    row("rate", f"commands_c{WAYS}", measured.commands_per_s, "commands/s", "rate")
    row("latency", "fork_2000_files_p50", measured.fork_ms, "ms")
    row("latency", "fork_to_first_command_p50", measured.fork_to_command_ms, "ms")
    row("latency", f"fork_{AT_ONCE}_at_once", measured.forks_ms, "ms")
    memory: list[float] = []

    async def thousand() -> float:
        took_s, private_mb = await measured.thousand()
        memory.append(private_mb)
        return took_s

    async def private() -> float:
        return memory.pop(0)

    row("latency", f"start_{ALIVE}_alive", thousand, "s")
    row("latency", f"private_memory_of_{ALIVE}", private, "MB each")


async def soak(lifecycles: int) -> bool:
    """Starts, uses and closes sandboxes, a few at a time; True when nothing grew after it had settled."""
    async with open_engine("local") as engine:
        state = Path(engine.capabilities()["state"])
        gate = asyncio.Semaphore(8)

        async def live(number: int) -> None:
            async with gate, engine.start(SandboxSpec(limits=SMALL)) as sandbox:
                await sandbox.write_file("file", b"%d" % number)
                if number % 10 == 0:
                    async with sandbox.fork(1) as (fork,):
                        assert await fork.read_file("file") == b"%d" % number
                assert (await sandbox.exec(Command(argv=("cat", "file")))).stdout == b"%d" % number

        settled: dict[str, float] = {}
        done = 0
        while done < lifecycles:
            batch = min(SETTLE, lifecycles - done)
            await asyncio.gather(*map(live, range(done, done + batch)))
            done += batch
            now = held(state)
            settled = settled or now
            print(f"{done:>7} lifecycles: " + ", ".join(f"{name} {value:g}" for name, value in now.items()), flush=True)
    return (
        now["fds"] <= settled["fds"]
        and now["launcher_fds"] <= settled["launcher_fds"]
        and now["files"] <= settled["files"]
        and now["rss_mb"] <= settled["rss_mb"] + 16
        and now["launcher_rss_mb"] <= settled["launcher_rss_mb"] + 8
    )


def held(state: Path) -> dict[str, float]:
    """What the engine and its launcher hold now."""
    gc.collect()
    launchers = [
        entry
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
        and b"launcher.py" in read(entry / "cmdline")
        and str(state).encode() in read(entry / "cmdline")
    ]
    (launcher,) = launchers
    return {
        "rss_mb": rss_mb(Path("/proc/self")),
        "launcher_rss_mb": rss_mb(launcher),
        "fds": len(os.listdir("/proc/self/fd")),
        "launcher_fds": len(os.listdir(launcher / "fd")),
        "files": sum(1 for folder in ("boxes", "layers") for _ in (state / folder).rglob("*")),
    }


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def rss_mb(process: Path) -> float:
    return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swe-rex", metavar="PYTHON", help="an interpreter that has swe-rex installed")
    parser.add_argument("--soak", type=int, metavar="N", help="run N lifecycles instead of the timings")
    options = parser.parse_args()
    if options.soak is not None:
        with on_loop() as loop:
            sys.exit(0 if loop.run(soak(options.soak)) else "something grew")
    compare(options.swe_rex)


if __name__ == "__main__":
    main()
