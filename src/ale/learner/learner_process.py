"""The learner's process: `python -m ale.learner.learner_process FD`. One request at a time."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import msgspec
import torch

from ale.algorithm.objectives import Objective, objective
from ale.config import AlgorithmConfig
from ale.errors import LearnerError
from ale.learner.learner import Learner, LearnerSettings
from ale.learner.weights import Layout, WeightRing
from ale.messages import Imitate, Opened, OpenLearner, SaveCheckpoint, StartPolicyOptimization, TrainStep
from ale.models.load import load_model, load_tokenizer
from ale.process import Requests


def serve(requests: Requests) -> None:
    (number, settings), *rest = requests.take(block=True)
    assert isinstance(settings, OpenLearner)
    assert not rest
    try:
        learner = _open(settings)
    except Exception as error:
        requests.fail(number, error)
        return
    requests.answer(number, Opened(version=learner.version, slot=learner.slot))
    while True:
        for number, request in requests.take(block=True):
            try:
                requests.answer(number, _handle(learner, request))
            except Exception as error:  # it goes to whoever asked
                requests.fail(number, error)


def _handle(learner: Learner, request: object) -> msgspec.Struct | None:
    match request:
        case TrainStep(samples=samples):
            return learner.learn(samples)
        case Imitate():
            return learner.imitate(request.demonstrations, request.learning_rate, request.weight_decay)
        case StartPolicyOptimization():
            learner.start_policy_optimization()
            return None
        case SaveCheckpoint(path=path):
            learner.save(Path(path))
            return None
        case _:
            raise LearnerError(f"the learner does not understand {type(request).__name__}")


def _open(settings: OpenLearner) -> Learner:
    torch.set_num_threads(settings.threads)
    model = load_model(settings.model)
    ring = WeightRing(settings.weights_fd, Layout.of(model, settings.slots))
    c = settings.learner
    return Learner(
        model,
        load_tokenizer(settings.model),
        ring,
        _objective(settings.algorithm),
        LearnerSettings(
            learning_rate=c.learning_rate,
            warmup_steps=c.warmup_steps,
            beta1=c.beta1,
            beta2=c.beta2,
            weight_decay=c.weight_decay,
            max_grad_norm=c.max_grad_norm,
            micro_tokens=c.micro_tokens,
            router_loss=c.router_loss,
            temperature=settings.temperature,
            epochs=c.epochs,
            pi_old=settings.algorithm.pi_old,
        ),
    )


def _objective(algorithm: AlgorithmConfig) -> Objective:
    """The objective with those of its settings that the configuration names."""
    named = {
        name: value
        for name in ("gamma", "mask_high", "mask_low", "normalization")
        if (value := getattr(algorithm, name)) is not None
    }
    return objective(algorithm.objective, **named)


if __name__ == "__main__":
    with contextlib.suppress(EOFError):
        serve(Requests(int(sys.argv[1]), (OpenLearner, TrainStep, Imitate, StartPolicyOptimization, SaveCheckpoint)))
