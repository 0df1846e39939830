"""Coroutine tests of this folder run on one event loop, which also holds the engines that they share."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ale.sandbox import SandboxEngine, open_engine

T = TypeVar("T")


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    runner: asyncio.Runner = pyfuncitem._request.getfixturevalue("runner")
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    runner.run(pyfuncitem.obj(**arguments))
    return True


def held(runner: asyncio.Runner, manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
    async def enter() -> T:
        return await manager.__aenter__()

    async def leave() -> None:
        await manager.__aexit__(None, None, None)

    value = runner.run(enter())
    try:
        yield value
    finally:
        runner.run(leave())


@pytest.fixture(scope="session")
def local(runner: asyncio.Runner) -> Iterator[Any]:
    yield from held(runner, open_engine("local"))


@pytest.fixture(scope="session")
def unsafe(runner: asyncio.Runner) -> Iterator[SandboxEngine]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield from held(runner, open_engine("unsafe-process"))


def monitors_of(engine: SandboxEngine) -> list[str]:
    """The bwrap processes on the host that belong to an engine."""
    bottom = f"{engine.capabilities()['state']}/tools/empty".encode()
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if bottom in (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


@pytest.fixture
def bwraps() -> Callable[[SandboxEngine], list[str]]:
    return monitors_of


@pytest.fixture(params=["local", "unsafe-process"])
def engine(request: pytest.FixtureRequest) -> Iterator[SandboxEngine]:
    engine: SandboxEngine = request.getfixturevalue("local" if request.param == "local" else "unsafe")
    yield engine
    assert engine.statistics().alive == 0
    assert not monitors_of(engine)
