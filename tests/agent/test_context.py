"""Compression: without loss first, then by a summary; calls and results stay together, and the goal is restated."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from ale.agent.context import Context, WindowTooSmall
from ale.agent.events import Compacted, Ended
from ale.agent.model import Message, Model, Reply, Request, ToolCall, Usage
from ale.agent.session import EVENTS, restore
from ale.agent.settings import ContextSettings
from ale.agent.tokens import Estimate, Tokenizer
from ale.errors import PolicyError
from ale.testing.scripted_endpoint import Body, Fail, Turn, call, calls

from .conftest import Desk

FINISH = call("finish", summary="done")


class Words:
    """Counts a token a word, exactly; keeps what it is given."""

    exact = True

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def count(self, messages: Any, tools: Any) -> int:
        return sum(len(m.content.split()) + sum(len(c.arguments.split()) for c in m.calls) + 1 for m in messages)

    def learn(self, messages: Any, tools: Any, prompt_tokens: int) -> None: ...

    async def keep(self, text: str) -> str:
        path = f"/kept/{len(self.kept) + 1}"
        self.kept[path] = text
        return path


class Summariser:
    """A model that only sums up; it records what it was shown."""

    name = "summariser"

    def __init__(self, summary: str = "So far so good.") -> None:
        self.summary = summary
        self.requests: list[Request] = []

    async def complete(self, request: Request, on_text: Any = None) -> Reply:
        self.requests.append(request)
        return Reply(Message("assistant", self.summary), "stop", Usage(5, 5))


def context(messages: list[Message], words: Words, window: int, *, keep_recent: int = 4) -> Context:
    settings = ContextSettings(compress_at=0.75, keep_recent=keep_recent)
    return Context(
        words, settings, window=window, answer_tokens=0, tools=(), keep=words.keep, messages=messages
    )  # fmt: skip


def fit(one: Context, model: Model) -> list[Compacted]:
    return asyncio.run(one.fit(model, lambda summary: f"GOAL {summary}"))


def dialogue(*results: str, calls_each: int = 1) -> list[Message]:
    messages = [Message("system", "Be good."), Message("user", "Do it.")]
    for number, result in enumerate(results):
        ids = [f"c{number}.{n}" for n in range(calls_each)]
        messages.append(Message("assistant", calls=tuple(ToolCall(one, "shell", "{}") for one in ids)))
        messages += [Message("tool", result, call_id=one) for one in ids]
    return messages


def check_pairs(messages: list[Message]) -> None:
    """Every result stands behind its call, and every call has its results."""
    waiting: list[str] = []
    for message in messages:
        if message.role == "tool":
            assert message.call_id == waiting.pop(0)
        else:
            assert waiting == []
            waiting = [call.id for call in message.calls]
    assert waiting == []


def test_nothing_happens_while_there_is_room() -> None:
    words, model = Words(), Summariser()
    one = context(dialogue("short"), words, 1000)
    before = list(one.messages)
    assert fit(one, model) == []
    assert one.messages == before
    assert model.requests == []


def test_old_results_give_way_to_a_line_that_says_where_they_are() -> None:
    words, model = Words(), Summariser()
    long = [f"result {n}\n" + f"word{n} " * 200 for n in range(4)]
    one = context(dialogue(*long), words, 900, keep_recent=2)
    (event,) = fit(one, model)
    assert event.how == "collapsed"
    assert event.tokens_after <= 900 * 0.75 * 0.6 < event.tokens_before
    assert model.requests == []
    assert one.messages[3].content.startswith("result 0\n[")
    assert words.kept["/kept/1"] == long[0]  # nothing is lost
    assert "/kept/1" in one.messages[3].content
    assert one.messages[-1].content == long[3]
    check_pairs(one.messages)


def test_a_repeated_result_is_shown_once_the_last_time() -> None:
    words = Words()
    same = "again " * 300
    one = context(dialogue(same, "other " * 100, same), words, 900, keep_recent=2)
    fit(one, Summariser())
    assert one.messages[3].content == "[the same as the later result of c2.0]"
    assert one.messages[-1].content == same


def test_then_the_model_sums_up_and_the_goal_stands_first() -> None:
    words, model = Words(), Summariser()
    one = context(dialogue(*(f"fact {n} " * 30 for n in range(20))), words, 900)
    events = fit(one, model)
    assert [event.how for event in events] == ["summarised"]  # short results are not worth a line in their place
    assert [m.role for m in one.messages[:2]] == ["system", "user"]
    assert one.messages[1].content == "GOAL So far so good."
    assert events[-1].messages == tuple(one.messages)
    assert not model.requests[0].calls_allowed
    check_pairs(one.messages)


def test_a_model_that_says_nothing_when_asked_for_a_summary_is_an_error() -> None:
    one = context(dialogue(*(f"fact {n} " * 30 for n in range(20))), Words(), 900)
    before = list(one.messages)
    with pytest.raises(PolicyError, match="said nothing"):
        fit(one, Summariser("  "))
    assert len(one.messages) == len(before)


def test_a_summary_that_was_cut_is_asked_for_again_and_never_taken() -> None:
    class Talker(Summariser):
        def __init__(self, *finishes: Any) -> None:
            super().__init__()
            self.finishes = list(finishes)

        async def complete(self, request: Request, on_text: Any = None) -> Reply:
            reply = await super().complete(request)
            return Reply(reply.message, self.finishes.pop(0), reply.usage)

    def long() -> Context:
        return context(dialogue(*(f"fact {n} " * 30 for n in range(20))), Words(), 900)

    once, twice, one, other = Talker("length", "stop"), Talker("length", "length"), long(), long()
    assert fit(one, once)[-1].usage == Usage(10, 10)
    assert "at most half as many words" in once.requests[1].messages[-1].content
    before = list(other.messages)
    with pytest.raises(PolicyError, match=r"agent\.model\.max_tokens"):
        fit(other, twice)
    assert len(other.messages) == len(before)


def test_a_window_that_cannot_hold_the_task_itself_is_an_error() -> None:
    one = context([Message("system", "word " * 800), Message("user", "x")], Words(), 900)
    with pytest.raises(WindowTooSmall, match=r"agent\.model\.window"):
        fit(one, Summariser())


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_dialogue_pairs_stay_whole_and_it_fits(seed: int) -> None:
    rng = random.Random(seed)
    words = Words()
    one = context(dialogue("start"), words, 600, keep_recent=rng.randint(1, 9))
    for number in range(40):
        ids = [f"n{number}.{n}" for n in range(rng.randint(1, 4))]
        one.add(Message("assistant", "thinking " * rng.randint(0, 20), tuple(ToolCall(i, "t", "{}") for i in ids)))
        for call_id in ids:
            one.add(Message("tool", rng.choice(["same " * 120, f"w{number} " * rng.randint(1, 150)]), call_id=call_id))
        try:
            fit(one, Summariser())
        except WindowTooSmall:
            pytest.fail("a window of 600 holds every turn of this test")
        assert words.count(one.messages, ()) <= 450
        check_pairs(one.messages)


def test_the_estimate_is_set_right_by_what_the_server_counts() -> None:
    estimate = Estimate()
    messages = [Message("user", "x" * 300)]
    assert estimate.count(messages, ()) == 109
    estimate.learn(messages, (), 54)
    assert estimate.count(messages, ()) == 54
    assert estimate.count([*messages, Message("assistant", "y" * 306)], ()) == 54 + 54
    assert estimate.count([Message("user", "z" * 300)], ()) == 54  # another dialogue, at the same rate


def test_with_a_tokenizer_a_prompt_is_counted_to_the_token(nano_tokenizer: Any) -> None:
    messages = [Message("user", "Copy oak.txt to fox.txt."), Message("assistant", "cp oak.txt fox.txt")]
    plain = [{"role": m.role, "content": m.content} for m in messages]
    ids = nano_tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    counter = Tokenizer(nano_tokenizer)
    assert (counter.exact, counter.count(messages, ())) == (True, len(ids))


def test_the_loop_sums_up_restates_the_task_and_goes_on(desk: Desk) -> None:
    (desk.directory / "big.txt").write_text("line of text\n" * 40)

    def summary(body: Body) -> Turn:
        assert body["tool_choice"] == "none"
        assert "summary" in body["messages"][-1]["content"]
        return Turn("big.txt holds lines of text; nothing is changed yet.")

    played = desk.play(
        call("todo", items=[{"text": "look", "state": "done"}, {"text": "write"}]),
        call("read", path="big.txt"),
        calls(call("shell", command="true"), text="I wonder what to do. " * 400),
        summary,
        call("shell", command="echo fine"),
        FINISH,
        task="Copy big.txt, word for word.",
        model={"window": 8000, "max_tokens": 500},
        context={"compress_at": 0.5, "keep_recent": 1},
        endpoint={"prompt_tokens": lambda body: len(json.dumps(body)) // 3},
    )
    assert played.outcome.status == "finished", played.outcome
    assert played.compactions()[-1] == "summarised"
    after = played.requests[4]["messages"]
    assert after[0] == played.requests[0]["messages"][0]
    assert "Copy big.txt, word for word." in after[1]["content"]
    assert "nothing is changed yet" in after[1]["content"]
    assert "- [ ] write" in after[1]["content"]
    assert played.outcome.usage.prompt_tokens > 0
    # What a resumed session would see is what the model saw last.
    restored = restore(desk.sessions / "s" / EVENTS)
    assert restored.messages[1].content == after[1]["content"]
    assert restored.usage == played.outcome.usage


def test_a_server_that_refuses_the_length_makes_the_loop_compress_and_try_again(desk: Desk) -> None:
    played = desk.play(
        call("shell", command="seq 1 500"),
        Fail(400, "context_length_exceeded"),
        "All numbers to 500 were printed.",
        FINISH,
    )
    assert played.outcome.status == "finished", played.outcome
    assert played.compactions() == ["summarised"]
    assert "the server refused the prompt as too long" in played.notices("context")[-1]
    assert isinstance(played.events[-1], Ended)


def test_without_a_tokenizer_the_user_is_told_that_lengths_are_estimated(desk: Desk) -> None:
    assert "estimated" in desk.play("hello").notices("context")[0]


def test_recent_results_give_way_only_where_they_must_and_the_last_turn_never() -> None:
    words, model = Words(), Summariser()
    long = [f"result {n}\n" + f"word{n} " * 300 for n in range(3)]
    one = context(dialogue(*long), words, 1100, keep_recent=8)
    (event,) = fit(one, model)
    assert (event.how, model.requests) == ("collapsed", [])
    assert [m.content == text for m, text in zip(one.messages[3::2], long, strict=True)] == [False, True, True]
