"""A learner of several processes makes the updates of one: gloo on the CPU, over the socket that the controller has."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from ale.config import AlgorithmConfig, LearnerConfig
from ale.errors import LearnerError, WorkerDied
from ale.learner.batch import split
from ale.learner.forward import action_logp
from ale.learner.learner import Learner
from ale.learner.opening import open_alone
from ale.learner.ranks import Ranks
from ale.learner.state import save_state
from ale.learner.weights import WeightRing, create_memory
from ale.messages import Chunk, Demonstration, Imitate, OpenLearner, Sample, SaveModel, SaveState, TrainStep, Trajectory
from ale.models.load import load_model
from ale.process import WorkerProcess
from ale.testing.processes import ended
from ale.wire import Array

DEADLINE_S = 250.0
# The first moment of AdamW is then the gradient itself.
PLAIN = {"beta1": 0.0, "max_grad_norm": 1e9, "warmup_steps": 0}


@pytest.fixture
def memory() -> Iterator[Callable[[], int]]:
    made = []

    def make() -> int:
        made.append(create_memory())
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def dense_path(tmp_path: Path, nano_tokenizer: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    nano_tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def opening(model: Path, fd: int, *, ranks: int = 1, state: Path | None = None, **fields: Any) -> OpenLearner:
    settings: dict[str, Any] = {"learning_rate": 3e-3, "step_deadline_s": DEADLINE_S, **fields}
    precision = settings.pop("precision", "float32")
    return OpenLearner(
        model=str(model),
        weights_fd=fd,
        slots=3,
        threads=1,
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(ranks=ranks, **settings),
        temperature=1.0,
        state=None if state is None else str(state),
        precision=precision,
    )


@asynccontextmanager
async def learner(settings: OpenLearner) -> AsyncIterator[WorkerProcess]:
    fds = (settings.weights_fd,)
    async with WorkerProcess("ale.learner.learner_process", error=LearnerError, pass_fds=fds) as worker:
        await worker.ask(settings, deadline_s=DEADLINE_S)
        yield worker


def make_samples(model: Any, count: int, *, version: int = 0, seed: int = 0, vocab: int = 300) -> tuple[Sample, ...]:
    """Two groups that share a prompt each, of one or two chunks, as `model` would have sampled them."""
    rng, samples = np.random.default_rng(seed), []
    prompts = [rng.integers(10, vocab, 14) for _ in range(2)]
    for n in range(count):
        prompt = prompts[2 * n // count]
        ids = np.concatenate([prompt, rng.integers(10, vocab, int(rng.integers(8, 20)))])
        tokens, chunks = Array.of(ids, "int32"), (Chunk(14, 17, "call"), Chunk(19, len(ids), "answer"))
        (batch,) = split([tokens], [chunks], 1000)
        with torch.no_grad():
            logp = Array.of(action_logp(model, batch, 1.0)[0].numpy(), "float32")
        trajectory = Trajectory(
            id=f"s{seed}/{n}",
            group="g",
            task="t",
            family="copy",
            level=1,
            tokens_T=tokens,
            chunks=chunks,
            logp_A=logp,
            logp_sampled_A=logp,
            version_A=Array.of([version] * len(logp), "int32"),
            reward=float(n % 2),
        )
        samples.append(Sample(trajectory, 0.5 if n % 2 else -0.4))
    return tuple(samples)


def at_version(alone: Learner, path: Path, version: int) -> Any:
    """The model with the weights that the ring has for a version."""
    model = load_model(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(alone.ring.views(alone.ring.slot_of(version))[name])
    return model


def gradients(state: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_file(state).items() if name.endswith("/exp_avg")}


def near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) <= tolerance * max(float(tensor.abs().max()), 1e-3), name


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(scenario())


async def parity(
    path: Path, tmp_path: Path, memory: Callable[[], int], batches: Sequence[int], ranks: int = 2, **fields: Any
) -> None:
    """Updates on batches of which the later ones are of older versions: gradients, losses, norms, weights; then both
    ways from one checkpoint."""
    alone = open_alone(opening(path, memory(), **PLAIN, **fields))
    settings = opening(path, memory(), ranks=ranks, **PLAIN, **fields)
    precise = fields.get("precision", "float32") == "float32"
    async with learner(settings) as worker:
        for number, count in enumerate(batches):
            version = max(0, number - 1)  # from the second update on, of the version before
            samples = make_samples(at_version(alone, path, version), count, version=version, seed=number)
            expected = alone.learn(samples)
            found = await worker.ask(TrainStep(samples=samples), deadline_s=DEADLINE_S)
            tolerance = 1e-5 if precise else 2e-2
            assert (found.version, found.slot) == (expected.version, expected.slot)
            assert found.loss == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance)
            for name in ("tokens", "action_tokens", "effective_chunks", "learning_rate"):
                assert found.values[name] == pytest.approx(expected.values[name], rel=tolerance), name
            if number == 0:
                state = tmp_path / "first"
                assert (await worker.ask(SaveState(path=str(state)), deadline_s=DEADLINE_S)).problem is None
                save_state(alone, tmp_path / "alone")
                near(gradients(state), gradients(tmp_path / "alone"), 1e-5 if precise else 5e-2)
        state = tmp_path / "many"
        assert (await worker.ask(SaveState(path=str(state)), deadline_s=DEADLINE_S)).problem is None
        assert (await worker.ask(SaveModel(path=str(tmp_path / "hf")), deadline_s=DEADLINE_S)).problem is None
        ring = WeightRing(settings.weights_fd, alone.ring.layout)
        for name, tensor in ring.views(found.slot).items():
            if precise:  # rounding decides the sign of a step where the gradient is next to nothing
                torch.testing.assert_close(tensor, alone.ring.views(alone.slot)[name], atol=2e-2 * 3e-3, rtol=1e-3)
            assert torch.equal(load_model(tmp_path / "hf").get_parameter(name), tensor), name
        again = make_samples(at_version(alone, path, alone.version), 4, version=alone.version, seed=99)
        expected = await worker.ask(TrainStep(samples=again), deadline_s=DEADLINE_S)
    resumed = open_alone(opening(path, memory(), state=state, **PLAIN, **fields))
    assert resumed.version == len(batches)
    found = resumed.learn(again)
    assert found.version == expected.version
    assert found.loss == pytest.approx(expected.loss, rel=1e-4 if precise else 5e-2, abs=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4 if precise else 5e-2)


def test_two_ranks_make_the_updates_of_one_and_one_goes_on_from_their_checkpoint(
    nano_path: Path, tmp_path: Path, memory: Callable[[], int]
) -> None:
    """A mixture of experts; the last batch has less than a sample for each rank."""
    run(lambda: parity(nano_path, tmp_path, memory, (6, 8, 1), router_loss=0.01))


@pytest.mark.full
@pytest.mark.parametrize(
    "fields",
    [{}, {"micro_tokens": 40}, {"epochs": 2}, {"activation_checkpointing": True}, {"precision": "bfloat16"}],
    ids=["plain", "small micro-batches", "two epochs", "checkpointing", "bfloat16"],
)
def test_two_ranks_of_a_dense_model(
    dense_path: Path, tmp_path: Path, memory: Callable[[], int], fields: dict[str, Any]
) -> None:
    run(lambda: parity(dense_path, tmp_path, memory, (6, 5, 4), **fields))


@pytest.mark.full
def test_three_ranks_none_of_whose_shares_is_even(nano_path: Path, tmp_path: Path, memory: Callable[[], int]) -> None:
    """Eight experts over three ranks: 3, 3 and 2; with layers computed again, in which routers choose again."""
    run(lambda: parity(nano_path, tmp_path, memory, (7, 2), ranks=3, router_loss=0.01, activation_checkpointing=True))


@pytest.mark.full
def test_two_ranks_go_on_from_the_checkpoint_of_one(nano_path: Path, tmp_path: Path, memory: Callable[[], int]) -> None:
    async def scenario() -> None:
        alone = open_alone(opening(nano_path, memory()))
        for version in range(2):
            alone.learn(make_samples(at_version(alone, nano_path, version), 5, version=version, seed=version))
        save_state(alone, tmp_path / "state")
        # Of the version before: its weights have to come out of the checkpoint too.
        samples = make_samples(at_version(alone, nano_path, 1), 6, version=1, seed=7)
        expected = alone.learn(samples)
        async with learner(opening(nano_path, memory(), ranks=2, state=tmp_path / "state")) as worker:
            found = await worker.ask(TrainStep(samples=samples), deadline_s=DEADLINE_S)
        assert found.version == 3
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert found.values["truth_max"] == pytest.approx(expected.values["truth_max"], abs=1e-5)

    run(scenario)


@pytest.mark.full
def test_what_goes_wrong_with_a_request_leaves_all_ranks_ready_for_the_next(
    nano_path: Path, tmp_path: Path, memory: Callable[[], int]
) -> None:
    async def scenario() -> None:
        alone = open_alone(opening(nano_path, memory()))
        samples = make_samples(load_model(nano_path), 6)
        nan = Array.of(np.full(len(samples[1].trajectory.logp_A), np.nan), "float32")
        broken = (*samples[:1], Sample(msgspec.structs.replace(samples[1].trajectory, logp_A=nan), 0.5), *samples[2:])
        async with learner(opening(nano_path, memory(), ranks=2)) as worker:

            async def ask(*given: Sample) -> Any:
                return await worker.ask(TrainStep(samples=given), deadline_s=DEADLINE_S)

            outside = msgspec.structs.replace(samples[5].trajectory, chunks=(Chunk(14, 999, "answer"),))
            with pytest.raises(LearnerError, match=r"chunk 14\.\.999"):  # on one rank only
                await ask(*samples[:5], Sample(outside, 0.5))
            nowhere = await worker.ask(SaveState(path=str(tmp_path / "no" / "state")), deadline_s=DEADLINE_S)
            assert "No such file" in (nowhere.problem or "")
            future = msgspec.structs.replace(
                samples[0].trajectory, version_A=Array.of([7] * len(samples[0].trajectory.logp_A), "int32")
            )
            with pytest.raises(LearnerError, match="version 7 are gone"):
                await ask(Sample(future, 0.5))
            expected, found = alone.learn(broken), await ask(*broken)
            assert found.dropped == expected.dropped == {"s0/1": "logp_not_finite"}
            assert found.loss == pytest.approx(expected.loss, rel=1e-5)
            nothing = await ask(broken[1])
            assert (nothing.version, nothing.loss, nothing.grad_norm) == (2, 0.0, 0.0)
            shown = Demonstration(tokens_T=Array.of(range(10, 30), "int32"), chunks=(Chunk(5, 20, "answer"),))
            imitate = Imitate(demonstrations=(shown,) * 3, learning_rate=1e-2)
            assert (await worker.ask(imitate, deadline_s=DEADLINE_S)).version == 3

    run(scenario)


@pytest.mark.full
def test_a_sequence_that_the_policy_gives_nan_is_dropped_on_all_ranks(
    dense_path: Path, memory: Callable[[], int]
) -> None:
    async def scenario() -> None:
        samples = list(make_samples(load_model(dense_path), 6))
        poison = np.array(samples[4].trajectory.tokens_T.numpy())
        poison[15] = 310
        samples[4] = Sample(msgspec.structs.replace(samples[4].trajectory, tokens_T=Array.of(poison, "int32")), 0.5)
        model = load_model(dense_path)
        with torch.no_grad():
            model.get_input_embeddings().weight[310] = np.nan
        model.save_pretrained(dense_path)
        alone = open_alone(opening(dense_path, memory()))
        expected = alone.learn(samples)
        async with learner(opening(dense_path, memory(), ranks=2)) as worker:
            found = await worker.ask(TrainStep(samples=tuple(samples)), deadline_s=DEADLINE_S)
        # Those that share its prompt stand in its row, and are dropped with it.
        assert found.dropped == expected.dropped
        assert "s0/4" in found.dropped
        assert not {"s0/0", "s0/1", "s0/2"} & set(found.dropped)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)

    run(scenario)


def workers_of(worker: WorkerProcess) -> list[int]:
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    return [int(pid) for pid in children]


@pytest.mark.full
@pytest.mark.parametrize("busy", [False, True], ids=["while it waits", "in an update"])
def test_a_rank_that_dies_ends_the_learner_with_its_name(
    nano_path: Path, memory: Callable[[], int], busy: bool
) -> None:
    async def scenario() -> None:
        samples = make_samples(load_model(nano_path), 6)
        async with learner(opening(nano_path, memory(), ranks=3)) as worker:
            await worker.ask(TrainStep(samples=samples), deadline_s=DEADLINE_S)
            pids = workers_of(worker)
            assert len(pids) == 2
            descriptors = [os.pidfd_open(pid) for pid in (worker.pid, *pids)]
            if busy:
                os.kill(pids[0], signal.SIGSTOP)  # the others wait for it, inside a collective
                asked = asyncio.create_task(worker.ask(TrainStep(samples=samples * 1), deadline_s=DEADLINE_S))
                while not _computes(pids[1]):
                    await asyncio.sleep(0)
            os.kill(pids[0], signal.SIGKILL)
            with pytest.raises(WorkerDied, match=r"rank 1 of the learner's 3 ended \(killed by SIGKILL; process"):
                if busy:
                    await asked
                while True:
                    await worker.ask(TrainStep(samples=samples), deadline_s=DEADLINE_S)
        assert ended(descriptors) == 3

    run(scenario)


def _computes(pid: int) -> bool:
    """Whether it has taken the request: it is in a collective, whose socket is not the one it was told by."""
    return "unix_stream" not in Path(f"/proc/{pid}/wchan").read_text()


@pytest.mark.full
def test_a_rank_that_answers_no_more_ends_the_learner_within_its_deadline(
    nano_path: Path, memory: Callable[[], int]
) -> None:
    async def scenario() -> None:
        samples = make_samples(load_model(nano_path), 6)
        async with learner(opening(nano_path, memory(), ranks=2, step_deadline_s=20.0)) as worker:
            await worker.ask(TrainStep(samples=samples), deadline_s=DEADLINE_S)
            (pid,) = workers_of(worker)
            descriptors = [os.pidfd_open(pid) for pid in (worker.pid, pid)]
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(
                WorkerDied, match=r"rank 0 of the learner's 2, in TrainStep, at version 1(.|\n)*[Tt]imed out"
            ):
                await worker.ask(TrainStep(samples=samples), deadline_s=60.0)
        assert ended(descriptors) == 2

    run(scenario)


@pytest.mark.full
def test_no_rank_outlives_a_learner_that_is_killed(nano_path: Path, memory: Callable[[], int]) -> None:
    async def scenario() -> None:
        async with learner(opening(nano_path, memory(), ranks=3)) as worker:
            descriptors = [os.pidfd_open(pid) for pid in (worker.pid, *workers_of(worker))]
            os.kill(worker.pid, signal.SIGKILL)
            assert ended(descriptors) == 3

    run(scenario)


def test_samples_are_dealt_out_in_runs_whose_costs_are_even() -> None:
    def shares(costs: list[float], size: int) -> list[list[int]]:
        return [list(Ranks(rank, size).share(costs)) for rank in range(size)]

    assert shares([1.0] * 6, 2) == [[0, 1, 2], [3, 4, 5]]
    assert shares([9.0, 1.0, 1.0, 1.0, 6.0], 2) == [[0], [1, 2, 3, 4]]
    assert shares([5.0], 2) in ([[0], []], [[], [0]])
    assert shares([], 3) == [[], [], []]
    costs = np.random.default_rng(0).integers(20, 400, 64).astype(float).tolist()
    for size in (2, 3, 8):
        dealt = shares(costs, size)
        assert [i for share in dealt for i in share] == list(range(64))
        loads = [sum(costs[i] for i in share) for share in dealt]
        assert max(loads) - sum(costs) / size <= max(costs)
