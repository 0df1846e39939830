"""An agent put together: settings, model, workspace, tools, hooks, session. The way in from Python.

outcome = await run_agent("Make the tests pass.", directory="project")

async with open_agent("project") as agent:
    await agent.run("Find out why the build is slow.")
    await agent.run("Mend the worst of it.")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import ale
from ale.agent.context import Context
from ale.agent.environment import Environment
from ale.agent.events import AnyEvent, Compacted, Delegated, Listener, Noticed, Said, Started
from ale.agent.guard import guard_hook
from ale.agent.hooks import Hook, Hooks, open_hook
from ale.agent.loop import Agent, Outcome
from ale.agent.mcp import open_mcp
from ale.agent.memory import Memory
from ale.agent.model import Message, Model
from ale.agent.openai_model import open_openai
from ale.agent.prompt import system_prompt
from ale.agent.session import EVENTS, Restored, Session, new_session, restore
from ale.agent.settings import Settings, load_settings
from ale.agent.todo import TodoList
from ale.agent.tokens import Counter, open_counter
from ale.agent.tools.files import edit, read, write
from ale.agent.tools.notes import remember, todo
from ale.agent.tools.people import ask_user, delegate, finish
from ale.agent.tools.registry import Toolbox, as_tool, from_entry_points, from_file
from ale.agent.tools.search import glob, grep
from ale.agent.tools.shell import shell
from ale.agent.workbench import Ask, Workbench
from ale.agent.workspace import Workspace, open_workspace
from ale.errors import ConfigError
from ale.sandbox.shielded import shielded

BUILT_IN = (shell, read, write, edit, glob, grep, todo, remember, delegate, ask_user, finish)
# What a sub-agent has no use for: it talks to nobody, and what is to be remembered its superior decides.
_NOT_FOR_SUB_AGENTS = ("delegate", "ask_user", "remember")
_ESTIMATED = (
    "agent.model.tokenizer is not set: the length of prompts is estimated, and set right by what the server counts"
)


async def run_agent(task: str, directory: str | Path = ".", **options: Any) -> Outcome:
    """Carries out one task; `options` as for `open_agent`."""
    async with open_agent(directory, **options) as agent:
        return await agent.run(task)


@asynccontextmanager
async def open_agent(
    directory: str | Path = ".",
    *,
    settings: Settings | None = None,
    model: Model | None = None,
    listener: Listener | None = None,
    ask: Ask | None = None,
    on_text: Callable[[str], None] | None = None,
    tools: Sequence[Callable[..., Any]] = (),
    hooks: Sequence[Hook] = (),
    session: Session | None = None,
) -> AsyncIterator[Agent]:
    """An agent in `directory`. What it changed is in the directory when a task ends, and at the latest when this does.

    `settings`: None reads `ale.toml`. `model`: None opens the server that the settings name. `listener` hears every
    event, `on_text` the model's words as they come, `ask` puts a question to the user. `tools` and `hooks` are added to
    those of the settings. `session`: where the transcript goes; one that holds a dialogue goes on with it.

    Raises `UserError` for settings, model server, session or sandbox that cannot be used.
    """
    directory = _existing(directory)
    settings = settings or load_settings(directory)
    functions: list[Callable[..., Any]] = [*BUILT_IN, *tools]
    added = [*map(as_tool, functions), *from_entry_points()]
    added += [one for file in settings.tool_files for one in from_file(file)]
    configured = [*hooks, *(open_hook(one, directory) for one in settings.hooks)]
    counter = open_counter(settings.model.tokenizer)
    async with AsyncExitStack() as stack:
        session = session or new_session()
        stack.callback(session.close)
        resumed = restore(session.folder / EVENTS) if session.began else None
        if model is None:
            model = await stack.enter_async_context(open_openai(settings.model))
        for name, server in settings.mcp.items():
            added += await stack.enter_async_context(open_mcp(name, server))
        workspace = await stack.enter_async_context(
            open_workspace(
                directory,
                settings.sandbox,
                keep=session.kept,
                outputs=session.outputs,
                secret=(settings.model.key_env,),
            )
        )
        office = _Office(directory, settings, model, workspace, Toolbox(added), configured, counter, session.outputs)
        agent = await office.agent(session, listener, ask=ask, on_text=on_text, resumed=resumed)
        try:
            yield agent
        finally:
            await shielded(agent.close())


def _existing(directory: str | Path) -> Path:
    path = Path(directory).resolve()
    if not path.is_dir():
        raise ConfigError(f"there is no directory {path}.")
    return path


class _Office:
    """What an agent and its sub-agents share."""

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        model: Model,
        workspace: Workspace,
        toolbox: Toolbox,
        hooks: list[Hook],
        counter: Counter,
        outputs: Path,
    ) -> None:
        self._directory, self._settings, self._model, self._workspace = directory, settings, model, workspace
        self._toolbox, self._hooks, self._counter = toolbox, hooks, counter
        self._outputs = outputs

    async def agent(
        self,
        session: Session,
        listener: Listener | None,
        *,
        ask: Ask | None = None,
        on_text: Callable[[str], None] | None = None,
        resumed: Restored | None = None,
        parent: str | None = None,
    ) -> Agent:
        settings, sub = self._settings, parent is not None
        memory = Memory(self._directory)
        bench = Workbench(
            self._workspace,
            TodoList(None if sub else self._directory),
            memory,
            command_timeout_s=settings.command_timeout_s,
            ask=ask,
            session=session.id,
            outputs=self._outputs,
        )
        if resumed is not None:
            await bench.bring_outputs()

        def emit(event: AnyEvent) -> None:
            session.write(event)
            if listener is not None:
                listener(event)

        names = [name for name in self._toolbox.names() if settings.tools is None or name in settings.tools]
        names = [name for name in names if name != "ask_user" or ask is not None]
        names = [name for name in names if not sub or name not in _NOT_FOR_SUB_AGENTS]
        if settings.tools is not None:
            self._toolbox.only(settings.tools)  # says which name is none
        toolbox = self._toolbox.only(names)
        hooks = Hooks(
            [*([guard_hook(bench)] if settings.guard else []), *self._hooks],
            lambda text: emit(Noticed(about="hook", text=text)),
        )
        environment = Environment(bench)
        surroundings = await environment.start()
        context = Context(
            # An estimate learns from each dialogue by itself.
            self._counter if self._counter.exact else open_counter(None),
            settings.context,
            window=settings.model.window,
            answer_tokens=settings.model.max_tokens or 0,
            tools=toolbox.specs,
            keep=bench.keep,
            messages=() if resumed is None else resumed.messages,
        )
        emit(
            Started(
                session=session.id,
                directory=str(self._directory),
                model=self._model.name,
                version=ale.__version__,
                workspace=settings.sandbox.kind,
                tools=toolbox.specs,
                resumed=resumed is not None,
                parent=parent,
            )
        )
        system = Message("system", system_prompt(settings, toolbox.names(), surroundings, memory.text(), sub=sub))
        if resumed is None:
            context.add(system)
            emit(Said(message=system))
        elif resumed.workspace != settings.sandbox.kind:  # what it was told of where it works holds no more
            before = await context.tokens()
            context.messages = [system, *(m for m in context.messages if m.role != "system")]
            emit(
                Compacted(
                    how="moved",
                    messages=tuple(context.messages),
                    tokens_before=before,
                    tokens_after=await context.tokens(),
                )
            )
        if not self._counter.exact and not sub:
            emit(Noticed(about="context", text=_ESTIMATED))
        agent = Agent(
            self._model,
            toolbox,
            bench,
            context,
            settings,
            hooks=hooks,
            emit=emit,
            session=session.id,
            directory=str(self._directory),
            environment=environment,
            max_turns=settings.subagent_turns if sub else settings.max_turns,
            on_text=on_text,
            settles=not sub,
        )
        if resumed is not None:
            agent.usage, agent.goal = resumed.usage, resumed.goal
        if not sub:
            bench.delegate = self._delegate(agent, session, emit)
        return agent

    def _delegate(self, superior: Agent, session: Session, emit: Listener) -> Callable[[str, str], Any]:
        async def delegate(task: str, expected: str) -> str:
            own = Session(session.folder / f"sub-{1 + len(list(session.folder.glob('sub-*')))}")
            try:
                agent = await self.agent(own, None, parent=session.id)
                try:
                    said = f"{task}\n\nYour summary has to give: {expected}"
                    outcome = await agent.run(said, max_tokens=superior.tokens_left)
                    await agent.close()
                finally:
                    superior.usage += agent.usage
            finally:
                own.close()
            emit(Delegated(session=f"{session.id}/{own.id}", task=task, status=outcome.status, usage=outcome.usage))
            if not outcome.ok:
                return f"[the sub-agent did not come to an end: {outcome.status}]\n{outcome.text}"
            return outcome.text

        return delegate
