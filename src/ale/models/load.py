"""Loading a local Hugging Face causal LM, with errors that say what is missing. Nothing is fetched from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ale.errors import ModelError

transformers_logging.disable_progress_bar()


def check_model_path(path: str | Path) -> Path:
    """The directory at `path`; raises `ModelError` when it cannot hold a model."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ModelError(
            f"model.path: there is no directory {directory}. Give the path of a local Hugging Face model directory "
            '(config.json, *.safetensors, tokenizer.json), or "nano" for the built-in model.'
        )
    missing = [name for name in ("config.json",) if not (directory / name).is_file()]
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors (the weights)")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        missing.append("tokenizer.json")
    if missing:
        raise ModelError(f"model.path: {directory} holds no complete model; it has no {', no '.join(missing)}.")
    return directory


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    directory = check_model_path(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.path: the tokenizer in {directory} cannot be loaded: {error}") from error
    if tokenizer.chat_template is None:
        raise ModelError(f"model.path: the tokenizer in {directory} has no chat template, which an agent needs.")
    return tokenizer


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    directory = check_model_path(path)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"model.path: the model in {directory} cannot be loaded: {error}") from error
    return model


def hidden_states(model: PreTrainedModel, **inputs: Any) -> Any:
    """The model without its head: outputs with `last_hidden_state` [B, T, D] and, where asked, `router_logits`."""
    return model.base_model(**inputs)
