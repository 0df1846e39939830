"""The engine's process: `python -m ale.policy.engine_process FD`. Between two steps it takes what has arrived."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable

import msgspec
import torch

from ale.errors import PolicyError
from ale.learner.weights import Layout, WeightRing
from ale.messages import EndSession, Generate, GetStatistics, LoadWeights, Opened, OpenEngine, SetThreads, Turn
from ale.models.load import load_model
from ale.policy.engine import Engine
from ale.process import serve


class EngineService:
    """A `Service`: a turn is answered by the step that finishes it."""

    def __init__(self, settings: OpenEngine) -> None:
        torch.set_num_threads(settings.threads)
        model = load_model(settings.model)
        precision = getattr(torch, settings.precision)
        self._engine = Engine(model, rows=settings.rows, precision=precision, record_routing=settings.record_routing)
        self._busy_s = 0.0
        self._ring: WeightRing | None = None
        if settings.weights_fd is not None:
            self._ring = WeightRing(settings.weights_fd, Layout.of(model, settings.slots))

    @property
    def busy(self) -> bool:
        return self._engine.busy

    def step(self, moved: Callable[[], None]) -> Iterable[tuple[int, Turn]]:
        began = time.monotonic()
        turns = self._engine.step(moved)
        self._busy_s += time.monotonic() - began
        return turns

    def handle(self, number: int, request: object) -> Iterable[tuple[int, msgspec.Struct | Exception | None]]:
        engine = self._engine
        match request:
            case Generate():
                engine.add(number, request)
            case EndSession(session=session):
                for abandoned in engine.end_session(session):
                    yield abandoned, PolicyError(f"session {session} was ended")
                yield number, None
            case LoadWeights(version=version, slot=slot):
                if self._ring is None:
                    raise PolicyError("this engine was opened without a weight ring")
                self._ring.adopt(slot, engine.model)
                engine.set_version(version)
                yield number, None
            case SetThreads(threads=threads):
                torch.set_num_threads(threads)
                yield number, None
            case GetStatistics():
                yield number, msgspec.structs.replace(engine.statistics(), busy_s=self._busy_s)
            case _:
                raise PolicyError(f"the engine does not understand {type(request).__name__}")


def _open(settings: OpenEngine) -> tuple[EngineService, Opened]:
    return EngineService(settings), Opened(version=0, slot=0)


if __name__ == "__main__":
    serve(int(sys.argv[1]), (OpenEngine, Generate, EndSession, LoadWeights, SetThreads, GetStatistics), _open)
