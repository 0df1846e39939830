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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LearnerError(f"the state in {path} cannot be read: {error}") from error
    parameters = dict(learner.model.named_parameters())
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    if {name: t.shape for name, t in weights.items()} != {name: p.shape for name, p in parameters.items()}:
        raise LearnerError(f"the state in {path} is that of another model than the run began with")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for name, parameter in parameters.items():
        prefix = f"optimizer/{name}/"
        kept = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        if kept:
            learner.optimizer.state[parameter] = kept
    version, steps = tensors["counters"].tolist()
    learner.go_on_at(version, steps)
    for earlier in _earlier(learner):
        for name, view in learner.ring.views(learner.ring.slot_of(earlier)).items():
            view.copy_(tensors[f"ring/{earlier}/{name}"])
    torch.set_rng_state(tensors["random"])


def _earlier(learner: Learner) -> range:
    """The versions whose weights a sample may still refer to. The slot that is written next holds none of them."""
    return range(max(0, learner.version - learner.ring.layout.slots + 2), learner.version)
