"""A manager that one place enters and another leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ale.errors import DeadlineExceeded
from ale.sandbox.held import Held


async def test_whoever_waits_for_what_was_closed_before_it_began_is_told() -> None:
    @asynccontextmanager
    async def manager() -> AsyncIterator[int]:
        yield 1

    one = Held(manager())
    waiting = asyncio.ensure_future(one.value())
    await one.close()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(10):
            await waiting


async def test_what_is_stuck_while_it_is_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ale.sandbox.held._LEAVE_S", 0.05)
    let_go = asyncio.Event()

    @asynccontextmanager
    async def manager() -> AsyncIterator[int]:
        yield 1
        await let_go.wait()

    one = Held(manager())
    assert await one.value() == 1
    with pytest.raises(DeadlineExceeded, match="held open"):
        await one.close()
    let_go.set()
    await one.close()
