"""Low-rank adapters by peft (LoRA): what is trained is two thin matrices beside each chosen projection.

The weights of the model stay as they were. Engines know nothing of adapters: what is published is `W + scale * B A`
under the name that the weight has in the plain model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ale.errors import ConfigError

_NAME = "default"
_BASE = ".base_layer."


class Adapter(NamedTuple):
    a: Tensor
    b: Tensor
    scale: float


def add_adapters(model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Puts adapters beside the linear layers whose name ends in one of `targets`, and freezes the rest. B is zero, so
    the policy is what it was. Raises `ConfigError` where peft is missing or nothing has such a name."""
    peft = _peft()
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in modules)]
    if missing or not targets:
        offered = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
        raise ConfigError(
            f"learner.lora_targets: {type(model).__name__} has no linear layer {', '.join(missing) or '(none named)'}; "
            f"there are: {offered}. The experts of a mixture are no linear layers and cannot have adapters."
        )
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # A is random: the same in every life of a run, and on every rank
        peft.inject_adapter_in_model(settings, model, adapter_name=_NAME)


def _peft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what peft could work with and does not find
            import peft
    except ImportError as error:
        raise ConfigError(f"learner.lora_rank needs peft ({error}): pip install 'ale[lora]'.") from error
    return peft


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters by the plain name of the weight they belong to; empty for a model without any."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            a, b = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
            found[f"{name}.weight"] = Adapter(a, b, module.scaling[_NAME])
    return found


def plain_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters under the names they have without adapters, whose own are left out."""
    return {
        name.replace(_BASE, "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." not in name and ".lora_B." not in name
    }


def save_adapters(
    path: Path, base: str, weights: dict[str, Tensor], rank: int, alpha: float, targets: Sequence[str]
) -> None:
    """A directory that `peft.PeftModel.from_pretrained(model, path)` loads. `weights` by their names in the model."""
    from safetensors.torch import save_file

    peft = _peft()
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    path.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(path)
    named = {f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": t.contiguous() for name, t in weights.items()}
    save_file(named, path / "adapter_model.safetensors", metadata={"format": "pt"})
