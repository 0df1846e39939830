"""What one token may hold at once, and that whatever is stuck holds up nothing else."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from ale.errors import SandboxError
from ale.sandbox import connection
from ale.sandbox.remote import RemoteEngine
from ale.sandbox.rocklet.trees import pack_tree
from ale.sandbox.wire import TooMany
from ale.service import http
from ale.service.house import open_house
from ale.service.ledger import Answer, Ledger
from ale.service.room import SMALL_BYTES, Room
from ale.service.tenant import Kept, ServiceLimits

TOKEN = "a-token-of-some-length"
MB = 1 << 20


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=60)


def test_room_is_given_in_the_order_in_which_it_was_asked_for(play: Any) -> None:
    async def scenario() -> None:
        room = Room(10 * MB)
        first = await room.take(6 * MB, 1.0)
        large = asyncio.ensure_future(room.take(8 * MB, 60.0))
        await asyncio.sleep(0)
        late = asyncio.ensure_future(room.take(MB, 60.0))
        small = await room.take(SMALL_BYTES, 0.0)  # it needs none
        with pytest.raises(TooMany, match="wait for some"):
            await room.take(MB, 0.01)
        assert not late.done()  # there is room for it, but not yet for the one before it
        first.release()
        first.release()
        held = [await large, await late]
        waiting = asyncio.ensure_future(room.take(99 * MB, 60.0))  # more than there is: all of it
        for one in held:
            await asyncio.sleep(0)
            assert not waiting.done()
            one.release()
        whole = await waiting
        cancelled = asyncio.ensure_future(room.take(MB, 60.0))
        await asyncio.sleep(0)
        cancelled.cancel()
        whole.release()
        await asyncio.wait([cancelled])
        small.release()
        (await room.take(10 * MB, 0.0)).release()  # all of it has come back

    play(scenario())


def test_large_bodies_wait_for_room_and_are_refused_when_there_is_none(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ale.service.http._ROOM_S", 0.3)
    with serve({"me": TOKEN}, limits=ServiceLimits(bodies_bytes=3 * MB)) as url, client(url) as me:
        me.put("/v1/sandboxes/box", json={})
        asked = {"shell": "mkfifo up; read line < up; wc -c", "stdin": base64.b64encode(bytes(MB)).decode()}
        begun = me.post(
            "/v1/sandboxes/box/exec", json=asked, params={"wait_s": 0}, headers={"idempotency-key": "the-long-one"}
        )
        assert begun.status_code == 202
        refused = me.put("/v1/sandboxes/box/file", params={"path": "file"}, content=bytes(2 * MB))
        assert (refused.status_code, refused.json()["error"]["kind"]) == (429, "TooMany")
        assert me.put("/v1/sandboxes/box/file", params={"path": "file"}, content=bytes(MB)).status_code == 200
        me.post("/v1/sandboxes/box/exec", json={"shell": "until [ -p up ]; do :; done; echo > up"})
        done = me.get("/v1/requests/the-long-one", params={"wait_s": 30}).json()
        assert base64.b64decode(done["completed"]["stdout"]) == b"%d\n" % MB
        assert me.put("/v1/sandboxes/box/file", params={"path": "file"}, content=bytes(2 * MB)).status_code == 200


def test_a_client_is_told_that_there_is_no_room_before_it_takes_the_service_for_lost() -> None:
    assert http._ROOM_S < connection._WAIT_S + connection._GRACE_S


def test_transfers_at_once_are_counted(serve: Any, tree: Path) -> None:
    packed = b"".join(pack_tree(str(tree).encode(), strict=True))
    told, go_on = Event(), Event()

    def slowly() -> Iterator[bytes]:
        yield packed[:10]
        told.set()
        assert go_on.wait(30)
        yield packed[10:]

    async def both(url: str) -> list[int]:
        with client(url) as one, client(url) as two:
            one.put("/v1/sandboxes/box", json={})
            slow = asyncio.ensure_future(
                asyncio.to_thread(one.put, "/v1/sandboxes/box/tree", params={"path": "slow"}, content=slowly())
            )
            await asyncio.to_thread(told.wait, 30)
            while (  # until the service has seen the first one too
                (said := await asyncio.to_thread(two.get, "/v1/sandboxes/box/tree", params={"path": "."})).status_code
                == 200
            ):
                pass
            go_on.set()
            first = await slow
            last = await asyncio.to_thread(two.get, "/v1/sandboxes/box/tree", params={"path": "slow"})
            return [said.status_code, first.status_code, last.status_code]

    with serve({"me": TOKEN}, limits=ServiceLimits(transfers=1)) as url:
        assert asyncio.run(both(url)) == [429, 200, 200]


class Thing(Kept):
    """`stuck`: it does not end before this is set."""

    def __init__(self, stuck: asyncio.Event | None = None) -> None:
        super().__init__(0.01)
        self.stuck, self.closed = stuck, asyncio.Event()

    async def close(self) -> None:
        if self.stuck is not None:
            await self.stuck.wait()
        self.closed.set()


def test_what_is_stuck_while_it_is_closed_holds_up_nothing_else(
    play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ale.service.house._CLOSE_S", 0.05)

    async def scenario() -> None:
        let_go = asyncio.Event()
        stuck, other = Thing(let_go), Thing()
        engine: Any = SimpleNamespace(scratch=tmp_path)
        async with asyncio.timeout(30):
            async with open_house(engine, {"me": TOKEN}, ServiceLimits(idle_s=0.01), None) as house:
                tenant = house.tenants["me"]
                tenant.environments["stuck"] = stuck
                house.note(stuck)
                while not house._expiring:
                    await asyncio.sleep(0.001)
                tenant.environments["other"] = other
                house.note(other)
                await other.closed.wait()
                while list(tenant.environments) != ["stuck"]:
                    await asyncio.sleep(0)
            assert "not closed within 0.05 s: stuck" in caplog.text
            let_go.set()
            await stuck.closed.wait()

    with caplog.at_level(logging.ERROR):
        play(scenario())


def test_work_that_does_not_end_is_named_and_not_waited_for_for_ever(
    play: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ale.service.ledger._CANCEL_S", 0.05)

    async def scenario() -> None:
        let_go = asyncio.Event()

        async def stubborn() -> Answer:
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                await let_go.wait()
            return 200, b""

        ledger = Ledger()
        task = ledger.begin("the-key", b"", stubborn)
        assert task is not None
        assert ledger.begin("the-key", b"", stubborn) is None
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await ledger.close()
        assert "the-key" in caplog.text
        let_go.set()
        await task

    with caplog.at_level(logging.ERROR):
        play(scenario())


def test_a_client_stops_the_rest_when_one_cannot_be_stopped(play: Any) -> None:
    asked: list[str] = []

    async def delete(path: str) -> None:
        asked.append(path)
        if path.endswith("two"):
            raise SandboxError("two cannot be stopped")
        await asyncio.sleep(0)

    async def scenario() -> None:
        connection: Any = SimpleNamespace(delete=delete)
        info: Any = None
        engine = RemoteEngine(connection, info)
        engine._open = {"one", "two", "three"}
        with pytest.raises(SandboxError, match="two cannot"):
            await engine.stop(("one", "two", "three"))
        assert asked == [f"/v1/sandboxes/{name}" for name in ("one", "two", "three")]
        assert engine._open == {"two"}

    play(scenario())
