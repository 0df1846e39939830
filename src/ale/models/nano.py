"""The embedded default model: a tiny Qwen3-MoE, randomly initialised, with a small tokenizer trained on task text.

Both are ordinary Hugging Face directories: `save_nano(path, ...)` writes config.json, model.safetensors, tokenizer.json
and a chat template, and from then on nothing treats the model differently from any other local causal LM.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END, PAD, SYSTEM, USER, ASSISTANT, TOOL = "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
CALL_OPEN, CALL_CLOSE = "```bash\n", "\n```"

CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `corpus`. Digits stand alone; a word never merges with the space before it, so that a name
    is the same token wherever it stands: in a sentence, a path or a command."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|[^\W\d]+|[^\w\s]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, SYSTEM, USER, ASSISTANT, TOOL]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([CALL_OPEN, CALL_CLOSE])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def nano_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, layers: int = 2) -> Qwen3MoeConfig:
    return nano_settings(
        -(-len(tokenizer) // 64) * 64,
        hidden_size,
        layers,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def nano_settings(
    vocab_size: int,
    hidden_size: int = 128,
    layers: int = 2,
    *,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> Qwen3MoeConfig:
    """The shape of a nano model; it needs no tokenizer."""
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        head_dim=32,
        intermediate_size=hidden_size * 2,
        moe_intermediate_size=hidden_size,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        # 1/sqrt(128): the default of 0.02 is meant for models ten times as wide and leaves this one silent for long.
        initializer_range=hidden_size**-0.5,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        bos_token_id=None,
    )


def save_nano(path: Path, corpus: Iterable[str], *, seed: int, hidden_size: int = 128, vocab_size: int = 768) -> None:
    """Writes the model and its tokenizer to `path`; the same seed and corpus give the same bytes."""
    tokenizer = train_tokenizer(corpus, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(nano_config(tokenizer, hidden_size))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
