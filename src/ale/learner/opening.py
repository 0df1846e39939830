"""How a learner comes to be, from what its process is told: alone, or as one of several ranks.

Of several, rank 0 alone reads the weights. It puts them into the ring, from where every rank takes its rows, layer by
layer: no other rank ever holds a whole model.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ale.algorithm.objectives import Objective, objective
from ale.config import AlgorithmConfig, LearnerConfig
from ale.errors import ConfigError
from ale.learner.learner import Learner, LearnerSettings
from ale.learner.lora import add_adapters
from ale.learner.ranks import Ranks
from ale.learner.sharding import decoder_layers, fill
from ale.learner.state import load_state
from ale.learner.weights import Layout, WeightRing
from ale.messages import OpenLearner
from ale.models.load import load_model, load_tokenizer, model_without_weights, read_config


def open_alone(settings: OpenLearner) -> Learner:
    device = torch.device(settings.learner.device)
    model = load_model(settings.model)
    ring = WeightRing(settings.weights_fd, Layout.of(model, settings.slots))
    return _learner(settings, model.to(device), ring, Ranks(device=device))


def publish_weights(settings: OpenLearner) -> dict[str, Tensor]:
    """Rank 0, before there are others: the model goes into the ring as version 0. What is left of it is returned: the
    buffers, which no ring has. Whatever is wrong with the model is raised here."""
    model = load_model(settings.model)
    decoder_layers(model)
    load_tokenizer(settings.model)
    WeightRing(settings.weights_fd, Layout.of(model, settings.slots)).publish(0, model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _adapt(model, settings.learner)  # it is not used any more: what cannot have adapters is told here
    return buffers


def open_sharded(settings: OpenLearner, ranks: Ranks, buffers: dict[str, Tensor] | None) -> Learner:
    """All ranks, once the weights are in the ring; `buffers` on rank 0."""
    model = model_without_weights(read_config(settings.model))
    ring = WeightRing(settings.weights_fd, Layout.of(model, settings.slots))
    (shared, *_) = ranks.gather(buffers)
    assert shared is not None, "rank 0 has them"
    with warnings.catch_warnings():
        # The parameters lie in memory that is shared until they are sharded, which copies each rank's rows.
        warnings.simplefilter("ignore")
        fill(model, ring.views(0), shared)
    return _learner(settings, model, ring, ranks)


def check_device(device: str, ranks: int) -> None:
    """Raises `ConfigError` when there are not as many devices."""
    if device != "cuda":
        return
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < ranks:
        raise ConfigError(
            f'learner.device = "cuda" with learner.ranks = {ranks} needs {ranks} CUDA devices, torch sees {found}: '
            'lower learner.ranks, or train on the CPU with learner.device = "cpu".'
        )


def _learner(settings: OpenLearner, model: PreTrainedModel, ring: WeightRing, ranks: Ranks) -> Learner:
    c = settings.learner
    alpha = _adapt(model, c)
    learner = Learner(
        model,
        load_tokenizer(settings.model),
        ring,
        _objective(settings.algorithm),
        LearnerSettings(
            learning_rate=c.learning_rate,
            warmup_steps=c.warmup_steps,
            decay_steps=c.updates * c.epochs if c.schedule == "linear" else 0,
            beta1=c.beta1,
            beta2=c.beta2,
            weight_decay=c.weight_decay,
            max_grad_norm=c.max_grad_norm,
            micro_tokens=c.micro_tokens,
            router_loss=c.router_loss,
            temperature=settings.temperature,
            epochs=c.epochs,
            pi_old=settings.algorithm.pi_old,
            precision=settings.precision,
            activation_checkpointing=c.activation_checkpointing,
            lora_rank=c.lora_rank,
            lora_alpha=alpha,
            lora_targets=c.lora_targets,
        ),
        ranks,
    )
    if settings.state is not None:
        load_state(learner, Path(settings.state))
    return learner


def _adapt(model: PreTrainedModel, config: LearnerConfig) -> float:
    """Adds the adapters that are configured, if any, and returns their alpha. Raises `ConfigError`."""
    alpha = config.lora_alpha or 2.0 * config.lora_rank
    if config.lora_rank:
        add_adapters(model, config.lora_rank, alpha, config.lora_targets)
    return alpha


def _objective(algorithm: AlgorithmConfig) -> Objective:
    """The objective with those of its settings that the configuration names."""
    named = {
        name: value
        for name in ("gamma", "mask_high", "mask_low", "normalization")
        if (value := getattr(algorithm, name)) is not None
    }
    return objective(algorithm.objective, **named)
