import dataclasses
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ale.errors import ModelError, PolicyError
from ale.heart import Beat, Heart
from ale.learner.batch import split
from ale.learner.forward import action_logp
from ale.learner.learner import TRUTH_TOLERANCE
from ale.messages import Chunk
from ale.policy.engine import Engine
from ale.wire import Array


def tokens(turn: Any) -> list[int]:
    return turn.tokens_A.numpy().tolist()


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


class Routes:
    """Records which experts each router chose, call by call: int [rows, layers, k] for all tokens a forward saw."""

    def __init__(self, model: Any) -> None:
        self._seen: list[list[torch.Tensor]] = []
        gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        assert gates
        for gate in gates:
            calls: list[torch.Tensor] = []
            self._seen.append(calls)
            gate.register_forward_hook(lambda _m, _i, out, calls=calls: calls.append(out[2].sort(-1).values))

    def take(self) -> torch.Tensor:
        seen = torch.stack([torch.cat(calls) for calls in self._seen], 1)
        for calls in self._seen:
            calls.clear()
        return seen


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_log_probabilities_are_those_of_the_training_forward(
    nano: Any, ask: Any, drive: Any, prompts: Any, training_logp: Any, temperature: float
) -> None:
    requests = [
        ask(f"s{i}", prompt, max_tokens=24, seed=i, temperature=temperature) for i, prompt in enumerate(prompts)
    ]
    turns = drive(Engine(nano, rows=16), requests)
    gap = np.concatenate(
        [
            np.abs(training_logp(nano, prompt, turns[i], temperature) - turns[i].logp_A.numpy())
            for i, prompt in enumerate(prompts)
        ]
    )
    assert len(gap) == 40 * 24
    assert (gap > TRUTH_TOLERANCE).mean() <= 1e-4
    assert gap.max() < 1e-4  # no router of this model is near a tie
    for turn in turns.values():
        np.testing.assert_array_equal(turn.logp_A.numpy(), turn.logp_sampled_A.numpy())


def test_where_the_log_probabilities_disagree_the_router_chose_another_expert(
    nano: Any, ask: Any, prompts: Any
) -> None:
    """Four experts at a time share their router weights but for a rounding error, and two are chosen: ties that the
    order of summation decides. Engine and training forward sum in different orders."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in nano.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight.copy_(weight[::4].repeat_interleave(4, 0) + 1e-8 * torch.randn_like(weight))
    routes = Routes(nano)
    exceptions = unexplained = total = 0
    for i, prompt in enumerate(prompts[:20]):
        engine = Engine(nano, rows=1)
        engine.add(0, ask(f"s{i}", prompt, max_tokens=24, seed=i))
        (turn,) = [turn for _ in range(24) for _, turn in engine.step()]
        sampled = routes.take()  # the prompt, then one token a step: every position but the last token's
        ids = [*prompt, *tokens(turn)]
        (batch,) = split([Array.of(ids, "int32")], [(Chunk(len(prompt), len(ids), "answer"),)], 10_000)
        with torch.no_grad():
            logp = action_logp(nano, batch, 1.0)[0].numpy()
        trained = routes.take()[: len(sampled)]
        assert len(sampled) == len(ids) - 1
        # A token depends on its own experts and, through attention, on those of every position before it.
        changed = (sampled != trained).any(-1).any(-1).numpy()
        touched = np.logical_or.accumulate(changed)[len(prompt) - 1 :]
        apart = np.abs(logp - turn.logp_A.numpy()) > TRUTH_TOLERANCE
        total += len(apart)
        exceptions += int(apart.sum())
        unexplained += int((apart & ~touched).sum())
    assert exceptions > 0.01 * total, "the case shows nothing: no router was near enough to a tie"
    assert unexplained == 0


def test_a_turn_on_the_kept_cache_gives_the_tokens_of_a_fresh_prompt(
    nano: Any, ask: Any, drive: Any, prompts: Any
) -> None:
    engine = Engine(nano, rows=4)
    for i, prompt in enumerate(prompts[:6]):
        (first,) = drive(engine, [ask(f"s{i}", prompt, max_tokens=12, seed=i)]).values()
        second_prompt = [*prompt, *tokens(first), 17, 18, 19]
        before = engine.statistics().reused_tokens
        (kept,) = drive(engine, [ask(f"s{i}", second_prompt, max_tokens=12, seed=i)]).values()
        assert engine.statistics().reused_tokens - before == len(prompt) + 11  # the last token was never computed
        (fresh,) = drive(Engine(nano), [ask("other", second_prompt, max_tokens=12, seed=i)]).values()
        assert tokens(kept) == tokens(fresh)
        np.testing.assert_allclose(kept.logp_A.numpy(), fresh.logp_A.numpy(), atol=1e-5)


def test_only_the_agreeing_part_of_a_kept_cache_is_reused(nano: Any, ask: Any, drive: Any) -> None:
    engine = Engine(nano)
    drive(engine, [ask("s", [11, 12, 13, 14, 15], max_tokens=3)])
    edited = [11, 12, 99, 14]
    (turn,) = drive(engine, [ask("s", edited, max_tokens=6)]).values()
    assert engine.statistics().reused_tokens == 2
    (fresh,) = drive(Engine(nano), [ask("s", edited, max_tokens=6)]).values()
    assert tokens(turn) == tokens(fresh)


def test_the_very_same_prompt_again_computes_its_last_token_anew(nano: Any, ask: Any, drive: Any) -> None:
    engine = Engine(nano)
    request = ask("s", [11, 12, 13], max_tokens=5)
    (first,) = drive(engine, [request]).values()
    (again,) = drive(engine, [request]).values()
    assert engine.statistics().reused_tokens == 2
    assert tokens(first) == tokens(again)


def test_each_token_belongs_to_the_weights_that_computed_it(
    nano_path: Any, ask: Any, prompts: Any, training_logp: Any
) -> None:
    from ale.models.load import load_model

    models = [load_model(nano_path) for _ in range(3)]
    for scale, model in enumerate(models):
        torch.manual_seed(scale)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * scale * torch.randn_like(weight)
    engine = Engine(load_model(nano_path), rows=4)
    for i, prompt in enumerate(prompts[:8]):  # four run, four wait: a change must reach both
        engine.add(i, ask(f"s{i}", prompt, max_tokens=15, seed=i))
    turns = {}
    step = 0
    while engine.busy:
        if step in (5, 11):
            version = engine.version + 1
            engine.model.load_state_dict(models[version].state_dict())
            engine.set_version(version)
        turns |= dict(engine.step())
        step += 1
    assert turns[0].version_A.numpy().tolist() == [0] * 5 + [1] * 6 + [2] * 4
    assert turns[7].version_A.numpy().tolist() == [2] * 15
    for i, turn in turns.items():
        versions = turn.version_A.numpy()
        under = np.stack([training_logp(model, prompts[i], turn) for model in models])
        own = under[versions, np.arange(len(versions))]
        assert np.abs(own - turn.logp_A.numpy()).max() < TRUTH_TOLERANCE
        others = np.abs(under - turn.logp_A.numpy())
        assert others[(versions + 1) % 3, np.arange(len(versions))].max() > 0.01  # the versions do differ
    assert engine.statistics().recomputed_tokens > 0


def test_a_step_of_many_forwards_tells_of_each(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights make one of all prompts that are under way: whoever watches must not take that for a stuck one."""
    monkeypatch.setattr("ale.policy.engine._PREFILL_TOKENS", 20)
    engine, moves = Engine(tiny_llama()), list[int]()
    for number in range(4):
        engine.add(number, ask(str(number), range(16 * number, 16 * number + 16), max_tokens=8))
    for expected in (4, 1):
        moves.clear()
        engine.step(lambda: moves.append(1))
        assert len(moves) == expected
    engine.set_version(1)
    moves.clear()
    engine.step(lambda: moves.append(1))
    assert len(moves) == 4


def test_a_heart_that_is_told_of_a_part_beats_on_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ale.heart.BEAT_S", 0.01)
    beats: Queue[Beat] = Queue()
    with Heart(beats.put) as heart, heart.doing("a step"):
        assert beats.get(timeout=10).steps == 0
        heart.moved()
        while (beat := beats.get(timeout=10)).steps != 1:
            pass
        assert beat.doing == "a step"


def test_a_change_of_weights_forgets_what_was_parked(nano: Any, ask: Any, drive: Any) -> None:
    engine = Engine(nano)
    drive(engine, [ask("s", [11, 12, 13], max_tokens=2)])
    assert engine.statistics().parked == 1
    engine.set_version(1)
    assert engine.statistics().parked == 0
    drive(engine, [ask("s", [11, 12, 13], max_tokens=2)])
    assert engine.statistics().reused_tokens == 0


def test_a_sequence_gets_the_same_tokens_alone_and_among_thirty(nano: Any, ask: Any, drive: Any, prompts: Any) -> None:
    mine = ask("mine", prompts[0], max_tokens=30, seed=5)
    (alone,) = drive(Engine(nano), [mine]).values()
    others = [
        ask(f"s{i}", p, max_tokens=3 + i, seed=i, temperature=0.5 + i / 30, top_p=0.9 if i % 2 else 1.0)
        for i, p in enumerate(prompts[1:31])
    ]
    for place in (0, 15, 30):
        crowd = [*others[:place], mine, *others[place:]]
        for rows in (4, 31):
            assert tokens(drive(Engine(nano, rows=rows), crowd)[place]) == tokens(alone)


def test_rows_stay_right_when_sequences_end_out_of_order(nano: Any, ask: Any, drive: Any, prompts: Any) -> None:
    lengths = [9, 2, 17, 1, 5, 30, 3, 11]
    requests = [ask(f"s{i}", p, max_tokens=n, seed=i) for i, (p, n) in enumerate(zip(prompts, lengths, strict=False))]
    together = drive(Engine(nano, rows=5), requests)
    for i, request in enumerate(requests):
        (alone,) = drive(Engine(nano), [request]).values()
        assert tokens(together[i]) == tokens(alone)
        assert len(tokens(alone)) == lengths[i]


def test_the_session_parked_longest_is_evicted(nano: Any, ask: Any, drive: Any) -> None:
    engine = Engine(nano, parked=2)
    for name in "abc":
        drive(engine, [ask(name, [11, 12, 13, 14], max_tokens=2)])
    assert engine.statistics().parked == 2
    drive(engine, [ask("a", [11, 12, 13, 14], max_tokens=2)])
    assert engine.statistics().reused_tokens == 0  # a was evicted, and now pushed b out
    drive(engine, [ask("c", [11, 12, 13, 14], max_tokens=2)])
    assert engine.statistics().reused_tokens == 3


def test_ending_a_session_abandons_it_wherever_it_is(nano: Any, ask: Any, drive: Any, prompts: Any) -> None:
    engine = Engine(nano, rows=3)
    assert engine.end_session("nobody") == []
    drive(engine, [ask("parked", prompts[0], max_tokens=2)])
    assert engine.end_session("parked") == []
    assert engine.statistics().parked == 0

    for i in range(5):
        engine.add(i, ask(f"s{i}", prompts[i], max_tokens=8, seed=i))
    engine.step()
    assert engine.end_session("s0") == [0]  # it runs in the first row: another moves there
    assert engine.end_session("s4") == [4]  # it still waits
    turns = drive(engine)
    assert sorted(turns) == [1, 2, 3]
    for i, turn in turns.items():
        (alone,) = drive(Engine(nano), [ask("alone", prompts[i], max_tokens=8, seed=i)]).values()
        assert tokens(turn) == tokens(alone)
    assert engine.statistics().parked == 3


def test_ending_a_session_abandons_all_its_requests(nano: Any, ask: Any) -> None:
    engine = Engine(nano, rows=2)
    for i in range(3):
        engine.add(i, ask("s", [11, 12, 13 + i], max_tokens=8))
    engine.step()
    assert sorted(engine.end_session("s")) == [0, 1, 2]
    assert not engine.busy


def test_greedy_takes_the_likeliest_token_at_each_step(nano: Any, ask: Any, drive: Any, prompts: Any) -> None:
    turns = drive(Engine(nano), [ask(f"s{i}", p, max_tokens=10, temperature=0.0) for i, p in enumerate(prompts[:6])])
    for i, prompt in enumerate(prompts[:6]):
        ids = list(prompt)
        for got, logp in zip(tokens(turns[i]), turns[i].logp_A.numpy(), strict=True):
            with torch.no_grad():
                expected = torch.log_softmax(nano(torch.tensor([ids])).logits[0, -1], -1)
            assert got == int(expected.argmax())
            assert logp == pytest.approx(float(expected.max()), abs=1e-4)
            ids.append(got)
        assert not turns[i].logp_sampled_A.numpy().any()  # greedy has no choice


def test_generation_ends_at_a_stop_token_which_is_part_of_the_turn(nano: Any, ask: Any, drive: Any) -> None:
    (free,) = drive(Engine(nano), [ask("s", [11, 12], max_tokens=20, seed=1)]).values()
    assert free.finish == "length"
    assert len(tokens(free)) == 20
    stop = tokens(free)[7]
    first = tokens(free).index(stop)
    (stopped,) = drive(Engine(nano), [ask("s", [11, 12], max_tokens=20, seed=1, stop=(stop,))]).values()
    assert stopped.finish == "stop"
    assert tokens(stopped) == tokens(free)[: first + 1]


def test_a_prompt_that_ends_with_a_stop_token_is_continued(nano: Any, ask: Any, drive: Any) -> None:
    (turn,) = drive(Engine(nano), [ask("s", [11, 5], max_tokens=4, stop=(5,))]).values()
    assert len(tokens(turn)) >= 1


def test_a_stop_token_that_is_the_last_allowed_one_counts_as_stop(nano: Any, ask: Any, drive: Any) -> None:
    (free,) = drive(Engine(nano), [ask("s", [11, 12], max_tokens=1)]).values()
    (turn,) = drive(Engine(nano), [ask("s", [11, 12], max_tokens=1, stop=(tokens(free)[0],))]).values()
    assert turn.finish == "stop"


def test_truncated_sampling_reports_both_log_probabilities(nano: Any, ask: Any, drive: Any) -> None:
    (turn,) = drive(Engine(nano), [ask("s", [11, 12], max_tokens=30, top_k=3, seed=2)]).values()
    ids = [11, 12]
    for got, logp, sampled in zip(tokens(turn), turn.logp_A.numpy(), turn.logp_sampled_A.numpy(), strict=True):
        with torch.no_grad():
            full = torch.log_softmax(nano(torch.tensor([ids])).logits[0, -1], -1)
        best = full.topk(3)
        assert got in best.indices.tolist()
        assert logp == pytest.approx(float(full[got]), abs=1e-4)
        assert sampled == pytest.approx(float(full[got] - best.values.logsumexp(-1)), abs=1e-4)
        ids.append(got)


@pytest.mark.parametrize(
    ("prompt", "sampling", "named"),
    [
        ([], {}, "prompt_T is empty"),
        ([3, 100_000], {}, "ids outside 0"),
        ([3, -1], {}, "ids outside 0"),
        ([3] * 2000, {"max_tokens": 49}, "2048 positions"),
        ([3], {"max_tokens": 0}, "Sampling.max_tokens"),
        ([3], {"temperature": -0.5}, "Sampling.temperature"),
        ([3], {"temperature": float("nan")}, "Sampling.temperature"),
        ([3], {"top_p": 0.0}, "Sampling.top_p"),
        ([3], {"top_k": 0}, "Sampling.top_k"),
    ],
)
def test_a_request_that_cannot_run_is_refused_by_name(
    nano: Any, ask: Any, prompt: Any, sampling: Any, named: str
) -> None:
    engine = Engine(nano)
    with pytest.raises(PolicyError, match=named):
        engine.add(0, ask("s", prompt, **sampling))
    assert not engine.busy


def test_a_prompt_of_one_token_runs(nano: Any, ask: Any, drive: Any, training_logp: Any) -> None:
    (turn,) = drive(Engine(nano), [ask("s", [11], max_tokens=5)]).values()
    np.testing.assert_allclose(training_logp(nano, [11], turn), turn.logp_A.numpy(), atol=1e-4)


def test_a_sequence_may_fill_the_models_last_position(ask: Any, drive: Any, training_logp: Any) -> None:
    model = tiny_llama(max_position_embeddings=64)
    prompt = list(range(60))
    turns = drive(Engine(model), [ask("s", prompt, max_tokens=4), ask("t", [1], max_tokens=9)])
    np.testing.assert_allclose(training_logp(model, prompt, turns[0]), turns[0].logp_A.numpy(), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_llama_runs_too(ask: Any, drive: Any, prompts: Any, training_logp: Any, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    turns = drive(Engine(model, rows=3), [ask(f"s{i}", p, max_tokens=8, seed=i) for i, p in enumerate(prompts[:5])])
    for i, turn in turns.items():
        np.testing.assert_allclose(training_logp(model, prompts[i], turn), turn.logp_A.numpy(), atol=1e-4)


def test_a_model_with_sliding_windows_is_refused_rather_than_run_wrongly() -> None:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
    config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="sliding_attention"):
        Engine(_configured(config))
    config.layer_types = None
    config.sliding_window = 16
    with pytest.raises(ModelError, match="window of 16"):
        Engine(_configured(config))


@dataclasses.dataclass
class _configured:
    """What the engine asks of a model before it looks at the kind of its attention."""

    config: LlamaConfig
    dtype: torch.dtype = torch.float32

    def eval(self) -> "_configured":
        return self

    def modules(self) -> tuple[()]:
        return ()
