"""The launcher's successors, with launchers that start no process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ale.sandbox import launchers
from ale.sandbox.launchers import Launchers


class Client:
    def __init__(self) -> None:
        self.gone = False

    async def close(self) -> None:
        self.gone = True


def test_an_engine_that_closes_while_its_launcher_is_restarted_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    config = cast("Any", SimpleNamespace(directory=str(tmp_path)))
    started: list[Client] = []

    async def scenario() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def start(config: object) -> Client:
            if started:  # every one after the first
                begun.set()
                await go_on.wait()
            started.append(Client())
            return started[-1]

        monkeypatch.setattr(launchers, "LauncherClient", SimpleNamespace(start=start))
        one = await Launchers.start(config)
        started[0].gone = True
        asking = asyncio.ensure_future(one.living())
        await begun.wait()
        closing = asyncio.ensure_future(one.close())
        await asyncio.sleep(0)
        go_on.set()
        await closing
        await asking

    asyncio.run(scenario())
    assert [client.gone for client in started] == [True, True]
