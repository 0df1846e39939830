"""Small models, made once. Torch is imported by the tests that ask for one, not by this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CORPUS = [
    "Copy oak.txt to fox.txt.",
    "cp oak.txt fox.txt",
    "sed -i s/^owl=.*/owl=bee/ elm.cfg",
    "grep -c ant ash.log",
] * 4


@pytest.fixture(scope="session")
def nano_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a nano model: 2 layers, 8 experts, top-2, width 64, tied head."""
    import torch

    from ale.models.nano import save_nano

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("nano")
    save_nano(path, CORPUS, seed=0, hidden_size=64, vocab_size=384)
    return path


@pytest.fixture
def nano(nano_path: Path) -> Any:
    """That model, loaded afresh: a test may change its weights."""
    from ale.models.load import load_model

    return load_model(nano_path)


@pytest.fixture
def nano_tokenizer(nano_path: Path) -> Any:
    from ale.models.load import load_tokenizer

    return load_tokenizer(nano_path)
