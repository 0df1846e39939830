"""What happens in a session, as data. One stream serves all: the transcript on disk, `--json`, the screen, ATIF.

    Started  Said(system) Said(user)  Said(assistant) Said(tool) ...  Compacted  Said ...  Ended

The messages that the model sees are those of `Said`, in order, a `Compacted` replacing all before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from ale.agent.model import Message, ToolSpec, Usage, whole

Status = Literal[
    "finished",  # it called finish
    "answered",  # it spoke without a call
    "turn_limit",
    "token_limit",
    "time_limit",
    "stuck",  # it did the same again and again
    "blocked",  # a hook ended it
    "model_failure",
    "workspace_failure",
    "interrupted",
]
SUCCESS: tuple[Status, ...] = ("finished", "answered")


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower, omit_defaults=True):
    at: float = msgspec.field(default_factory=time.time)
    """Seconds since the epoch."""


class Started(Event, frozen=True):
    """A session began, or (`resumed`) goes on."""

    session: str
    directory: str
    model: str
    version: str
    workspace: str
    tools: tuple[ToolSpec, ...] = ()
    resumed: bool = False
    parent: str | None = None
    """The session whose sub-agent this is."""


class Said(Event, frozen=True):
    """A message joined the dialogue."""

    message: Message
    usage: Usage | None = None
    duration_s: float | None = None
    error: bool = False
    """Of a result: the call failed."""


class Compacted(Event, frozen=True):
    """The dialogue became shorter, or (`moved`) goes on in another kind of workspace with a system prompt of it:
    from here on the model sees `messages`."""

    how: Literal["collapsed", "summarised", "moved"]
    messages: tuple[Message, ...]
    tokens_before: int
    tokens_after: int
    usage: Usage | None = None
    """What the summary cost."""


class Noticed(Event, frozen=True):
    """Something that whoever runs the agent should know: a hook that failed, a change outside, an estimate."""

    about: Literal["hook", "loop", "context", "workspace", "tool", "memory"]
    text: str


class Delegated(Event, frozen=True):
    """A sub-agent ended; its own transcript is the session `session`."""

    session: str
    task: str
    status: Status
    usage: Usage


class Settled(Event, frozen=True):
    """The agent's changes were brought to the user's directory."""

    applied: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    """Changed by the user meanwhile: theirs stays, the agent's version lies in `kept`."""
    withheld: tuple[str, ...] = ()
    """Never brought back: what programs outside would run by themselves."""
    kept: str | None = None
    """Folder with the agent's versions of `conflicts` and `withheld`, and the user's former files."""


class Ended(Event, frozen=True):
    status: Status
    text: str
    turns: int
    usage: Usage


AnyEvent = Started | Said | Compacted | Noticed | Delegated | Settled | Ended
Listener = Callable[[AnyEvent], None]

_ENCODER, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder(AnyEvent)


def encode(event: AnyEvent) -> bytes:
    """One line of JSON, without the line break."""
    try:
        return _ENCODER.encode(event)
    except UnicodeEncodeError:  # a file name that is no UTF-8
        return _ENCODER.encode(_whole(msgspec.to_builtins(event)))


def _whole(tree: Any) -> Any:
    match tree:
        case str():
            return whole(tree)
        case dict():
            return {_whole(key): _whole(value) for key, value in tree.items()}
        case list() | tuple():
            return [_whole(value) for value in tree]
        case _:
            return tree


def decode(line: bytes) -> AnyEvent:
    """Raises `msgspec.DecodeError`."""
    event: AnyEvent = _DECODER.decode(line)
    return event
