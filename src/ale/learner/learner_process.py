"""The learner's process: `python -m ale.learner.learner_process FD`. One request at a time.

With `learner.ranks` above 1 this is rank 0: it starts the others, hands each request on, and answers for all.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError

from ale.errors import LearnerError
from ale.learner.crew import Crew, end_with
from ale.learner.learner import Learner
from ale.learner.opening import check_device, open_alone, open_sharded, publish_weights
from ale.learner.ranks import Ranks
from ale.learner.state import save_state
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
from ale.process import serve

REQUESTS = (TrainStep, Imitate, StartPolicyOptimization, SaveModel, SaveState)
# Of the deadline: a collective that waits for too long is an error of the ranks, which know more of it than whoever
# asked, so theirs comes first.
_PATIENCE = 0.9


class LearnerService:
    """A `Service` that has done all it was asked when it answers."""

    busy = False

    def __init__(self, learner: Learner, crew: Crew | None = None) -> None:
        self._learner = learner
        self._crew = crew

    def step(self, moved: Callable[[], None]) -> Iterable[tuple[int, msgspec.Struct]]:
        return ()

    def handle(self, number: int, request: object) -> Iterable[tuple[int, msgspec.Struct | None]]:
        if not isinstance(request, REQUESTS):
            raise LearnerError(f"the learner does not understand {type(request).__name__}")
        if self._crew is None:
            yield number, carry_out(self._learner, request)
            return
        self._crew.tell(request)
        try:
            answer = carry_out(self._learner, request)
        except LearnerError:  # all ranks have raised it, and are ready for what comes next
            raise
        except Exception:
            doing = f"{type(request).__name__}, at version {self._learner.version}"
            end_with(f"rank 0 of the learner's {self._crew.size}, in {doing}: {traceback.format_exc(limit=-4)}")
        yield number, answer


def carry_out(learner: Learner, request: object) -> msgspec.Struct | None:
    """What every rank does with a request; the answer is rank 0's to give."""
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


def join(settings: OpenLearner, rank: int, store: str) -> Ranks:
    # One node: what the ranks say to each other stays on it.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    c = settings.learner
    return Ranks.join(store, rank, c.ranks, c.device, c.step_deadline_s * _PATIENCE)


def _open(stack: ExitStack, settings: OpenLearner) -> tuple[LearnerService, Opened]:
    torch.set_num_threads(settings.threads)
    check_device(settings.learner.device, settings.learner.ranks)
    crew = None
    if settings.learner.ranks == 1:
        learner = open_alone(settings)
    else:
        buffers = publish_weights(settings)
        crew = stack.enter_context(Crew(settings))
        try:
            learner = open_sharded(settings, join(settings, 0, crew.store), buffers)
        except LearnerError:
            raise
        except Exception as error:
            raise LearnerError(f"the {crew.size} ranks did not come together: {error}") from error
    return LearnerService(learner, crew), Opened(version=learner.version, slot=learner.slot)


if __name__ == "__main__":
    with ExitStack() as opened:
        serve(int(sys.argv[1]), (OpenLearner, *REQUESTS), partial(_open, opened))
