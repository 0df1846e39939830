"""A configuration as text: read from TOML, from the folder of a run or from plain data, and written as JSON.

run = load("examples/nano.toml", ["seed=1", "rollout.max_lag=0"])

An unknown field is an error that names the field and the nearest one.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ale.config import RunConfig, Section
from ale.errors import ConfigError


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a TOML file, or what the folder of a run says about itself; each override is `section.field=value`, the
    value as in TOML (or a bare word).

    Raises `ConfigError`, which names the file and the field.
    """
    file = Path(path)
    if folder := file if (file / "config.json").is_file() else None:
        file = folder / "config.json"
    try:
        tree = tomllib.loads(file.read_text()) if folder is None else json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file {file}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {file} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is damaged: {error}. Put it back as it was.") from error
    if folder is not None:  # wherever it was moved to
        tree |= {"name": folder.resolve().name, "runs_dir": str(folder.resolve().parent)}
    for override in overrides:
        _override(tree, override)
    tree.setdefault("name", file.stem)
    return parse(tree, where=str(file))


def parse(tree: dict[str, Any], *, where: str = "configuration") -> RunConfig:
    """A `RunConfig` from plain data; `where` is named in errors."""
    _refuse_unknown(tree, RunConfig, where, "")
    try:
        return msgspec.convert(tree, RunConfig)
    except msgspec.ValidationError as error:
        text = str(error)
        if " - at `$." in text:
            said, _, field = text.partition(" - at `$.")
            raise ConfigError(f"{where}: field {field.rstrip('`')}: {said}.") from error
        raise ConfigError(f"{where}: {text}.") from error


def dump(config: RunConfig) -> bytes:
    """JSON of every field, defaults included: what `runs/NAME/config.json` holds."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2)


def changed_fields(old: RunConfig, new: RunConfig) -> dict[str, str]:
    """What differs, by the name of the field: `{"learner.updates": "was 140, is 200"}`."""
    before, after = _flat(msgspec.to_builtins(old)), _flat(msgspec.to_builtins(new))
    return {
        name: f"was {json.dumps(before.get(name))}, is {json.dumps(after.get(name))}"
        for name in before | after
        if before.get(name) != after.get(name)
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _refuse_unknown(tree: dict[str, Any], struct: type[msgspec.Struct], where: str, prefix: str) -> None:
    fields = {f.name: f.type for f in msgspec.structs.fields(struct)}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are: {', '.join(fields)}"
            raise ConfigError(f"{where}: there is no field {prefix}{key}; {hint}")
        kind = fields[key]
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Section):
            _refuse_unknown(value, kind, where, f"{prefix}{key}.")


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"The override {text!r} is not of the form section.field=value.")
    try:
        value: Any = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    *sections, field = key.strip().split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"The override {text!r} goes into {section!r}, which is a value, not a section.")
    node[field] = value
