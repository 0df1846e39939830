"""The packages of a program that runs in a sandbox: a distribution of this environment with all that it requires."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def copy_packages(name: str, target: Path) -> Path:
    """Copies `name` and what it requires, without extras, to `target`: the whole environment would be gigabytes."""
    waiting, done = [name], set[str]()
    while waiting:
        one = re.split(r"[^A-Za-z0-9._-]", waiting.pop(), maxsplit=1)[0].lower()
        if one in done:
            continue
        done.add(one)
        try:
            found = distribution(one)
        except PackageNotFoundError:  # for another system or Python
            continue
        waiting += [need for need in found.requires or () if "extra ==" not in need]
        for file in found.files or ():
            if ".." not in file.parts:
                place = target / file
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(str(file.locate()), place)  # with its time: the compiled files count on it
    return target
