"""The learner's process: `python -m ale.learner.learner_process FD`. One request at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError

from ale.algorithm.objectives import Objective, objective
from ale.config import AlgorithmConfig
from ale.errors import LearnerError
from ale.learner.learner import Learner, LearnerSettings
from ale.learner.state import load_state, save_state
from ale.learner.weights import Layout, WeightRing
from ale.messages import (
    Imitate,
    Opened,
    OpenLearner,
    Saved,
    SaveModel,
    SaveState,
    StartPolicyOptimization,
    TrainStep,
)
from ale.models.load import load_model, load_tokenizer
from ale.process import serve


class LearnerService:
    """A `Service` that has done all it was asked when it answers."""

    busy = False

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def step(self) -> Iterable[tuple[int, msgspec.Struct]]:
        return ()

    def handle(self, number: int, request: object) -> Iterable[tuple[int, msgspec.Struct | None]]:
        yield number, self._answer(request)

    def _answer(self, request: object) -> msgspec.Struct | None:
        learner = self._learner
        match request:
            case TrainStep(samples=samples):
                return learner.learn(samples)
            case Imitate():
                return learner.imitate(request.demonstrations, request.learning_rate, request.weight_decay)
            case StartPolicyOptimization():
                learner.start_policy_optimization()
                return None
            case SaveModel(path=path):
                return _saved(learner.save, path)
            case SaveState(path=path):
                return _saved(partial(save_state, learner), path)
            case _:
                raise LearnerError(f"the learner does not understand {type(request).__name__}")


def _saved(save: Callable[[Path], None], path: str) -> Saved:
    """What the disk says is an answer, not an error: whoever reads it can mend it."""
    try:
        save(Path(path))
    except (OSError, SafetensorError) as error:
        return Saved(problem=str(error))
    return Saved()


def _open(settings: OpenLearner) -> tuple[LearnerService, Opened]:
    torch.set_num_threads(settings.threads)
    model = load_model(settings.model)
    ring = WeightRing(settings.weights_fd, Layout.of(model, settings.slots))
    c = settings.learner
    learner = Learner(
        model,
        load_tokenizer(settings.model),
        ring,
        _objective(settings.algorithm),
        LearnerSettings(
            learning_rate=c.learning_rate,
            warmup_steps=c.warmup_steps,
            decay_steps=c.updates * c.epochs if c.schedule == "linear" else 0,
            beta1=c.beta1,
            beta2=c.beta2,
            weight_decay=c.weight_decay,
            max_grad_norm=c.max_grad_norm,
            micro_tokens=c.micro_tokens,
            router_loss=c.router_loss,
            temperature=settings.temperature,
            epochs=c.epochs,
            pi_old=settings.algorithm.pi_old,
            precision=settings.precision,
        ),
    )
    if settings.state is not None:
        load_state(learner, Path(settings.state))
    return LearnerService(learner), Opened(version=learner.version, slot=learner.slot)


def _objective(algorithm: AlgorithmConfig) -> Objective:
    """The objective with those of its settings that the configuration names."""
    named = {
        name: value
        for name in ("gamma", "mask_high", "mask_low", "normalization")
        if (value := getattr(algorithm, name)) is not None
    }
    return objective(algorithm.objective, **named)


if __name__ == "__main__":
    serve(int(sys.argv[1]), (OpenLearner, TrainStep, Imitate, StartPolicyOptimization, SaveModel, SaveState), _open)
