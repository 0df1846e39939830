"""What the official clients see."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from ale.agent.chat import Chat
from ale.testing.scripted_policy import ScriptedPolicy, logp_of

from .conftest import (
    ANTHROPIC_TOOLS,
    RESPONSES_TOOLS,
    TAGS_TEMPLATE,
    THINKING_TEMPLATE,
    TOOLS,
    Serve,
    anthropic_client,
    openai_client,
)

LS = "I look.\n```bash\nls -l\n```"
TWO_CALLS = (
    'Both.<tool_call>{"name": "bash", "arguments": {"command": "ls"}}</tool_call>'
    '<tool_call>\n{"name": "bash", "arguments":{"command": "pwd"}}\n</tool_call>'
)
GO: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}]


@pytest.fixture
def chat(nano_tokenizer: Any) -> Chat:
    return Chat(nano_tokenizer)


class Slices:
    """A scripted line, given in slices as an engine would: the n-th turn of the session is the n-th line."""

    def __init__(self, chat: Chat, *script: str) -> None:
        self.version = 0
        self.turns = [chat.spoken(line) for line in script]
        self._start: dict[str, int] = {}
        self._turn: dict[str, int] = {}

    async def generate(self, request: Any) -> Any:
        from ale.messages import Turn
        from ale.wire import Array

        length = len(request.prompt_T)
        start = self._start.setdefault(request.session, length)
        turn = self._turn.setdefault(request.session, 0)
        if length - start >= len(self.turns[turn]):
            start, turn = length, turn + 1
            self._start[request.session], self._turn[request.session] = start, turn
        tokens = self.turns[turn][length - start :][: request.sampling.max_tokens]
        logp = logp_of(turn, len(tokens))
        done = length - start + len(tokens) == len(self.turns[turn])
        return Turn(
            tokens_A=Array.of(tokens, "int32"),
            logp_A=logp,
            logp_sampled_A=logp,
            version_A=Array.of([0] * len(tokens), "int32"),
            finish="stop" if done else "length",
        )

    async def end_session(self, session: str) -> None:
        self._start.pop(session, None)

    async def load_weights(self, version: int, slot: int) -> None: ...


def test_a_chat_with_tool_calls_goes_on_from_the_sampled_ids(serve: Serve, chat: Chat) -> None:
    policy = ScriptedPolicy(chat, LS, "done")

    async def scenario() -> None:
        async with serve(policy) as (proxy, episode), openai_client(proxy, episode.key) as client:
            first = await client.chat.completions.create(model="m", messages=GO, tools=TOOLS)
            (choice,) = first.choices
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.\n")
            (call,) = choice.message.tool_calls
            assert (call.function.name, json.loads(call.function.arguments)) == ("bash", {"command": "ls -l"})
            messages = [*GO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "a.txt"}]
            second = await client.chat.completions.create(
                model="m", messages=messages, tools=TOOLS, logprobs=True, temperature=0.5, seed=4, max_tokens=50
            )
            (choice,) = second.choices
            assert (choice.message.content, choice.finish_reason) == ("done", "stop")
            assert [t.logprob for t in choice.logprobs.content] == logp_of(1, 5).numpy()[:-1].tolist()
            usage = second.usage
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
            assert usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens
            one, two = policy.requests
            said = policy.turns[0].tokens_A.numpy().tolist()
            prompt = [*one.prompt_T.numpy().tolist(), *said, *chat.observation("a.txt", ended=True)]
            assert two.prompt_T.numpy().tolist() == prompt
            assert one.prompt_T.numpy().tolist() == chat.start("Go.", "Be brief.")
            assert (two.sampling.temperature, two.sampling.seed, two.sampling.max_tokens) == (0.5, 4, 50)
            assert one.session == two.session == "g/0"
        assert policy.ended == ["g/0"]

    asyncio.run(scenario())


def test_a_streamed_chat_says_the_same_as_a_whole_one(serve: Serve, chat: Chat) -> None:
    text = "one two three " * 8 + "end"

    async def scenario() -> None:
        async with serve(Slices(chat, text, LS)) as (proxy, episode), openai_client(proxy, episode.key) as client:
            stream = await client.chat.completions.create(
                model="m", messages=GO, tools=TOOLS, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
            assert "".join(pieces) == text
            assert len(pieces) > 1
            assert chunks[-2].choices[0].finish_reason == "stop"
            assert chunks[-1].usage.completion_tokens == len(chat.spoken(text))
            messages = [*GO, {"role": "assistant", "content": text}, {"role": "user", "content": "On."}]
            async with client.chat.completions.stream(model="m", messages=messages, tools=TOOLS) as events:
                final = await events.get_final_completion()
            (call,) = final.choices[0].message.tool_calls
            assert json.loads(call.function.arguments) == {"command": "ls -l"}
            assert final.choices[0].message.content == "I look.\n"
            assert episode.tree.nodes[1].parent is episode.tree.nodes[0]

    asyncio.run(scenario())


def test_parallel_calls_a_single_one_and_none(serve: Serve, chat: Chat) -> None:
    async def scenario() -> None:
        policy = ScriptedPolicy(chat, TWO_CALLS, TWO_CALLS, TWO_CALLS)
        async with serve(policy, template=TAGS_TEMPLATE) as (proxy, episode), openai_client(proxy, episode.key) as c:
            ask = c.chat.completions.create
            both = (await ask(model="m", messages=GO, tools=TOOLS)).choices[0]
            assert [x.function.arguments for x in both.message.tool_calls] == [
                '{"command": "ls"}',
                '{"command": "pwd"}',
            ]
            messages = [*GO, both.message]
            messages += [{"role": "tool", "tool_call_id": x.id, "content": "ok"} for x in both.message.tool_calls]
            one = (await ask(model="m", messages=messages, tools=TOOLS, parallel_tool_calls=False)).choices[0]
            assert len(one.message.tool_calls) == 1
            messages += [one.message, {"role": "tool", "tool_call_id": one.message.tool_calls[0].id, "content": "ok"}]
            none = (await ask(model="m", messages=messages, tools=TOOLS, tool_choice="none")).choices[0]
            assert none.message.tool_calls is None
            assert none.message.content == TWO_CALLS

    asyncio.run(scenario())


def test_a_required_call_is_begun_for_the_policy_and_only_the_rest_is_sampled(serve: Serve, chat: Chat) -> None:
    policy = ScriptedPolicy(chat, '{"command": "ls"}}</tool_call>', "done")

    async def scenario() -> None:
        async with serve(policy, template=TAGS_TEMPLATE) as (proxy, episode), openai_client(proxy, episode.key) as c:
            choice = {"type": "function", "function": {"name": "bash"}}
            answer = await c.chat.completions.create(model="m", messages=GO, tools=TOOLS, tool_choice=choice)
            (call,) = answer.choices[0].message.tool_calls
            assert (call.function.name, call.function.arguments) == ("bash", '{"command": "ls"}')
            (node,) = episode.tree.nodes
            assert node.sampled.tokens_A.tolist() == chat.spoken('{"command": "ls"}}</tool_call>')
            with pytest.raises(openai.BadRequestError, match="names no tool"):
                choice = {"type": "function", "function": {"name": "rm"}}
                await c.chat.completions.create(model="m", messages=GO, tools=TOOLS, tool_choice=choice)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_what_lies_behind_it_is_counted(serve: Serve, chat: Chat, stream: bool) -> None:
    async def scenario() -> None:
        policy = Slices(chat, "red green STOP blue yellow")
        async with serve(policy) as (proxy, episode), openai_client(proxy, episode.key) as client:
            answer = await client.chat.completions.create(model="m", messages=GO, stop=["STOP", "x"], stream=stream)
            if stream:
                text = "".join([c.choices[0].delta.content or "" async for c in answer])
            else:
                text = answer.choices[0].message.content
                assert answer.choices[0].finish_reason == "stop"
            assert text == "red green "
            (node,) = episode.tree.nodes
            assert chat.text(node.sampled.tokens_A.tolist()).endswith("STOP")
            assert episode.usage.after_stop == episode.usage.sampled - len(node.sampled) > 0

    asyncio.run(scenario())


def test_several_choices_are_siblings(serve: Serve, chat: Chat) -> None:
    async def scenario() -> None:
        async with (
            serve(ScriptedPolicy(chat, "hello")) as (proxy, episode),
            openai_client(proxy, episode.key) as client,
        ):
            answer = await client.chat.completions.create(model="m", messages=GO, n=3)
            assert [(c.index, c.message.content) for c in answer.choices] == [(0, "hello"), (1, "hello"), (2, "hello")]
            assert [node.parent for node in episode.tree.nodes] == [None, None, None]

    asyncio.run(scenario())


def test_reasoning_is_told_apart_and_may_be_dropped(serve: Serve, chat: Chat) -> None:
    async def scenario() -> None:
        policy = Slices(chat, "<think>hm, well</think>red", "<think>so</think>blue")
        async with (
            serve(policy, template=THINKING_TEMPLATE) as (proxy, episode),
            openai_client(proxy, episode.key) as client,
        ):
            first = (await client.chat.completions.create(model="m", messages=GO)).choices[0].message
            assert (first.content, first.reasoning_content) == ("red", "hm, well")
            messages = [*GO, {"role": "assistant", "content": "red"}, {"role": "user", "content": "On."}]
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
            deltas = [c.choices[0].delta for c in [c async for c in stream]]
            assert "".join(d.content or "" for d in deltas) == "blue"
            assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "so"
            assert episode.tree.counts["reasoning_dropped"] == 1
            assert episode.tree.nodes[1].parent is episode.tree.nodes[0]

    asyncio.run(scenario())


def test_anthropics_client_gets_blocks_and_goes_on_from_the_sampled_ids(serve: Serve, chat: Chat) -> None:
    policy = ScriptedPolicy(chat, LS, "done")

    async def scenario() -> None:
        async with serve(policy) as (proxy, episode), anthropic_client(proxy, episode.key) as client:
            ask: dict[str, Any] = {"model": "m", "max_tokens": 60, "system": "Be brief.", "tools": ANTHROPIC_TOOLS}
            messages: list[Any] = [{"role": "user", "content": "Go."}]
            first = await client.messages.create(messages=messages, **ask)
            assert first.stop_reason == "tool_use"
            text, use = first.content
            assert (text.text, use.name, use.input) == ("I look.\n", "bash", {"command": "ls -l"})
            result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "a.txt"}]}
            messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
            second = await client.messages.create(messages=messages, **ask)
            assert (second.stop_reason, second.content[0].text) == ("end_turn", "done")
            said = policy.turns[0].tokens_A.numpy().tolist()
            prompt = [*chat.start("Go.", "Be brief."), *said, *chat.observation("a.txt", ended=True)]
            assert policy.requests[1].prompt_T.numpy().tolist() == prompt
            assert episode.tree.counts == {"roots": 1}
            assert (await client.models.list()).data[0].id == "policy"

    asyncio.run(scenario())


def test_anthropics_stream_prefill_and_stop_sequences(serve: Serve, chat: Chat) -> None:
    async def scenario() -> None:
        async with (
            serve(Slices(chat, LS, "lue STOP x", "end")) as (proxy, episode),
            anthropic_client(proxy, episode.key) as client,
        ):
            ask: dict[str, Any] = {"model": "m", "max_tokens": 60, "tools": ANTHROPIC_TOOLS}
            messages: list[Any] = [{"role": "user", "content": "Go."}]
            async with client.messages.stream(messages=messages, **ask) as stream:
                text = "".join([piece async for piece in stream.text_stream])
                final = await stream.get_final_message()
            assert (text, final.content[1].input) == ("I look.\n", {"command": "ls -l"})
            assert final.usage.output_tokens == len(chat.spoken(LS))
            result = {"type": "tool_result", "tool_use_id": final.content[1].id, "content": "a.txt"}
            messages += [{"role": "assistant", "content": final.content}, {"role": "user", "content": [result]}]
            answer = await client.messages.create(
                messages=[*messages, {"role": "assistant", "content": "b"}], stop_sequences=["STOP"], **ask
            )
            assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == (
                "lue ",
                "stop_sequence",
                "STOP",
            )

    asyncio.run(scenario())


def test_the_responses_api_whole_and_streamed(serve: Serve, chat: Chat) -> None:
    async def scenario() -> None:
        async with serve(Slices(chat, LS, "done now")) as (proxy, episode), openai_client(proxy, episode.key) as client:
            first = await client.responses.create(
                model="m", input="Go.", instructions="Be brief.", tools=RESPONSES_TOOLS, store=False
            )
            call = first.output[-1]
            assert (first.status, first.output_text, call.name) == ("completed", "I look.\n", "bash")
            items: list[Any] = [{"role": "user", "content": "Go."}, *first.output]
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": "a.txt"})
            async with client.responses.stream(
                model="m", input=items, instructions="Be brief.", tools=RESPONSES_TOOLS
            ) as stream:
                text = "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])
                final = await stream.get_final_response()
            assert text == final.output_text == "done now"
            assert episode.tree.nodes[1].parent is episode.tree.nodes[0]
            assert episode.tree.counts == {"roots": 1}

    asyncio.run(scenario())


def test_plain_completions_go_on_from_text_or_ids(serve: Serve, chat: Chat, nano_tokenizer: Any) -> None:
    async def scenario() -> None:
        policy = ScriptedPolicy(chat, "fox", "owl", "bee")
        async with serve(policy) as (proxy, episode), openai_client(proxy, episode.key) as client:
            one = await client.completions.create(model="m", prompt="oak ", logprobs=0)
            assert (one.choices[0].text, one.choices[0].finish_reason) == ("fox", "stop")
            assert one.choices[0].logprobs.tokens == [chat.text([t]) for t in chat.spoken("fox")[:-1]]
            two = await client.completions.create(model="m", prompt="oak fox elm", stream=True)
            assert "".join([c.choices[0].text async for c in two]) == "fox"
            first, second = episode.tree.nodes
            assert second.fresh_P.tolist() == [*first.tokens_T().tolist()[:-1], *chat.spoken(" elm")[:-1]]
            ids = second.tokens_T().tolist()
            await client.completions.create(model="m", prompt=[*ids, 7])
            assert episode.tree.nodes[2].parent is second
            assert episode.tree.nodes[2].fresh_P.tolist() == [7]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"messages": []}, openai.BadRequestError, "at least one message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, r"messages\[0\].role"),
        ({"temperature": 9}, openai.BadRequestError, "temperature: expected between 0 and 2"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"n": 99}, openai.BadRequestError, "n: expected"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format is not supported"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias is not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "only parts of text",
        ),
        ({"messages": [{"role": "user", "content": "long " * 9000}]}, openai.BadRequestError, "maximum context length"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    serve: Serve, chat: Chat, options: dict[str, Any], error: type[openai.APIStatusError], says: str
) -> None:
    from ale.proxy.episode import Limits

    async def scenario() -> None:
        limits = Limits(max_context_tokens=2000)
        async with (
            serve(ScriptedPolicy(chat, "x"), limits=limits) as (proxy, episode),
            openai_client(proxy, episode.key) as client,
        ):
            with pytest.raises(error, match=says) as refused:
                await client.chat.completions.create(**{"model": "m", "messages": GO} | options)
            assert refused.value.body["type"] == "invalid_request_error"
            assert episode.tree.nodes == []

    asyncio.run(scenario())
