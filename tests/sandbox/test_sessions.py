"""Shell sessions and terminals: what carries over, what does not, and what a hostile one can do to itself only."""

from __future__ import annotations

import asyncio
import signal

import pytest

from ale.errors import DeadlineExceeded, SandboxError
from ale.sandbox import Command, SandboxEngine, SandboxSpec

WAIT_S = 60.0


async def test_directory_variables_and_functions_carry_over(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec(env={"FROM": "spec"})) as sandbox:
        session = sandbox.session()
        await session.exec(Command(shell="mkdir -p deep; cd deep; export A='x y'; b=$'two\\nlines'; f() { echo f$1; }"))
        done = await session.exec(Command(shell='basename "$PWD"; echo "$A $FROM"; echo "$b"; f 3; echo $#'))
        other = await sandbox.session("other").exec(Command(shell="echo ${A-unset}"))
    assert done.text() == "deep\nx y spec\ntwo\nlines\nf3\n0\n"
    assert done.stderr == b""
    assert other.stdout == b"unset\n"


async def test_exit_ends_the_command_and_not_the_session(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        session = sandbox.session()
        done = await session.exec(Command(shell="x=kept; exit 3; x=lost"))
        after = await session.exec(Command(shell="echo $x"))
    assert done.exit_code == 3
    assert after.stdout == b"kept\n"


async def test_environment_and_directory_of_a_command_stay(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        session = sandbox.session()
        await session.exec(Command(shell="mkdir here", env={"SECOND": "it's"}))
        await session.exec(Command(argv=("touch", "a b"), cwd="here"))
        done = await session.exec(Command(shell="ls; echo $SECOND", stdin=b"unread"))
        with pytest.raises(ValueError, match="a-b"):
            await session.exec(Command(shell="true", env={"a-b": "x"}))
    assert done.stdout == b"a b\nit's\n"


async def test_a_command_that_is_killed_leaves_the_state_as_it_was(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        session = sandbox.session()
        await session.exec(Command(shell="x=before"))
        late = await session.exec(Command(shell="x=late; sleep 1000", timeout_s=0.5))
        await session.exec(Command(shell="x=murdered; kill -KILL $$"))
        await session.exec(Command(shell="x=replaced; exec true"))
        done = await session.exec(Command(shell="echo $x"))
    assert late.timed_out
    assert done.stdout == b"before\n"


async def test_a_state_that_is_too_large_is_refused_by_name(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        session = sandbox.session("big")
        with pytest.raises(SandboxError, match="'big'"):
            await session.exec(Command(shell="x=$(head -c 2000000 /dev/zero | tr '\\0' x)"))
        assert (await session.exec(Command(shell="echo ${x-unset}"))).stdout == b"unset\n"


async def test_a_syntax_error_is_the_commands_own(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        session = sandbox.session()
        await session.exec(Command(shell="x=1"))
        bad = await session.exec(Command(shell="if then"))
        assert (await session.exec(Command(shell="echo $x"))).stdout == b"1\n"
    assert bad.exit_code not in (0, None)
    assert b"syntax" in bad.stderr


async def test_a_background_process_does_not_hold_a_session_up(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        session = sandbox.session()
        done = await session.exec(Command(shell="sleep 1000 & x=1", timeout_s=WAIT_S))
        assert not done.timed_out
        assert (await session.exec(Command(shell="echo $x"))).stdout == b"1\n"


async def test_sessions_carry_over_to_snapshots_and_forks(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        session = sandbox.session()
        await session.exec(Command(shell="mkdir sub; cd sub; echo data > file; export A=1"))
        async with sandbox.fork(2) as (one, two):
            await one.session().exec(Command(shell="A=2; echo one > file"))
            seen = [await box.session().exec(Command(shell="cat file; echo $A")) for box in (one, two, sandbox)]
            root = await two.exec(Command(shell='echo "$ALE_ROOT"'))
            where = await two.session().exec(Command(shell='echo "$ALE_ROOT"; pwd'))
    assert [done.text() for done in seen] == ["one\n2\n", "data\n1\n", "data\n1\n"]
    assert where.text().split("\n")[0] == root.text().strip()
    assert where.text().split("\n")[1] == root.text().strip() + "/app/sub"


async def test_a_terminal_takes_keys_and_shows_a_screen(engine: SandboxEngine) -> None:
    async with (
        engine.start(SandboxSpec()) as sandbox,
        sandbox.terminal(Command(argv=("/bin/sh",), env={"PS1": "> "}), rows=10, columns=40) as terminal,
    ):
        await terminal.send("stty size; tty > /dev/null && echo a $((1 + 1))tty\n")
        await until(terminal, "a 2tty")
        assert "10 40" in "\n".join(await terminal.screen())
        await terminal.resize(20, 60)
        await terminal.send("clear; stty size\n")
        seen = await until(terminal, "20 60")
        assert len(await terminal.screen()) == 20
        assert "10 40" not in seen
        await terminal.send("sh -c 'echo r$((1 + 1))dy; exec sleep 1000'\n")
        await until(terminal, "r2dy")  # a Ctrl-C before that would only empty the line
        await terminal.send("\x03")
        await terminal.send("echo b$((1 + 1))ck; exit 7\n")
        await until(terminal, "b2ck")
        assert await terminal.wait(deadline_s=WAIT_S) == 7
        assert await terminal.read(deadline_s=WAIT_S) is not None


async def test_a_terminal_ends_with_its_command_though_a_background_process_holds_it(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        command = Command(argv=("/bin/sh", "-c", "trap '' HUP; sleep 1000 & exit 3"))
        async with sandbox.terminal(command) as terminal:
            assert await terminal.wait(deadline_s=WAIT_S) == 3


async def until(terminal: object, text: str) -> str:
    seen = ""
    while text not in seen:
        data = await terminal.read(deadline_s=WAIT_S)  # type: ignore[attr-defined]
        assert data, seen
        seen += data.decode()
    return seen


async def test_the_end_of_a_terminal_ends_its_tree(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        async with sandbox.terminal(
            Command(shell="setsid flock lock sh -c 'echo up; exec sleep 1000' & wait")
        ) as terminal:
            await until(terminal, "up")
            assert (await sandbox.exec(Command(shell="flock -n lock true"))).exit_code == 1
            with pytest.raises(DeadlineExceeded, match="end of a terminal"):
                await terminal.wait(deadline_s=0.01)
        assert (await sandbox.exec(Command(shell="flock -w 50 lock true", timeout_s=WAIT_S))).exit_code == 0


async def test_what_a_terminal_prints_last_is_not_lost(engine: SandboxEngine) -> None:
    async with (
        engine.start(SandboxSpec()) as sandbox,
        sandbox.terminal(Command(shell="sleep 1000 & seq 20000; echo the end; kill -TERM $$")) as terminal,
    ):
        seen = await until(terminal, "the end")
        assert await terminal.wait(deadline_s=WAIT_S) == -signal.SIGTERM
    assert seen.split()[:3] == ["1", "2", "3"] or len(seen) >= 60_000  # the oldest may have left the buffer


async def test_a_terminal_that_floods_is_bounded_and_harms_nobody(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox, sandbox.terminal(Command(shell="yes")) as terminal:
        for _ in range(5):
            assert len(await terminal.read(deadline_s=WAIT_S)) <= 65536
        assert (await sandbox.exec(Command(shell="echo alive"))).stdout == b"alive\n"


async def test_a_missing_program_and_a_wrong_size_are_told(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        with pytest.raises(FileNotFoundError, match="no-such"):
            async with sandbox.terminal(Command(argv=("no-such",))):
                pass
        with pytest.raises(ValueError, match="rows"):
            async with sandbox.terminal(Command(shell="true"), rows=0):
                pass


async def test_a_terminal_ends_with_its_sandbox(engine: SandboxEngine) -> None:
    async with (
        engine.start(SandboxSpec()) as sandbox,
        sandbox.terminal(Command(shell="sleep 1000")) as terminal,
    ):
        waiting = asyncio.ensure_future(terminal.wait(deadline_s=WAIT_S))
        await asyncio.sleep(0)
        await sandbox.close()
        with pytest.raises(SandboxError, match="lost"):
            await waiting
