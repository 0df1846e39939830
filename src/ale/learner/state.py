"""The learner's state in one file: going on from it gives, bit for bit, the updates that would have been made.

    model/NAME        the weights
    optimizer/NAME/K  what the optimizer keeps for that parameter: K is exp_avg, exp_avg_sq, step
    ring/V/NAME       the weights of earlier versions V that samples still refer to (pi_old of eq. 7)
    random            the state of torch's generator
    counters          int64 [2]: the version, and the optimizer's steps, which the schedule follows

Safetensors: a file from elsewhere can hold wrong numbers, but no code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ale.errors import LearnerError
from ale.learner.learner import Learner


def save_state(learner: Learner, path: Path) -> None:
    """Writes the file. Raises `OSError` or `SafetensorError` when the disk does not take it."""
    parameters = dict(learner.model.named_parameters())
    tensors: dict[str, Tensor] = {f"model/{name}": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
    for version in _earlier(learner):
        for name, view in learner.ring.views(learner.ring.slot_of(version)).items():
            tensors[f"ring/{version}/{name}"] = view
    tensors["random"] = torch.get_rng_state()
    tensors["counters"] = torch.tensor([learner.version, learner.steps])
    save_file(tensors, path)


def load_state(learner: Learner, path: Path) -> None:
    """Puts the learner where it was. Raises `LearnerError` when the file is not of this model or this ring."""
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise LearnerError(f"the state in {path} cannot be read: {error}") from error
    with file:
        names = set(file.keys())
        version, steps = file.get_tensor("counters").tolist()
        parameters = dict(learner.model.named_parameters())
        wanted = {f"model/{name}" for name in parameters}
        if wanted != {name for name in names if name.startswith("model/")}:
            raise LearnerError(f"the state in {path} is that of another model")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"model/{name}"))
        for name, parameter in parameters.items():
            prefix = f"optimizer/{name}/"
            kept = {key.removeprefix(prefix): file.get_tensor(key) for key in names if key.startswith(prefix)}
            if kept:
                learner.optimizer.state[parameter] = kept
        learner.go_on_at(version, steps)
        for earlier in _earlier(learner):
            for name, view in learner.ring.views(learner.ring.slot_of(earlier)).items():
                view.copy_(file.get_tensor(f"ring/{earlier}/{name}"))
        torch.set_rng_state(file.get_tensor("random"))


def _earlier(learner: Learner) -> range:
    """The versions whose weights a sample may still refer to. The slot that is written next holds none of them."""
    return range(max(0, learner.version - learner.ring.layout.slots + 2), learner.version)
