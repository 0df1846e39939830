"""A task in a sandbox: each action is a shell command in the working directory, each observation what it printed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from ale.audit import Alarm, AuditEvent
from ale.envs.env import Step
from ale.errors import SandboxError, SandboxStopped
from ale.messages import Score, ToolResult
from ale.sandbox import (
    AlarmRules,
    Command,
    Completed,
    Limits,
    Mount,
    Sandbox,
    SandboxEngine,
    SandboxSpec,
    Snapshot,
)
from ale.task import WORKDIR, Task
from ale.waiting import named

Grader = Callable[[Task, Snapshot], Awaitable[Score]]

_SHOWN = 60  # characters of a command

PROGRAM = "program.py"
"""Where, in the working directory, a `ProgramEnv` leaves what the agent wrote."""


class TerminalEnv:
    """`grader` scores the snapshot; it owns nothing of it. One command runs at a time, exactly once."""

    def __init__(
        self,
        task: Task,
        engine: SandboxEngine,
        grader: Grader,
        *,
        pids: int = 64,
        max_output_chars: int = 4000,
        command_timeout_s: float = 30.0,
        alarms: AlarmRules | None = None,
        label: str = "",
        mounts: tuple[Mount, ...] = (),
    ) -> None:
        self._task = task
        self._engine = engine
        self._grader = grader
        self._max_output_chars = max_output_chars
        self._command_timeout_s = command_timeout_s
        self._spec = SandboxSpec(
            workdir=WORKDIR,
            limits=Limits(memory_mb=task.memory_mb, pids=pids),
            alarms=alarms or AlarmRules(),
            label=label,
            mounts=mounts,
        )
        self._stack = AsyncExitStack()
        self._sandbox: Sandbox | None = None
        self._seen = (0, 0)  # events and alarms that a step has told of

    async def reset(self) -> str:
        with named(f"a sandbox for {self._task.id}", release="its start, or that it fails"):
            self._sandbox = await self._stack.enter_async_context(self._engine.start(self._spec))
        for file in self._task.files:
            try:
                await self._sandbox.write_file(f"{WORKDIR}/{file.path}", file.data, mode=file.mode)
            except OSError as error:
                raise SandboxError(f"{self._task.id}: {file.path} cannot be laid out: {error}") from error
        return self._task.instruction

    @property
    def sandbox(self) -> Sandbox:
        """The live sandbox: for a program that acts in it by itself."""
        return self._live()

    async def step(self, action: str) -> Step:
        sandbox = self._live()
        what = f"the end of a command in the sandbox of {self._task.id}: {action[:_SHOWN]!r}"
        try:
            with named(what, release="its end, or its time-out", deadline_s=self._command_timeout_s):
                completed = await sandbox.exec(Command(shell=action, timeout_s=self._command_timeout_s))
        except SandboxStopped as error:
            audit, alarms = self._news(sandbox)
            stopped = ToolResult(call=action, output=str(error), audit=audit, alarms=alarms)
            return Step(str(error), terminated=True, result=stopped)
        observation = self._observe(completed)
        audit, alarms = self._news(sandbox)
        return Step(
            observation,
            result=ToolResult(
                call=action,
                output=observation,
                exit_code=completed.exit_code,
                timed_out=completed.timed_out,
                duration_s=completed.duration_s,
                audit=audit,
                alarms=alarms,
            ),
        )

    def _news(self, sandbox: Sandbox) -> tuple[tuple[AuditEvent, ...], tuple[Alarm, ...]]:
        """What was seen since the last step."""
        audit, alarms = tuple(sandbox.audit()), tuple(sandbox.alarms())
        events_before, alarms_before = self._seen
        self._seen = (len(audit), len(alarms))
        return audit[events_before:], alarms[alarms_before:]

    async def score(self) -> Score:
        with named(f"a snapshot of the sandbox of {self._task.id}", release="the sandbox"):
            snapshot = await self._live().snapshot()
        try:
            return await self._grader(self._task, snapshot)
        finally:
            await snapshot.release()

    async def close(self) -> None:
        self._sandbox = None
        with named(f"the end of the sandbox of {self._task.id}", release="its last process and its files"):
            await self._stack.aclose()

    def _live(self) -> Sandbox:
        if self._sandbox is None:
            raise RuntimeError("reset() starts the episode; an environment is used for one")
        return self._sandbox

    def _observe(self, completed: Completed) -> str:
        """Both streams, cut in the middle, and how the command ended unless it just succeeded."""
        text = (completed.text() + completed.text("stderr")).rstrip("\n")
        limit = self._max_output_chars
        if len(text) > limit:
            head, tail = text[: limit // 2], text[len(text) - (limit - limit // 2) :]
            text = f"{head}\n[... {len(text) - limit} characters cut ...]\n{tail}"
        if completed.timed_out:
            ending = f"[timed out after {self._command_timeout_s:g} s]"
        elif completed.signal is not None:
            ending = f"[signal {completed.signal}]"
        elif completed.exit_code:
            ending = f"[exit {completed.exit_code}]"
        else:
            return text or "ok"
        return f"{text}\n{ending}" if text else ending


class ProgramEnv(TerminalEnv):
    """One action, a program: it is left in the workspace as `PROGRAM`, and the episode ends. Only the tests run it."""

    async def step(self, action: str) -> Step:
        try:
            await self._live().write_file(f"{WORKDIR}/{PROGRAM}", action.encode("utf-8", "replace"))
        except OSError as error:
            raise SandboxError(f"{self._task.id}: {PROGRAM} cannot be written: {error}") from error
        return Step("", terminated=True, result=ToolResult(call=action, output="", exit_code=0))
