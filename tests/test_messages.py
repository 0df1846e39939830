import inspect

import msgspec
import numpy as np
import pytest

from ale import messages
from ale.envs.families import make
from ale.messages import Chunk, Group, Rollout, Sample, Sampling, ToolResult, TrainStep, Trajectory
from ale.wire import Array, Message, Request, reply_type, round_trip

STRUCTS = [
    kind
    for _, kind in inspect.getmembers(messages, inspect.isclass)
    if issubclass(kind, msgspec.Struct) and kind.__module__ == messages.__name__
]


def trajectory(id_: str = "g/0", versions: tuple[int, ...] = (3, 4)) -> Trajectory:
    return Trajectory(
        id=id_,
        group="g",
        task="copy-1",
        family="copy",
        level=2,
        tokens_T=Array.of([5, 6, 7, 8], "int32"),
        chunks=(Chunk(1, 2, "call", error=True), Chunk(3, 4, "answer", relevant=False)),
        logp_A=Array.of([-0.5, -np.inf], "float32"),
        logp_sampled_A=Array.of([-0.25, -1.0], "float32"),
        version_A=Array.of(versions, "int32"),
        results=(ToolResult("ls", "a\x00é", exit_code=None, timed_out=True),),
        reward=None,
        status="episode_timeout",
        cause="slow",
        started_version=9,
    )


def test_a_trajectory_survives_the_wire_bit_for_bit() -> None:
    step = TrainStep(samples=(Sample(trajectory(), -0.1),))
    again = round_trip(step)
    assert again == step
    array = again.samples[0].trajectory.logp_A.numpy()
    assert array.dtype == np.float32
    assert array.tolist() == [-0.5, -np.inf]


def test_a_task_inside_a_request_survives_the_wire() -> None:
    rollout = Rollout(id="g/0", group="g", task=make("unpack", 3), sampling=Sampling(top_k=5, stop=(1, 2)))
    assert round_trip(rollout) == rollout
    assert round_trip(rollout).task.content_hash == rollout.task.content_hash


def test_the_oldest_version_is_that_of_any_token_or_of_the_start() -> None:
    assert trajectory().oldest_version == 3
    assert trajectory(versions=()).oldest_version == 9
    assert Group(id="g", task="t", trajectories=(trajectory(), trajectory(versions=(2, 8)))).oldest_version == 2


@pytest.mark.parametrize("values", [[], [1], [[1, 2], [3, 4]], np.arange(6).reshape(2, 3).T])
def test_an_array_keeps_values_shape_and_type(values: object) -> None:
    expected = np.array(values, dtype="int32")
    array = round_trip(Array.of(values, "int32"))
    assert np.array_equal(array.numpy(), expected)
    assert array.numpy().shape == expected.shape
    assert len(array) == len(expected)
    assert not array.numpy().flags.writeable


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_every_message_is_frozen_and_says_what_it_is_by_an_example(kind: type[msgspec.Struct]) -> None:
    assert kind.__struct_config__.frozen
    assert f"`{kind.__name__}(" in (kind.__doc__ or "")


@pytest.mark.parametrize("kind", [k for k in STRUCTS if issubclass(k, Request)], ids=lambda kind: kind.__name__)
def test_every_request_names_what_answers_it(kind: type[Request[Message]]) -> None:
    answer = reply_type(kind)
    assert answer is None or answer is type(None) or issubclass(answer, Message)


def test_tags_of_messages_are_unique() -> None:
    tags = [kind.__struct_config__.tag for kind in STRUCTS if issubclass(kind, Message)]
    assert len(tags) == len(set(tags))
