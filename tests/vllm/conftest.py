"""The model that the real servers run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ale.errors import ModelError


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("ALE_SMOLLM2"):
        return Path(given)
    from ale.models.smollm2 import save_smollm2

    path = tmp_path_factory.mktemp("models") / "smollm2"
    try:
        save_smollm2(path)
    except ModelError as error:
        pytest.skip(str(error))
    return path
