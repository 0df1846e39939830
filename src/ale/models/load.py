"""Loading a local Hugging Face causal LM, with errors that say what is missing. Nothing is fetched from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ale.errors import ModelError
from ale.models.path import check_model_path

transformers_logging.disable_progress_bar()


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
