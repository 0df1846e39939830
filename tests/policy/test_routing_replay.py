"""Routing replay (R3) end to end: the engine records, the trajectory carries, the learner's forward replays."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ale.agent.actions import Answer
from ale.agent.episode import _Record
from ale.algorithm.objectives import objective
from ale.errors import ModelError
from ale.kernels.routing_replay import NOT_RECORDED, record_routing
from ale.learner.batch import split
from ale.learner.forward import action_logp
from ale.learner.learner import Learner, LearnerSettings
from ale.learner.weights import Layout, WeightRing, create_memory
from ale.messages import Chunk, Sample, Trajectory, Turn
from ale.policy.engine import Engine
from ale.wire import Array, round_trip

L, J, NEW = 2, 2, 16


def put_routers_near_a_tie(model: Any, seed: int) -> None:
    """Four experts at a time share their router weights but for noise that no log-probability feels by itself; the two
    that are chosen hang on it. Another seed is another engine's rounding, or an update that has hardly begun."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight.copy_(weight[::4].repeat_interleave(4, 0) + 1e-7 * torch.randn_like(weight))


def free_routing(model: Any, ids: list[int]) -> np.ndarray:
    """[T, L, J] sorted: what a forward of the whole sequence chooses."""
    with torch.no_grad(), record_routing(model) as routing:
        model(torch.tensor([ids]))
    return np.sort(routing.take()[:, 0].permute(1, 0, 2).numpy(), -1)


def recorded(turn: Turn) -> np.ndarray:
    assert turn.experts_TLJ is not None
    return turn.experts_TLJ.numpy()


def trajectories(prompts: list[list[int]], turns: dict[int, Turn], version: int = 0) -> list[Trajectory]:
    return [
        Trajectory(
            id=f"t{i}",
            group="g",
            task="task",
            family="copy",
            level=1,
            tokens_T=Array.of([*prompt, *turns[i].tokens_A.numpy()], "int32"),
            chunks=(Chunk(len(prompt), len(prompt) + len(turns[i].tokens_A), "answer"),),
            logp_A=turns[i].logp_A,
            logp_sampled_A=turns[i].logp_sampled_A,
            version_A=turns[i].version_A,
            experts_TLJ=turns[i].experts_TLJ,
            reward=float(i % 2),
        )
        for i, prompt in enumerate(prompts)
    ]


def test_a_turn_carries_the_experts_of_every_position_that_was_run(
    nano: Any, ask: Any, drive: Any, prompts: Any
) -> None:
    """Prompts of different lengths together, a common beginning that is borrowed, a second turn on a parked cache, and
    a change of weights in the middle of a turn: the record is always that of the cache as it stands."""
    engine = Engine(nano, rows=8, record_routing=True)
    common = list(range(20, 45))
    starts = [*prompts[:4], [*common, 7], [*common, 8, 9]]
    first = drive(engine, [ask(f"s{i}", p, max_tokens=NEW, seed=i) for i, p in enumerate(starts)])
    then = [[*p, *first[i].tokens_A.numpy().tolist(), 11, 12, 13] for i, p in enumerate(starts)]
    for i, prompt in enumerate(then):
        engine.add(i, ask(f"s{i}", prompt, max_tokens=NEW, seed=9 + i))
    second: dict[int, Turn] = {}
    while engine.busy:
        second |= dict(engine.step())
        if engine.statistics().generated_tokens % 5 == 0:
            engine.set_version(1)  # the same weights: computed again, not changed
    assert engine.statistics().reused_tokens
    assert engine.statistics().recomputed_tokens
    for prompts_of, turns in ((starts, first), (then, second)):
        for i, prompt in enumerate(prompts_of):
            ids = [*prompt, *turns[i].tokens_A.numpy().tolist()]
            experts = recorded(turns[i])
            assert experts.dtype == np.uint8
            assert experts.shape == (len(ids) - 1, L, J)
            np.testing.assert_array_equal(np.sort(experts, -1), free_routing(nano, ids)[:-1])


def test_an_engine_that_was_not_asked_to_records_nothing(nano: Any, ask: Any, drive: Any) -> None:
    (turn,) = drive(Engine(nano), [ask("s", [3, 4, 5], max_tokens=2)]).values()
    assert turn.experts_TLJ is None


def test_a_model_without_experts_cannot_be_recorded() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ModelError, match=r"algorithm\.routing_replay: LlamaForCausalLM has no experts"):
        Engine(LlamaForCausalLM(config), record_routing=True)


def test_a_trajectory_carries_the_record_of_its_last_turn_over_the_wire(nano: Any, ask: Any, drive: Any) -> None:
    engine, record = Engine(nano, record_routing=True), _Record(tokens=[3, 4, 5])
    for number in range(2):
        prompt = list(record.tokens)
        (turn,) = drive(engine, [ask("s", prompt, max_tokens=3, seed=number)]).values()
        record.add(turn, Answer(""))
        record.tokens += [6, 7]
    again = round_trip(trajectories([prompt], {0: turn})[0])
    assert again.experts_TLJ == record.experts == turn.experts_TLJ
    assert again.experts_TLJ.shape == (len(prompt) + 2, L, J)
    assert len(again.experts_TLJ.data) == (len(prompt) + 2) * L * J  # a byte for each choice


def test_the_replayed_forward_is_the_sampling_forward_where_the_free_one_is_not(
    nano: Any, ask: Any, drive: Any, prompts: Any
) -> None:
    put_routers_near_a_tie(nano, seed=0)
    turns = drive(
        Engine(nano, rows=4, record_routing=True),
        [ask(f"s{i}", p, max_tokens=NEW, seed=i) for i, p in enumerate(prompts[:6])],
    )
    put_routers_near_a_tie(nano, seed=1)
    given = trajectories(prompts[:6], turns)
    tokens, chunks = [t.tokens_T for t in given], [t.chunks for t in given]
    apart = []
    for experts in ([t.experts_TLJ for t in given], None):
        (batch,) = split(tokens, chunks, 10_000, experts_N=experts)
        with torch.no_grad():
            logp, _ = action_logp(nano, batch, 1.0)
        sampled = np.concatenate([given[i].logp_A.numpy() for i in batch.index])
        apart.append(float(np.abs(logp.numpy() - sampled).max()))
    replayed, free = apart
    assert free > 1e-2
    assert replayed <= 1e-5


def test_an_update_replays_what_its_samples_carry(nano: Any, nano_tokenizer: Any, ask: Any, drive: Any) -> None:
    """A group shares its prompt, in the engine's cache and in the learner's rows."""
    put_routers_near_a_tie(nano, seed=0)
    prompts = [list(range(30, 60))] * 4
    requests = [ask(f"s{i}", p, max_tokens=NEW, seed=i) for i, p in enumerate(prompts)]
    given = trajectories(prompts, drive(Engine(nano, record_routing=True), requests))
    put_routers_near_a_tie(nano, seed=1)
    truth = []
    for carried in (given, [msgspec.structs.replace(t, experts_TLJ=None) for t in given]):
        ring = WeightRing(create_memory(), Layout.of(nano, 3))
        settings = LearnerSettings(learning_rate=0.0)
        learner = Learner(nano, nano_tokenizer, ring, objective("ipa"), settings)
        metrics = learner.learn([Sample(t, 0.5 if i % 2 else -0.5) for i, t in enumerate(carried)])
        assert metrics.grad_norm > 0
        truth.append(metrics.values["truth_max"])
    assert truth[0] <= 1e-5
    assert truth[1] > 1e-2


def test_sequences_whose_records_of_a_prompt_differ_do_not_share_it() -> None:
    prompt, chunk = [5, 6, 7, 8], (Chunk(4, 6, "answer"),)
    tokens = [Array.of([*prompt, 20 + i, 30 + i], "int32") for i in range(3)]
    same, other = np.zeros((5, L, J), np.uint8), np.ones((5, L, J), np.uint8)
    experts = [Array.of(e) for e in (same, same, other)]
    (batch,) = split(tokens, [chunk] * 3, 10_000, width=128, experts_N=experts)
    assert batch.experts_LBTJ is not None
    assert batch.experts_LBTJ.shape == (L, 2, batch.ids_BT.shape[1], J)
    flat = batch.experts_LBTJ.flatten(1, 2)
    for i, places in zip(batch.index, batch.places_N, strict=True):
        assert (flat[:, places[:5]] == (1 if i == 2 else 0)).all()
        assert (flat[:, places[5:]] == NOT_RECORDED).all()


def test_sequences_without_a_record_beside_those_with_one_are_left_to_the_router() -> None:
    tokens = [Array.of([5, 6, 7], "int32"), Array.of([8, 6, 7], "int32")]
    experts = [Array.of(np.zeros((2, L, J), np.uint8)), None]
    (batch,) = split(tokens, [(Chunk(1, 3, "answer"),)] * 2, 10_000, experts_N=experts)
    assert batch.experts_LBTJ is not None
    assert batch.experts_LBTJ[0, :, :, 0].tolist() == [[0, 0, -1], [-1, -1, -1]]
    (plain,) = split(tokens, [(Chunk(1, 3, "answer"),)] * 2, 10_000)
    assert plain.experts_LBTJ is None
