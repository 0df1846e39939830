"""A worker takes messages from an actor's inbox and hands them to its `receive`, one at a time."""

from __future__ import annotations

import asyncio
import logging
import typing
from typing import Any

from ale.actor import Actor
from ale.errors import ActorError, ActorStopped
from ale.inbox import Inbox
from ale.mailbox import Ask, Envelope
from ale.wire import Message, Request

logger = logging.getLogger(__name__)

BREATH = 1024
"""Messages handled in a row before other tasks get a turn, even if `receive` never waits for anything."""


class Worker:
    """`current` is the message in hand; a `dismissed` worker takes no other."""

    __slots__ = ("_actor", "_inbox", "_revoked", "current", "dismissed", "name")

    def __init__(self, actor: Actor, inbox: Inbox, name: str) -> None:
        self._actor = actor
        self._inbox = inbox
        self.name = name
        self.current: Envelope | None = None
        self.dismissed = False
        self._revoked = False
        """This task was cancelled because nobody waits for the answer in hand any more."""

    async def serve(self) -> None:
        """Returns when the inbox is closed and empty; raises what `receive` raised for a told message."""
        inbox, receive, loop = self._inbox, self._actor.receive, asyncio.get_running_loop()
        items, take = inbox.items, inbox.items.popleft
        while not self.dismissed:
            if not items:
                if inbox.closed:
                    return
                await inbox.wait(loop.time())
            for _ in range(BREATH):
                if not items or self.dismissed:
                    break
                self.current = envelope = take()
                if inbox.held:
                    inbox.promise()
                try:
                    if type(envelope) is not Ask:
                        await receive(envelope.message)
                        inbox.handled += 1
                    elif envelope.reply.done():
                        inbox.abandoned += 1
                    else:
                        if self._actor.cancel_abandoned:
                            self._cancel_when_abandoned(envelope)
                        answer = await receive(envelope.message)
                        if self._revoked:
                            self._taken_back()
                        self._answer(envelope, answer)
                except asyncio.CancelledError as error:
                    revoked = self._taken_back()
                    if self.dismissed or _cancelling():
                        raise  # the actor ends: whoever cancelled this task accounts for `current`
                    if revoked:
                        inbox.abandoned += 1
                    else:  # something that `receive` awaited was cancelled under it: an error like any other
                        self._failed(envelope, error)
                except Exception as error:
                    self._taken_back()
                    self._failed(envelope, error)
            else:
                self.current = None
                await asyncio.sleep(0)
            self.current = None

    def _cancel_when_abandoned(self, ask: Ask) -> None:
        task = asyncio.current_task()
        assert task is not None

        def gone(reply: asyncio.Future[Any]) -> None:
            if self.current is ask:  # else it was answered
                self._revoked = True
                task.cancel()

        ask.reply.add_done_callback(gone)

    def _taken_back(self) -> bool:
        """Whether the message in hand was revoked; then the cancellation has been dealt with."""
        revoked, self._revoked = self._revoked, False
        task = asyncio.current_task()
        if revoked and task is not None:
            task.uncancel()
        return revoked

    def _answer(self, ask: Ask, answer: Any) -> None:
        inbox, reply = self._inbox, ask.reply
        if answer is None:
            _check_none_is_an_answer(inbox, ask.message)
        if reply.done():
            inbox.abandoned += 1
        else:
            inbox.answered += 1
            reply.set_result(answer)

    def _failed(self, envelope: Envelope, error: BaseException) -> None:
        """If somebody asked, the error is theirs; if nobody asked, it crashes the actor."""
        self.current = None
        doing = f"{self._inbox.owner} handled {type(envelope.message).__name__}"
        if isinstance(error, asyncio.CancelledError):
            cancelled, error = error, ActorError(f"something was cancelled while {doing}")
            error.__cause__ = cancelled
        if not isinstance(envelope, Ask):
            self._inbox.failed += 1
            error.add_note(f"while {doing}")
            raise error
        if envelope.reply.done():
            self._inbox.abandoned += 1
            if not isinstance(error, ActorStopped):  # that it stops is news to nobody who has gone
                logger.warning("nobody waits any more for the error of %s", doing, exc_info=error)
        else:
            self._inbox.failed += 1
            envelope.reply.set_exception(error)


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _check_none_is_an_answer(inbox: Inbox, request: Message) -> None:
    """A `receive` that matches nothing returns None; only a `Request[None]` means it."""
    for base in getattr(type(request), "__orig_bases__", ()):
        if typing.get_origin(base) is Request and typing.get_args(base) == (type(None),):
            return
    raise ActorError(f"{inbox.owner} has no answer to {type(request).__name__}: its `receive` returned None")
