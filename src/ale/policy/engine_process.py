"""The engine's process: `python -m ale.policy.engine_process FD`. Between two steps it takes what has arrived."""

from __future__ import annotations

import contextlib
import sys

import torch

from ale.errors import PolicyError
from ale.learner.weights import Layout, WeightRing
from ale.messages import EndSession, Generate, GetStatistics, LoadWeights, Opened, OpenEngine
from ale.models.load import load_model
from ale.policy.engine import Engine
from ale.process import Requests


def serve(requests: Requests) -> None:
    (number, settings), *rest = requests.take(block=True)
    assert isinstance(settings, OpenEngine)
    assert not rest
    try:
        torch.set_num_threads(settings.threads)
        model = load_model(settings.model)
        precision = getattr(torch, settings.precision)
        engine = Engine(model, rows=settings.rows, precision=precision, record_routing=settings.record_routing)
        ring = None
        if settings.weights_fd is not None:
            ring = WeightRing(settings.weights_fd, Layout.of(model, settings.slots))
    except Exception as error:
        requests.fail(number, error)
        return
    requests.answer(number, Opened(version=0, slot=0))
    while True:
        for number, request in requests.take(block=not engine.busy):
            try:
                _handle(engine, ring, requests, number, request)
            except Exception as error:  # it goes to whoever asked; the engine serves on
                requests.fail(number, error)
        if engine.busy:
            for number, turn in engine.step():
                requests.answer(number, turn)


def _handle(engine: Engine, ring: WeightRing | None, requests: Requests, number: int, request: object) -> None:
    match request:
        case Generate():
            engine.add(number, request)
        case EndSession(session=session):
            for abandoned in engine.end_session(session):
                requests.fail(abandoned, PolicyError(f"session {session} was ended"))
            requests.answer(number, None)
        case LoadWeights(version=version, slot=slot):
            if ring is None:
                raise PolicyError("this engine was opened without a weight ring")
            ring.adopt(slot, engine.model)
            engine.set_version(version)
            requests.answer(number, None)
        case GetStatistics():
            requests.answer(number, engine.statistics())
        case _:
            raise PolicyError(f"the engine does not understand {type(request).__name__}")


if __name__ == "__main__":
    with contextlib.suppress(EOFError):
        serve(Requests(int(sys.argv[1]), (OpenEngine, Generate, EndSession, LoadWeights, GetStatistics)))
