"""SmolLM2-135M-Instruct for benchmarks: made once, in `models/smollm2`, from the package that carries it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ale.errors import ModelError
from ale.models.smollm2 import save_smollm2
from bench.harness import ROOT

THREADS = min(2, os.cpu_count() or 1)


def smollm2() -> Path:
    """The directory (`ALE_SMOLLM2`, or made where missing); exits with 2 and what to install where it cannot be."""
    path = Path(os.environ.get("ALE_SMOLLM2", ROOT / "models" / "smollm2"))
    if not path.is_dir():
        try:
            save_smollm2(path)
        except ModelError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from error
    return path
