"""Loading a local Hugging Face causal LM, with errors that say what is missing. Nothing is fetched from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ale.errors import ModelError
from ale.kernels import register_experts
from ale.models.path import check_model_path

transformers_logging.disable_progress_bar()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    directory = check_model_path(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # what a damaged file raises depends on the library that reads it
        raise ModelError(f"model.path: the tokenizer in {directory} cannot be loaded: {error}") from error
    if tokenizer.chat_template is None:
        raise ModelError(
            f"model.path: the tokenizer in {directory} has no chat template, which an agent needs: use an instruction-"
            "tuned model, or add a chat_template.jinja."
        )
    rows = _config(directory).get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ModelError(
            f"model.path: the tokenizer in {directory} has {len(tokenizer)} tokens, but the model has embeddings for "
            f"{rows}: they do not belong together."
        )
    return tokenizer


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    directory = check_model_path(path)
    config = _config(directory)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"model.path: {directory} holds a model of the type {config.model_type}, which is not a causal language "
            "model that transformers knows; engine and learner run decoders only."
        )
    try:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except Exception as error:  # what a damaged file raises depends on the library that reads it
        raise ModelError(f"model.path: the model in {directory} cannot be loaded: {error}") from error
    model, info = loaded
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"model.path: the weights in {directory} lack {len(missing)} tensors, {missing[0]} among them."
        )
    _check_head(model, directory)
    _use_own_experts(model)
    return model


def read_config(path: str | Path) -> PreTrainedConfig:
    """What kind of model a directory holds. It needs no weights."""
    return _config(Path(path).expanduser())


def model_without_weights(config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of that kind whose parameters and buffers have shapes and no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    _use_own_experts(model)
    return model.eval()


def _use_own_experts(model: PreTrainedModel) -> None:
    if getattr(model.config, "num_experts", None):
        register_experts()
        model.set_experts_implementation("ale")


def _config(directory: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # what a damaged file raises depends on what is wrong with it
        # The first line: for an unknown type transformers goes on with advice on how to upgrade it.
        said = str(error).partition("\n")[0]
        raise ModelError(f"model.path: {directory / 'config.json'} cannot be used: {said}") from error


@torch.inference_mode()
def _check_head(model: PreTrainedModel, directory: Path) -> None:
    """Engine and learner apply the head to the positions they need: a model must do no more after its body."""
    ids = torch.arange(2)[None]
    apart = model.get_output_embeddings()(hidden_states(model, input_ids=ids).last_hidden_state) - model(ids).logits
    if not bool(apart.abs().max() < 1e-3):
        raise ModelError(
            f"model.path: {type(model).__name__} in {directory} scales or caps its logits after the head (or gives "
            "NaN), which is not supported."
        )


def hidden_states(model: PreTrainedModel, **inputs: Any) -> Any:
    """The model without its head: outputs with `last_hidden_state` [B, T, D] and, where asked, `router_logits`."""
    return model.base_model(**inputs)
