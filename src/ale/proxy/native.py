"""Answers from the run's own policy, token for token on record: the mode that an agent is trained in.

    plan the prompt (tree) -> wait for a place (turnstile) -> generate -> record the turn (tree) -> say it

A turn that is streamed, or that ends at a stop string, is generated in slices: each goes on from the exact tokens so
far, so that text can leave early and little is sampled behind a stop. The engine's cache makes a slice cost its tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ale.errors import AleError, DeadlineExceeded, PolicyError, first_error
from ale.messages import Ending, Generate, Sampling, Turn
from ale.policy.port import Policy
from ale.proxy.dialogue import Delta, Refusal, Said, ToolCall, Want
from ale.proxy.episode import Episode
from ale.proxy.speech import Speech
from ale.proxy.template import ChatTemplate
from ale.proxy.tree import Ids, Plan, Sampled, TokenTree
from ale.proxy.turnstile import Turnstile
from ale.sandbox.shielded import shielded
from ale.wire import Array

logger = logging.getLogger(__name__)

Emit = Callable[[Delta], Awaitable[None]]
_SLICE_TOKENS = 32
_FORGET_DEADLINE_S = 30.0


class Native:
    """`turn_deadline_s` bounds one call of the policy, the wait for a place included."""

    def __init__(
        self,
        policy: Policy,
        template: ChatTemplate,
        speech: Speech,
        turnstile: Turnstile,
        *,
        turn_deadline_s: float = 600.0,
        slice_tokens: int = _SLICE_TOKENS,
    ) -> None:
        self.policy = policy
        self.template = template
        self.speech = speech
        self.turnstile = turnstile
        self.turn_deadline_s = turn_deadline_s
        self.slice_tokens = slice_tokens

    def tree(self) -> TokenTree:
        return TokenTree(self.template, self.speech)

    async def answer(self, episode: Episode, want: Want, emit: Sequence[Emit] | None) -> list[Said]:
        """All `want.n` answers. `emit` takes what is new in each of them as it comes; None: nobody streams.

        Raises `Refusal`. Cancelled, it abandons what is being generated, in the engine too.
        """
        answers = [_Answer(self, episode, want, i, emit[i] if emit else None) for i in range(want.n)]
        if len(answers) == 1:
            return [await answers[0].run()]
        try:
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(a.run(), name=f"{episode.id}: choice {a.index}") for a in answers]
        except ExceptionGroup as errors:
            raise first_error(errors) from None
        return [task.result() for task in running]

    async def end(self, episode: Episode) -> None:
        """The policy forgets all of the episode's sessions."""
        for lane in episode.lanes:
            await self.forget(lane)

    async def forget(self, lane: str) -> None:
        try:
            async with asyncio.timeout(_FORGET_DEADLINE_S):
                await self.policy.end_session(lane)
        except (AleError, TimeoutError) as error:
            logger.warning("the policy did not forget %s: %s", lane, error)


class _Answer:
    """One turn while it is being generated."""

    def __init__(self, native: Native, episode: Episode, want: Want, index: int, emit: Emit | None) -> None:
        assert episode.tree is not None
        self.index = index
        self._native = native
        self._episode = episode
        self._tree = episode.tree
        self._want = want
        self._emit = emit
        self._number = episode.usage.requests
        self._parts: list[Turn] = []
        self._tokens: list[int] = []
        self._shown = Delta()

    async def run(self) -> Said:
        native, episode, want = self._native, self._episode, self._want
        self._tools = want.tools if want.tool_choice != "none" else ()
        self._prefix = want.prefix or self._forced()
        plan = self._tree.plan(msgspec.structs.replace(want, prefix=self._prefix, tools=self._tools))
        prompt_T = plan.prompt_T()
        wanted = min(want.max_tokens or episode.limits.max_turn_tokens, episode.limits.max_turn_tokens)
        room = episode.limits.max_context_tokens - len(prompt_T)
        if room < 1:
            raise Refusal(
                400,
                f"This model's maximum context length is {episode.limits.max_context_tokens} tokens. However, your "
                f"messages resulted in {len(prompt_T)} tokens.",
                param="messages",
                code="context_length_exceeded",
            )
        granted = episode.reserve(min(wanted, room))
        lane = episode.take_lane(plan.parent.lane if plan.parent is not None else None)
        try:
            stopped_at = await self._generate(lane, prompt_T, granted)
        except BaseException as error:
            if self._tokens:
                self._record(plan, prompt_T, lane, None, cut=True)
            if isinstance(error, asyncio.CancelledError | ConnectionError):
                episode.usage.abandoned += 1
                await shielded(native.forget(lane))
            if isinstance(error, TimeoutError) and episode.time_left_s <= 0:
                episode.end(f"it has used its {episode.limits.time_s:g} s")
                raise episode.refusal() from error
            if isinstance(error, AleError | TimeoutError):
                episode.failed = f"{type(error).__name__}: {error}"
            if isinstance(error, DeadlineExceeded | TimeoutError):
                raise Refusal(504, f"the engine gave no answer in time: {error}", kind="server_error") from error
            if isinstance(error, PolicyError):
                raise Refusal(502, f"the engine failed: {error}", kind="server_error") from error
            if isinstance(error, AleError):
                raise Refusal(503, f"the engine is gone: {error}", kind="server_error") from error
            raise
        finally:
            episode.settle(granted)
            episode.busy_lanes.discard(lane)
        said = self._record(plan, prompt_T, lane, stopped_at, cut=False)
        await self._show(said.text, said.reasoning)
        return said

    def _forced(self) -> str:
        """How the turn has to begin where a call is required: these tokens are prompt, not sampled."""
        choice = self._want.tool_choice
        if not self._tools or choice in ("auto", "none"):
            return ""
        name = choice[1:] if choice.startswith("=") else None
        only = name or (self._tools[0]["function"]["name"] if len(self._tools) == 1 else None)
        return self._native.speech.syntax.forced(only)

    async def _generate(self, lane: str, prompt_T: Ids, granted: int) -> str | None:
        """Samples until the end, a stop string, or `granted` tokens; returns the stop string that was met."""
        native, episode, want = self._native, self._episode, self._want
        sliced = self._emit is not None or bool(want.stop)
        sampling = self._sampling()
        while True:
            left = granted - len(self._tokens)
            step = min(left, native.slice_tokens) if sliced else left
            context_T = np.concatenate([prompt_T, np.array(self._tokens, np.int32)]) if self._tokens else prompt_T
            request = Generate(
                session=lane,
                prompt_T=Array.of(context_T, "int32"),
                sampling=msgspec.structs.replace(sampling, max_tokens=step),
            )
            time_s = min(native.turn_deadline_s, episode.time_left_s)
            async with asyncio.timeout(time_s), native.turnstile.passing(episode.id, deadline_s=time_s):
                turn = await native.policy.generate(request)
            self._parts.append(turn)
            self._tokens += turn.tokens_A.numpy().tolist()
            episode.usage.sampled += len(turn.tokens_A)
            if turn.finish == "stop" or len(self._tokens) >= granted:
                return self._cut_at_stop()
            stop = self._cut_at_stop()
            if stop is not None:
                return stop
            if self._emit is not None:
                heard = native.speech.read(self._text(), self._tools, final=False, stop=want.stop)
                await self._show(_behind(want.prefix, heard.text), heard.reasoning)

    def _sampling(self) -> Sampling:
        episode, want = self._episode, self._want
        own = episode.sampling
        asked = {
            name: value
            for name in ("temperature", "top_p", "top_k")
            if (value := getattr(want, name)) is not None and value != getattr(own, name)
        }
        if asked and episode.pinned:
            episode.counts["overridden"] += 1
            asked = {}
        seed = own.seed + self._number if want.seed is None or episode.pinned else want.seed
        # Seeds of requests count up from the episode's; those of choices lie where no rollout's are.
        return msgspec.structs.replace(own, **asked, seed=seed + (self.index << 58), stop=(self._native.template.end,))

    def _text(self) -> str:
        return self._prefix + self._native.template.text(self._tokens)

    def _cut_at_stop(self) -> str | None:
        """Cuts the tokens behind the one that completes the first stop string; what is cut off is counted."""
        stops = self._want.stop
        if not stops or _first(self._text(), self._prefix, stops) is None:
            return None
        low, high = 1, len(self._tokens)  # the fewest tokens that hold a stop string
        text = self._native.template.text
        while low < high:
            middle = (low + high) // 2
            if _first(self._prefix + text(self._tokens[:middle]), self._prefix, stops) is None:
                low = middle + 1
            else:
                high = middle
        self._episode.usage.after_stop += len(self._tokens) - low
        del self._tokens[low:]
        return _first(self._text(), self._prefix, stops)

    def _record(self, plan: Plan, prompt_T: Ids, lane: str, stopped_at: str | None, *, cut: bool) -> Said:
        native, want = self._native, self._want
        sampled = _joined(self._parts, len(self._tokens))
        ended = self._tokens[-1] == native.template.end
        number = len(self._tree.nodes)
        if cut:  # what the client has seen of it, it may send back
            shown = self._shown
            said = Said(text=shown.text, reasoning=shown.reasoning or None, finish="length")
            seen = said if shown.text or shown.reasoning else None
            self._tree.add(plan, sampled, seen, ending="cut", ended=ended, lane=lane)
            return said
        text = self._text()
        if stopped_at is not None:
            text = text[: text.index(stopped_at, len(self._prefix))]
        heard = native.speech.read(text, self._tools, final=True)
        calls = heard.calls if want.parallel_calls else heard.calls[:1]
        length = not ended and stopped_at is None
        ending: Ending = "cut" if length else "malformed" if heard.malformed else "call" if calls else "answer"
        said = Said(
            text=_behind(want.prefix, heard.text),
            calls=tuple(ToolCall(f"call_{number}_{i}", *call) for i, call in enumerate(calls)),
            reasoning=heard.reasoning,
            finish="tool_calls" if calls else "length" if length else "stop",
            stopped_at=stopped_at,
            prompt_tokens=len(prompt_T),
            cached_tokens=len(prompt_T) - len(plan.fresh_P),
            sampled_tokens=len(self._tokens),
            tokens=self._logprobs(sampled) if want.logprobs else (),
        )
        whole = msgspec.structs.replace(said, text=heard.text)
        self._tree.add(plan, sampled, whole, ending=ending, ended=ended, lane=lane)
        return said

    def _logprobs(self, sampled: Sampled) -> tuple[tuple[str, float], ...]:
        decode = self._native.template.text
        return tuple(
            (decode([token]), logp)
            for token, logp in zip(sampled.tokens_A.tolist(), sampled.logp_A.tolist(), strict=True)
            if token != self._native.template.end
        )

    async def _show(self, text: str, reasoning: str | None) -> None:
        """Emits what is new. A tokenizer whose text does not just grow is waited out."""
        if self._emit is None:
            return
        old, thought = self._shown, reasoning or ""
        if not text.startswith(old.text) or not thought.startswith(old.reasoning):
            return
        delta = Delta(text[len(old.text) :], thought[len(old.reasoning) :])
        if delta.text or delta.reasoning:
            await self._emit(delta)
            self._shown = Delta(text, thought)


def _behind(prefix: str, text: str) -> str:
    """The text without the beginning that the client itself has given."""
    return "" if prefix.startswith(text) else text.removeprefix(prefix)


def _first(text: str, prefix: str, stops: Sequence[str]) -> str | None:
    """The stop string that comes first behind the prefix."""
    found = [(at, stop) for stop in stops if (at := text.find(stop, len(prefix))) >= 0]
    return min(found)[1] if found else None


def _joined(parts: Sequence[Turn], length: int) -> Sampled:
    def join(arrays: list[Array], dtype: str) -> npt.NDArray[Any]:
        return np.concatenate([a.numpy() for a in arrays])[:length].astype(dtype, copy=False)

    return Sampled(
        join([p.tokens_A for p in parts], "int32"),
        join([p.logp_A for p in parts], "float32"),
        join([p.logp_sampled_A for p in parts], "float32"),
        join([p.version_A for p in parts], "int32"),
    )
