"""What a session meets at its edges: a full disk, a user who thinks, another kind of workspace, secrets, odd files."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from pathlib import Path

import pytest

from ale.agent.clock import Clock
from ale.agent.events import Compacted, Noticed, Started
from ale.agent.session import EVENTS, Session, read_events, restore
from ale.errors import RunFolderError
from ale.testing.scripted_endpoint import call

from .conftest import Desk

FINISH = call("finish", summary="done")


def test_a_full_disk_leaves_a_whole_transcript_and_a_way_on(tmp_path: Path) -> None:
    session = Session(tmp_path / "s")
    session.write(Started(session="s", directory="/d", model="m", version="0", workspace="host"))
    path = tmp_path / "s" / EVENTS
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))  # a write is cut there, and the next fails
    try:
        for _ in range(2):
            with pytest.raises(RunFolderError, match=r"whole up to here.*--resume s"):
                session.write(Noticed(about="tool", text="x" * 400))
            assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    session.write(Noticed(about="tool", text="there is room again"))
    session.close()
    assert [type(event).__name__ for event in read_events(path)] == ["Started", "Noticed"]


def test_the_time_that_a_user_takes_to_answer_is_not_the_tasks() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        clock = Clock(100)
        async with clock.running():
            share = clock.left
            with clock.paused():
                loop.time = lambda real=loop.time: real() + 1000  # type: ignore[method-assign,misc]
            assert share - 0.01 < clock.left <= share
        assert not clock.expired
        with pytest.raises(TimeoutError):
            async with Clock(0.01).running() as short:
                await asyncio.Event().wait()
        assert short.expired

    asyncio.run(scenario())


def test_a_question_may_take_longer_than_the_task(desk: Desk) -> None:
    async def ask(question: str) -> str:
        timeouts = [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
        assert not [h for h in timeouts if getattr(h._callback, "__qualname__", "") == "Timeout._on_timeout"]
        return "blue"

    played = desk.play(call("ask_user", question="Which?"), FINISH, options={"ask": ask})
    assert (played.results()[0], played.outcome.status) == ("blue", "finished")


def test_a_session_that_goes_on_elsewhere_is_told_where_it_is(desk: Desk) -> None:
    first = desk.play("One.", kind="host")
    second = desk.play("Two.", kind="local")
    then, now = first.requests[0]["messages"], second.requests[0]["messages"]
    assert then[0]["content"] != now[0]["content"]
    assert [m["role"] for m in now] == ["system", "user", "assistant", "user"]
    assert now[1] == then[1]
    (moved,) = [event for event in second.events if isinstance(event, Compacted)]
    assert moved.how == "moved"
    third = desk.play("Three.", kind="local")
    assert third.requests[0]["messages"][:4] == now
    assert not [event for event in third.events if isinstance(event, Compacted)]
    assert restore(desk.sessions / "s" / EVENTS).workspace == "local"


def test_commands_on_the_host_do_not_get_the_key_of_the_model(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-one")
    monkeypatch.setenv("OTHER_KEY", "another")
    show = call("shell", command='echo "[$OPENAI_API_KEY] [$OTHER_KEY]"')
    assert desk.play(show, FINISH).results()[0] == "[] [another]"
    told = desk.play(show, FINISH, session="t", model={"key_env": "OTHER_KEY"})
    assert told.results()[0] == "[secret-one] []"


@pytest.mark.parametrize("kind", ["local", "host"])
def test_a_socket_and_a_pipe_in_the_project_are_left_alone(desk: Desk, kind: str) -> None:
    os.mkfifo(desk.directory / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(desk.directory / "s.sock"))
        played = desk.play(call("shell", command="echo hi > new.txt; ls"), FINISH, kind=kind)
    assert played.outcome.status == "finished", played.outcome.text
    assert (desk.directory / "new.txt").read_text() == "hi\n"
    assert (desk.directory / "s.sock").is_socket()
    assert (desk.directory / "pipe").is_fifo()
