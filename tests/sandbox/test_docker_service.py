"""The service over an engine of Docker: the client sees what it sees over a local one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ale
from ale.agent.actions import render
from ale.envs.families import make as make_task
from ale.sandbox import Command, SandboxSpec
from ale.sandbox.remote import open_remote
from ale.service.server import open_service

pytestmark = [pytest.mark.docker, pytest.mark.full]
TOKEN = "a-token-of-the-tests"


async def test_sandboxes_of_a_service_over_docker_do_what_local_ones_do(docker: Any, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "file").write_text("of the client\n")
    async with (
        open_service(docker, {"me": TOKEN}) as service,
        open_remote(service.url, TOKEN) as engine,
        engine.start(SandboxSpec(base=(str(tmp_path / "base"),), label="run-1")) as sandbox,
    ):
        assert engine.capabilities()["isolation"].startswith("Docker")
        done = await sandbox.exec(Command(shell="cat file; echo err >&2; exit 3"))
        assert (done.stdout, done.stderr, done.exit_code) == (b"of the client\n", b"err\n", 3)
        assert (await sandbox.exec(Command(shell="sleep 100", timeout_s=0.2))).timed_out
        await sandbox.session().exec(Command(shell="mkdir d; cd d; x=kept"))
        await sandbox.upload(tmp_path / "base", "again")
        async with sandbox.fork(2) as (one, two):
            await one.write_file("again/file", b"other\n")
            seen = await two.session().exec(Command(shell="echo $x; pwd; cat ../again/file"))
            assert seen.text() == "kept\n/app/d\nof the client\n"
        assert await sandbox.download("again", tmp_path / "out", max_bytes=1000) == 0
        assert (tmp_path / "out" / "file").read_text() == "of the client\n"
        async with sandbox.terminal(Command(argv=("sh",))) as terminal:
            await terminal.send("exit 5\n")
            assert await terminal.wait(deadline_s=20) == 5
        ran = await engine.run(SandboxSpec(), Command(shell="echo once"))
        assert ran.text() == "once\n"
    assert docker.statistics().alive == 0
    assert docker.statistics().layers == 0


async def test_a_task_is_played_on_a_service_over_docker(docker: Any) -> None:
    task = make_task("copy", 7)
    async with (
        open_service(docker, {"me": TOKEN}) as service,
        ale.make_async("task:copy/7", url=service.url, token=TOKEN) as env,
    ):
        await env.reset(seed=3)
        for command in task.solution:
            await env.step(render(command))
        _, reward, terminated, _, _ = await env.step("done")
        assert (reward, terminated) == (1.0, True)
    assert docker.statistics().alive == 0
