"""Whether a directory can hold a model. Loads no torch, so that a wrong path is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from ale.errors import ModelError


def check_model_path(path: str | Path, *, field: str = "model.path") -> Path:
    """The directory at `path`; raises `ModelError`, which names `field`, when it cannot hold a model."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ModelError(
            f"{field}: there is no directory {directory}. Give the path of a local Hugging Face model directory "
            '(config.json, *.safetensors, tokenizer.json), or "nano" for the built-in model.'
        )
    missing = [name for name in ("config.json",) if not (directory / name).is_file()]
    if not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors (the weights)")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        missing.append("tokenizer.json")
    if missing:
        raise ModelError(f"{field}: {directory} holds no complete model; it has no {', no '.join(missing)}.")
    return directory
