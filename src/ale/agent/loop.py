"""The control loop of the agent that people run, whole. One agent, one dialogue, tools one after another.

    task ──> [ fit the window ──> ask the model ──> carry out its calls ──> remind ] ... ──> outcome
                   │                   │                    │                  │
               compression       pre/post_model       pre/post_tool     changes, loops, budgets

A sub-agent is a tool: the same loop with a dialogue of its own. Nothing that goes wrong in a call ends the task: the
model is told and goes on. The dialogue only grows, except where it is compressed, so that a proxy in front of the model
records one branch of tokens: what is trained is what is deployed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from ale.agent.clock import Clock
from ale.agent.context import Context
from ale.agent.environment import Environment
from ale.agent.events import SUCCESS, Ended, Listener, Noticed, Said, Status
from ale.agent.hooks import Decision, HookEvent, Hooks
from ale.agent.loop_detection import LoopDetector, Verdict
from ale.agent.model import ContextOverflow, Message, Model, Reply, Request, ToolCall, Usage, whole
from ale.agent.reminders import Reminders, attached
from ale.agent.settings import HookPoint, Settings
from ale.agent.todo import Item
from ale.agent.tools.registry import Final, Toolbox, ToolError
from ale.agent.workbench import Ask, Workbench
from ale.errors import ConfigError, PolicyError, SandboxError, UserError
from ale.sandbox.shielded import shielded

logger = logging.getLogger(__name__)

_NOT_DONE = "error: not carried out, the task had ended"
_CUT = "Your turn was cut at its token limit: say less in one turn, and write long files in parts."


class Outcome(msgspec.Struct, frozen=True):
    """`Outcome("finished", "renamed it; the tests pass", 7, Usage(9000, 400))`."""

    status: Status
    text: str
    turns: int
    usage: Usage

    @property
    def ok(self) -> bool:
        """Whether the agent itself came to an end; not whether what it did is right."""
        return self.status in SUCCESS


class Result(msgspec.Struct, frozen=True):
    """What came of a call."""

    text: str
    error: bool = False
    final: bool = False


class Agent:
    """Carries out tasks, one after another, in one dialogue. `open_agent` puts one together.

    Every event goes to `emit` as it happens; what the model sees is what was emitted.
    """

    def __init__(
        self,
        model: Model,
        toolbox: Toolbox,
        bench: Workbench,
        context: Context,
        settings: Settings,
        *,
        hooks: Hooks,
        emit: Listener,
        session: str,
        directory: str,
        environment: Environment,
        max_turns: int,
        on_text: Callable[[str], None] | None = None,
        settles: bool = True,
    ) -> None:
        """`settles`: what was changed is brought to the user when a task ends; a sub-agent leaves that to its
        superior."""
        self.context = context
        self.usage = Usage()
        self.goal = ""
        """What to restate when the dialogue is compressed: the task, word for word."""
        self._model, self._toolbox, self._bench, self._settings = model, toolbox, bench, settings
        self._hooks, self._emit = hooks, emit
        self._session, self._directory = session, directory
        self._environment, self._reminders = environment, Reminders(bench, environment)
        self._max_turns, self._on_text = max_turns, on_text
        self._detector = LoopDetector()
        self._turns = 0
        self._settles, self._unsettled = settles, False
        self._begun: Decision | None = None
        self._last = "nothing was asked"
        self._most, self._usage_before = settings.max_tokens, self.usage

    # -- the loop

    async def run(self, task: str, *, goal: str | None = None, max_tokens: int | None = None) -> Outcome:
        """Carries out a task. A failure of model or workspace is a status; `UserError` and cancellation are raised.

        Either way the dialogue stays whole, and another task may follow. `goal`: what the task is about, where it only
        says to go on. `max_tokens`: in place of the settings'.
        """
        self._most = self._settings.max_tokens if max_tokens is None else max_tokens
        self._usage_before = self.usage
        self.goal, self._turns, self._detector = goal or task, 0, LoopDetector()
        self._unsettled = self._settles
        status: Status = "interrupted"
        text = ""
        try:
            self._say(Message("user", task))
            status, text = await self._to_the_end()
            try:
                await self.settle()
            except SandboxError as error:
                status, text = "workspace_failure", f"{text}; {error}"
        except UserError as error:  # of the model's server: a key that ran out, say
            status, text = "model_failure", str(error)
            raise
        finally:
            self._answer_open_calls()
            self._last = f"{status}: {text}"
            self._emit(Ended(status=status, text=text, turns=self._turns, usage=self.usage))
        return Outcome(status, text, self._turns, self.usage)

    def plan(self, steps: tuple[Item, ...]) -> None:
        """Puts a procedure on the to-do list before its task is run. Raises `ConfigError`."""
        try:
            self._bench.todo.replace(steps)
        except OSError as error:
            raise ConfigError(f"the to-do list cannot be written: {error}") from error

    def todo_text(self) -> str:
        return self._bench.todo.text()

    async def close(self) -> None:
        """Ends the session. What an interruption left behind is brought to the user first."""
        try:
            await self.settle()
        finally:
            await self._ask_hooks("session_end", result=self._last)

    async def settle(self) -> None:
        """Brings what was changed to the user, where that has not happened yet."""
        if self._unsettled:
            self._unsettled = False
            await shielded(self._bring_back())

    async def _bring_back(self) -> None:
        settled = await self._bench.workspace.settle()
        if settled is not None and any((settled.applied, settled.deleted, settled.conflicts, settled.withheld)):
            self._emit(settled)

    async def _to_the_end(self) -> tuple[Status, str]:
        clock = Clock(self._settings.max_time_s)
        asked = self._bench.ask
        if asked is not None:
            self._bench.ask = _off_the_clock(asked, clock)
        try:
            async with clock.running():
                return await self._turn_by_turn(clock)
        except TimeoutError:
            if not clock.expired:
                raise
            return "time_limit", f"longer than {self._settings.max_time_s:g} s"
        except PolicyError as error:
            return "model_failure", str(error)
        except SandboxError as error:
            return "workspace_failure", str(error)
        finally:
            self._bench.ask = asked

    async def _turn_by_turn(self, clock: Clock) -> tuple[Status, str]:
        warnings: tuple[str, ...] = ()
        if self._begun is None:
            self._begun = await self._ask_hooks("session_start")
            warnings = self._begun.warnings
        if self._begun.blocked is not None:
            return "blocked", self._begun.blocked
        while self._turns < self._max_turns:
            if self.tokens_left == 0:
                return "token_limit", f"{self._most} tokens are spent"
            before = await self._ask_hooks("pre_model")
            if before.blocked is not None:
                return "blocked", before.blocked
            if before.result is not None:
                self._say(Message("user", before.result))
            reply = await self._ask_model()
            self._turns += 1
            after = await self._ask_hooks("post_model", result=reply.message.content)
            if after.blocked is not None:
                self._refuse(reply, after.blocked)
                continue

            calls = reply.message.calls
            if not calls and reply.message.content.strip() and reply.finish != "length":
                return "answered", reply.message.content.strip()
            results = await self._carry_out(calls)
            for result in results:
                if result.final:
                    self._tell_results(calls, results, [])
                    return "finished", result.text
            verdict = self._judge(reply, results)
            lines = await self._reminders.collect(used=tuple(c.name for c in calls), left=self._left(clock))
            lines += (*warnings, *before.warnings, *after.warnings)
            warnings = ()
            if verdict is not None:
                lines.append(verdict.text)
                self._emit(Noticed(about="loop", text=f"{verdict.kind}: {verdict.text}"))
            self._tell_results(calls, results, lines)
            if verdict is not None and verdict.kind == "stop":
                return "stuck", verdict.text
        return "turn_limit", f"{self._max_turns} turns are over"

    # -- the model

    async def _ask_model(self) -> Reply:
        await self._fit()
        try:
            return await self._complete()
        except ContextOverflow as error:
            self._emit(Noticed(about="context", text=f"the server refused the prompt as too long: {error}"))
            await self._fit(overflowed=True)
            return await self._complete()

    async def _complete(self) -> Reply:
        began = time.monotonic()
        reply = await self._model.complete(
            Request(tuple(self.context.messages), self._toolbox.specs), on_text=self._on_text
        )
        if reply.usage is not None:
            self.context.learn(reply.usage.prompt_tokens)
        self._say(reply.message, usage=reply.usage, duration_s=time.monotonic() - began)
        return reply

    async def _fit(self, *, overflowed: bool = False) -> None:
        for event in await self.context.fit(self._model, self._restated, overflowed=overflowed):
            self._emit(event)
            self.usage += event.usage or Usage()

    def _restated(self, summary: str) -> str:
        """The message from which the dialogue goes on after it was summed up."""
        parts = [
            f"The task, word for word:\n<task>\n{self.goal}\n</task>",
            f"The dialogue so far was replaced by your own summary of it:\n<summary>\n{summary}\n</summary>",
        ]
        if self._bench.todo.items:
            parts.append(f"Your to-do list:\n{self._bench.todo.text()}")
        return "\n\n".join([*parts, "Go on with the task."])

    def _refuse(self, reply: Reply, reason: str) -> None:
        """A hook does not accept the turn: the model is told why, and asked again."""
        self._answer_open_calls(f"error: blocked by {reason}")
        if not reply.message.calls:
            self._say(Message("user", f"Your answer was not accepted by {reason}"))

    # -- calls

    async def _carry_out(self, calls: tuple[ToolCall, ...]) -> list[Result]:
        """In order, each after the one before: they share a shell. What follows the end of the task is not done."""
        results: list[Result] = []
        for call in calls:
            over = any(result.final for result in results)
            results.append(Result(_NOT_DONE, error=True) if over else await self._call(call))
            if len(results) < len(calls):  # the last one waits for the reminders
                self._tell(call, results[-1])
        return results

    async def _call(self, call: ToolCall) -> Result:
        try:
            tool = self._toolbox.get(call.name)
            arguments = _decoded(call.arguments)
            before = await self._ask_hooks("pre_tool", tool=call.name, arguments=arguments)
            if before.blocked is not None:
                raise ToolError(f"blocked by {before.blocked}")
            # Encoded again: what the hooks saw is what is done.
            given = msgspec.json.encode(arguments if before.arguments is None else before.arguments)
            answer = await tool.body(self._bench, given)
            result = Result(answer.text, final=True) if isinstance(answer, Final) else Result(answer)
            warnings = before.warnings
        except ToolError as error:
            result, warnings = Result(f"error: {error}", error=True), ()
        except (SandboxError, UserError):
            raise
        except Exception as error:  # a tool's own mistake is no reason to lose the work
            logger.warning("the tool %s failed", call.name, exc_info=True)
            said = f"{type(error).__name__}: {error}"
            self._emit(Noticed(about="tool", text=f"{call.name} failed: {said}"))
            result, warnings = Result(f"error: the tool failed: {said}", error=True), ()
        self._environment.observe(result.text)
        after = await self._ask_hooks("post_tool", tool=call.name, result=result.text, error=result.error)
        text = result.text if after.result is None else after.result
        warnings = (*warnings, *after.warnings, *((after.blocked,) if after.blocked is not None else ()))
        text = attached(await self._shortened(text), list(warnings))
        return msgspec.structs.replace(result, text=text)

    async def _shortened(self, text: str) -> str:
        """The beginning and the end of a long result, and where the whole is."""
        most = self._settings.max_output_chars
        if len(text) <= most:
            return text
        half = most // 2
        cut = f"{len(text) - 2 * half} characters left out"
        try:
            cut = f"[... {cut}: all of it is in {await self._bench.keep(text)} ...]"
        except OSError as error:
            cut = f"[... {cut}, and not kept: {error} ...]"
        return f"{text[:half]}\n{cut}\n{text[-half:]}"

    def _judge(self, reply: Reply, results: list[Result]) -> Verdict | None:
        if reply.finish == "length":
            self._emit(Noticed(about="loop", text="a turn was cut at its token limit"))
        if not results:
            silent = self._detector.silence()
            cut = reply.finish == "length" and silent.kind == "nudge"
            return Verdict("nudge", _CUT) if cut else silent
        texts = [result.text for result in results]
        return self._detector.watch(reply.message.calls, texts, [result.error for result in results])

    # -- what is said

    def _say(self, message: Message, **more: Any) -> None:
        message = msgspec.structs.replace(message, content=whole(message.content))
        self.context.add(message)
        usage: Usage | None = more.get("usage")
        self.usage += usage or Usage()
        self._emit(Said(message=message, **more))

    def _tell(self, call: ToolCall, result: Result) -> None:
        self._say(Message("tool", result.text, call_id=call.id), error=result.error)

    def _tell_results(self, calls: tuple[ToolCall, ...], results: list[Result], lines: list[str]) -> None:
        """The last result, with the reminders; they stand alone where there was no call."""
        if results:
            text = attached(results[-1].text, lines)
            self._tell(calls[-1], msgspec.structs.replace(results[-1], text=text))
        elif lines:
            self._say(Message("user", attached("", lines).strip()))

    def _answer_open_calls(self, text: str = _NOT_DONE) -> None:
        """A server refuses a dialogue in which a call has no result."""
        answered: set[str | None] = set()
        for message in reversed(self.context.messages):
            if message.role != "tool":
                for call in message.calls:
                    if call.id not in answered:
                        self._tell(call, Result(text, error=True))
                return
            answered.add(message.call_id)

    async def _ask_hooks(self, on: HookPoint, **about: Any) -> Decision:
        return await self._hooks.ask(HookEvent(on, self._session, self._directory, **about))

    # -- budgets

    @property
    def tokens_left(self) -> int | None:
        """Of the present task's; None: there is no limit."""
        if self._most is None:
            return None
        now, before = self.usage, self._usage_before
        spent = now.prompt_tokens + now.completion_tokens - before.prompt_tokens - before.completion_tokens
        return max(0, self._most - spent)

    def _left(self, clock: Clock) -> dict[str, float]:
        """The share that is left of each budget."""
        left = {"turns": 1 - self._turns / self._max_turns, "time": clock.left}
        if self._most is not None and self.tokens_left is not None:
            left["tokens"] = self.tokens_left / self._most
        return left


def _off_the_clock(ask: Ask, clock: Clock) -> Ask:
    async def asking(question: str) -> str:
        with clock.paused():
            return await ask(question)

    return asking


def _decoded(arguments: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ToolError(f"the arguments are no JSON object: {error}") from error
