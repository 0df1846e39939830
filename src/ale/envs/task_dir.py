"""Tasks on disk: reads and writes the directory format of `ale.task`, which is Harbor's for single-step tasks.

A loaded task is trusted as far as its author is, its bytes are not: symbolic links, files that are no files and
files too large to travel are refused, and nothing outside the directory is read.

What Harbor knows and this format does not carry is refused only where ignoring it would change the task: a Dockerfile
that does more than copy files, a prebuilt image, several steps. Other keys of `task.toml` are tolerated.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import msgspec

from ale.envs.dockerfile import copies
from ale.errors import TaskFormatError
from ale.task import REWARD_FILE, WORKDIR, Split, Task, TaskFile

# A file has to travel to the sandbox in one frame.
MAX_FILE_BYTES = 16 * 1024 * 1024
_SCHEMA = "1.0"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PLAIN = "use letters, digits, '.', '_' and '-'"
_SIZES_MB = {"": 1 / 1024**2, "B": 1 / 1024**2, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}

_Seconds = Annotated[float, msgspec.Meta(gt=0)]


class _Own(msgspec.Struct, forbid_unknown_fields=True):
    """`[metadata.ale]`: what a generated task knows about itself. The rest of `[metadata]` is the author's."""

    family: str = "user"
    level: Annotated[int, msgspec.Meta(ge=1)] = 1
    seed: int = 0
    split: Split = "user"


class _Metadata(msgspec.Struct):
    ale: _Own = msgspec.field(default_factory=_Own)


class _Limit(msgspec.Struct):
    timeout_sec: _Seconds | None = None


class _Environment(msgspec.Struct):
    memory_mb: Annotated[int, msgspec.Meta(ge=1)] | None = None
    memory: str | None = None
    """Harbor's older spelling: "512M", "2G"."""
    cpus: Annotated[float, msgspec.Meta(gt=0)] | None = None
    docker_image: str | None = None
    workdir: str | None = None


class _TaskToml(msgspec.Struct):
    version: str | None = None
    schema_version: str | None = None
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)
    agent: _Limit = msgspec.field(default_factory=_Limit)
    verifier: _Limit = msgspec.field(default_factory=_Limit)
    environment: _Environment = msgspec.field(default_factory=_Environment)
    steps: list[Any] = []


def load_task(path: str | Path) -> Task:
    """The task in the directory `path`; its name is the task's id. Raises `TaskFormatError`, naming file and cure."""
    directory = Path(path)
    if not directory.is_dir():
        raise TaskFormatError(f"There is no task directory {directory}.")
    name = directory.resolve().name
    if not _NAME.fullmatch(name):
        raise TaskFormatError(f"{directory}: a task is named after its directory; {_PLAIN}.")
    settings = _read_toml(directory / "task.toml")
    if settings.steps:
        raise TaskFormatError(f"{directory / 'task.toml'}: steps: a task of several steps cannot be run; make it one.")
    instruction = _read_text(directory / "instruction.md", "It tells the agent what to do.").strip()
    if not instruction:
        raise TaskFormatError(f"{directory / 'instruction.md'} is empty. It tells the agent what to do.")
    tests = _read_tree(directory / "tests")
    if not any(file.path == "test.sh" for file in tests):
        raise TaskFormatError(
            f"The task {directory} has no tests/test.sh, so nothing can score it. "
            f"Add a script that writes a number to {REWARD_FILE}."
        )
    memory_mb = _memory_mb(settings.environment, directory / "task.toml")
    given = {
        "agent_timeout_s": settings.agent.timeout_sec,
        "verifier_timeout_s": settings.verifier.timeout_sec,
        "memory_mb": memory_mb,
    }
    return Task(
        id=name,
        instruction=instruction,
        files=_environment_files(directory / "environment", settings.environment),
        tests=tests,
        solution=_solution(directory / "solution"),
        family=settings.metadata.ale.family,
        level=settings.metadata.ale.level,
        seed=settings.metadata.ale.seed,
        split=settings.metadata.ale.split,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )


def task_dirs(path: str | Path) -> list[Path]:
    """The task directories at `path`: itself, or all directories in it whose names do not start with a dot, by name."""
    directory = Path(path)
    if not directory.is_dir():
        raise TaskFormatError(f"There is no directory of tasks {directory}.")
    if (directory / "task.toml").exists():
        return [directory]
    found = sorted(entry for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for entry in found:
        if entry.is_symlink():
            raise TaskFormatError(f"{entry} is a symbolic link; put the task itself there.")
    if not found:
        raise TaskFormatError(
            f"{directory} holds no task directories. Each is a directory with task.toml, instruction.md and "
            f"tests/test.sh; `ale tasks new --out {directory}` writes some."
        )
    return found


def load_tasks(path: str | Path) -> list[Task]:
    """Every task at `path` (see `task_dirs`). Raises `TaskFormatError` at the first that does not load."""
    return [load_task(directory) for directory in task_dirs(path)]


def write_task(task: Task, directory: str | Path) -> Path:
    """Writes `task` to `directory/<task.id>` and returns that path; loading it gives an equal task.

    Raises `TaskFormatError` when the task cannot stand on disk, or when there is something already.
    """
    _check(task)
    root = Path(directory) / task.id
    try:
        root.mkdir(parents=True)
    except FileExistsError:
        raise TaskFormatError(f"{root} exists already. Remove it, or write to another directory.") from None
    except OSError as error:
        raise TaskFormatError(f"{root} cannot be made: {error.strerror}. Write to another directory.") from error
    (root / "task.toml").write_text(_toml(task))
    (root / "instruction.md").write_text(task.instruction + "\n")
    _write_tree(root / "environment" / "files", task.files)
    dockerfile = f"FROM debian:12-slim\nWORKDIR {WORKDIR}\n" + (f"COPY files/ {WORKDIR}/\n" if task.files else "")
    (root / "environment" / "Dockerfile").write_text(dockerfile)
    _write_tree(root / "tests", task.tests)
    if task.solution:
        script = "\n".join(("#!/bin/bash", *task.solution, ""))
        _write_tree(root / "solution", (TaskFile("solve.sh", script.encode(), 0o755),))
    return root


# Reading


def _read_toml(path: Path) -> _TaskToml:
    text = _read_text(path, "It may be empty: every setting has a default.")
    try:
        return msgspec.convert(tomllib.loads(text), _TaskToml)
    except tomllib.TOMLDecodeError as error:
        raise TaskFormatError(f"{path} is not valid TOML: {error}.") from error
    except msgspec.ValidationError as error:
        said, _, field = str(error).partition(" - at `$.")
        name = f"field {field.rstrip('`')}: " if field else ""
        raise TaskFormatError(f"{path}: {name}{said}.") from error


def _memory_mb(environment: _Environment, where: Path) -> int | None:
    if environment.memory is None:
        return environment.memory_mb
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([BKMGT]?)(?:i?B)?", environment.memory.strip(), re.IGNORECASE)
    if size is None or (memory_mb := round(float(size[1]) * _SIZES_MB[size[2].upper()])) < 1:
        raise TaskFormatError(
            f'{where}: field environment.memory: {environment.memory!r} is no amount of memory; write "512M" or "2G".'
        )
    if environment.memory_mb not in (None, memory_mb):
        raise TaskFormatError(f"{where}: environment.memory and environment.memory_mb contradict each other; keep one.")
    return memory_mb


def _environment_files(directory: Path, settings: _Environment) -> tuple[TaskFile, ...]:
    """What the workspace starts with. A Dockerfile, where there is one, decides; else it is `files/`."""
    _refuse_link(directory)
    dockerfile = directory / "Dockerfile"
    elsewhere = settings.workdir not in (None, WORKDIR)
    if settings.docker_image is not None or elsewhere or any(directory.glob("docker-compose.y*ml")):
        raise TaskFormatError(
            f"{directory}: a prebuilt image, a compose file or a working directory other than {WORKDIR} needs the "
            "Docker backend; without them, what the agent starts with is in environment/files/."
        )
    if not os.path.lexists(dockerfile):
        return _read_tree(directory / "files")
    files: dict[str, TaskFile] = {}
    for copy in copies(_read_text(dockerfile, ""), where=dockerfile, workdir=WORKDIR):
        for name in (PurePosixPath(source) for source in copy.sources):
            source = directory.joinpath(*name.parts)
            if (link := _first_link(directory, name)) is not None:
                raise TaskFormatError(f"{link} is a symbolic link; put the file itself there.")
            if source.is_dir():
                found = [(PurePosixPath(copy.target) / file.path, file) for file in _read_tree(source)]
            elif source.exists():
                target = PurePosixPath(copy.target) / name.name if copy.into else PurePosixPath(copy.target)
                found = [(target, _read_file(source, name.name))]
            else:
                raise TaskFormatError(f"{dockerfile}: COPY {name}: there is no {source}.")
            files |= {str(target): msgspec.structs.replace(file, path=str(target)) for target, file in found}
    return tuple(files[path] for path in sorted(files))


def _first_link(directory: Path, name: PurePosixPath) -> Path | None:
    paths = (directory.joinpath(*name.parts[: i + 1]) for i in range(len(name.parts)))
    return next((path for path in paths if path.is_symlink()), None)


def _solution(directory: Path) -> tuple[str, ...]:
    """The commands of solve.sh, one a line; blank lines and comments (the shebang is one) are no commands."""
    if not os.path.lexists(directory / "solve.sh"):
        return ()
    _refuse_link(directory)
    lines = (line.strip() for line in _read_text(directory / "solve.sh", "").splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _read_text(path: Path, purpose: str) -> str:
    try:
        return _read_file(path, path.name).data.decode()
    except FileNotFoundError:
        raise TaskFormatError(f"There is no {path}. {purpose}".rstrip()) from None
    except UnicodeDecodeError as error:
        raise TaskFormatError(f"{path} is not UTF-8: {error}.") from error


def _read_tree(directory: Path) -> tuple[TaskFile, ...]:
    """Every regular file below `directory`, sorted by path; none where there is no directory."""
    _refuse_link(directory)
    files: list[TaskFile] = []
    if not directory.exists():
        return ()
    for folder, folders, names in os.walk(directory, onerror=_unreadable):
        for name in (*folders, *names):
            path = Path(folder, name)
            try:
                relative = path.relative_to(directory).as_posix()
                relative.encode()
            except UnicodeEncodeError:
                raise TaskFormatError(f"{os.fsencode(path)!r}: file names have to be UTF-8; rename it.") from None
            if path.is_symlink():
                raise TaskFormatError(f"{path} is a symbolic link; put the file itself there.")
            if not path.is_dir():
                files.append(_read_file(path, relative))
    return tuple(sorted(files, key=lambda file: file.path))


def _refuse_link(directory: Path) -> None:
    if directory.is_symlink():
        raise TaskFormatError(f"{directory} is a symbolic link; put the directory itself there.")


def _unreadable(error: OSError) -> None:
    raise TaskFormatError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _read_file(path: Path, name: str) -> TaskFile:
    """The regular file at `path`. Looked at through one descriptor, so that what was checked is what is read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = "a symbolic link; put the file itself there" if path.is_symlink() else f"unreadable: {error.strerror}"
        raise TaskFormatError(f"{path} is {reason}.") from error
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise TaskFormatError(f"{path} is no regular file; a task holds files and directories only.")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise TaskFormatError(
            f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; a file travels in one piece. Split it."
        )
    return TaskFile(name, data, stat.S_IMODE(status.st_mode))


# Writing


def _check(task: Task) -> None:
    for field, name in (("id", task.id), ("family", task.family)):
        if not _NAME.fullmatch(name):
            raise TaskFormatError(f"The task {field} {name!r} is no name; {_PLAIN}.")
    if task.actions != "bash":
        raise TaskFormatError(f"The task {task.id} is not one for a terminal: directories hold no others.")
    if task.instruction != task.instruction.strip() or not task.instruction:
        raise TaskFormatError(f"The instruction of {task.id} is empty or has blanks at an end; strip it.")
    for command in task.solution:
        if command != command.strip() or len(command.splitlines()) != 1 or command.startswith("#"):
            raise TaskFormatError(f"The solution of {task.id} holds {command!r}, which is not one command on one line.")
    for kind, files in (("environment", task.files), ("tests", task.tests)):
        for file in files:
            path = PurePosixPath(file.path)
            plain = str(path) == file.path and path.parts and not path.is_absolute() and ".." not in path.parts
            if not plain or "\0" in file.path:
                raise TaskFormatError(f"The {kind} of {task.id} hold {file.path!r}, no plain path below the directory.")
            if len(file.data) > MAX_FILE_BYTES:
                raise TaskFormatError(f"{task.id}: {file.path} is larger than {MAX_FILE_BYTES >> 20} MiB. Split it.")
        folders = {str(folder) for file in files for folder in PurePosixPath(file.path).parents}
        if len({file.path for file in files} - folders) != len(files):
            raise TaskFormatError(f"The {kind} of {task.id} hold one path twice, or as both a file and a directory.")
    if all(file.path != "test.sh" for file in task.tests):
        raise TaskFormatError(f"The task {task.id} has no test.sh among its tests, so nothing can score it.")


def _write_tree(root: Path, files: tuple[TaskFile, ...]) -> None:
    for file in files:
        path = root / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
        path.chmod(file.mode)


def _toml(task: Task) -> str:
    # A JSON string is a TOML basic string.
    return f"""\
version = {json.dumps(_SCHEMA)}

[metadata.ale]
family = {json.dumps(task.family)}
level = {task.level}
seed = {task.seed}
split = {json.dumps(task.split)}

[agent]
timeout_sec = {float(task.agent_timeout_s)}

[verifier]
timeout_sec = {float(task.verifier_timeout_s)}

[environment]
memory_mb = {task.memory_mb}
"""
