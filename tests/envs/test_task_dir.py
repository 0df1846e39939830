import os
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ale.envs.families import TRAINED, UNSEEN, make
from ale.envs.task_dir import MAX_FILE_BYTES, load_task, load_tasks, write_task
from ale.errors import TaskFormatError
from ale.task import Task, TaskFile

TEST = (TaskFile("test.sh", b"echo 1 > /logs/verifier/reward.txt\n", 0o755),)


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    """A small task as a Harbor user would write it."""
    root = tmp_path / "greet"
    for folder in ("environment/files/data", "tests", "solution"):
        (root / folder).mkdir(parents=True)
    (root / "task.toml").write_text(
        'version = "1.0"\n[metadata]\ndifficulty = "easy"\ntags = ["shell"]\n[agent]\ntimeout_sec = 60\n'
        '[verifier]\ntimeout_sec = 7.5\n[environment]\nbuild_timeout_sec = 600.0\ncpus = 1\nmemory = "2G"\n'
    )
    (root / "instruction.md").write_text("Write hello to out.txt.\n")
    (root / "environment/files/data/a.txt").write_text("a\n")
    (root / "tests/test.sh").write_bytes(TEST[0].data)
    (root / "solution/solve.sh").write_text("#!/bin/bash\n# greet\n\necho hello > out.txt\ncat out.txt\n")
    return root


def refused(path: Path) -> str:
    """The message `path` is refused with: one paragraph that names something below it."""
    with pytest.raises(TaskFormatError) as caught:
        load_task(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_task_that_a_harbor_user_wrote_loads(task_dir: Path) -> None:
    task = load_task(task_dir)
    assert task == Task(
        id="greet",
        instruction="Write hello to out.txt.",
        files=(TaskFile("data/a.txt", b"a\n", 0o644),),
        tests=(TaskFile("test.sh", TEST[0].data, 0o644),),
        solution=("echo hello > out.txt", "cat out.txt"),
        agent_timeout_s=60.0,
        verifier_timeout_s=7.5,
        memory_mb=2048,
    )


@given(family=st.sampled_from(sorted(TRAINED | UNSEEN)), seed=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_generated_task_comes_back_equal_from_disk(
    tmp_path_factory: pytest.TempPathFactory, family: str, seed: int
) -> None:
    task = make(family, seed, "heldout")
    loaded = load_task(write_task(task, tmp_path_factory.mktemp("tasks")))
    assert loaded.content_hash == task.content_hash
    assert loaded == task


def test_bytes_and_modes_survive_the_disk(tmp_path: Path) -> None:
    files = (TaskFile("bin/run", b"\x00\xff\r\n", 0o750), TaskFile("wört.txt", b"", 0o600))
    task = Task(id="t-1", instruction="a\r\nb", files=files, tests=TEST)
    assert load_task(write_task(task, tmp_path)) == task


def test_tasks_load_in_the_order_of_their_names_and_hidden_directories_are_none(tmp_path: Path) -> None:
    for seed in (2, 10, 1):
        write_task(make("copy", seed), tmp_path)
    (tmp_path / ".git").mkdir()
    assert [task.id for task in load_tasks(tmp_path)] == ["copy-1", "copy-10", "copy-2"]
    assert [task.id for task in load_tasks(tmp_path / "copy-10")] == ["copy-10"]


def test_a_linked_task_among_others_is_refused(tmp_path: Path, task_dir: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all/linked").symlink_to(task_dir)
    with pytest.raises(TaskFormatError, match="linked is a symbolic link"):
        load_tasks(tmp_path / "all")


def test_a_task_is_named_by_its_directory_so_that_has_to_be_a_name(task_dir: Path) -> None:
    renamed = task_dir.rename(task_dir.with_name("my task"))
    assert "use letters" in refused(renamed)


def test_tasks_are_not_written_where_no_directory_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TaskFormatError, match="cannot be made"):
        write_task(make("copy", 1), tmp_path / "file")


def test_a_directory_without_tasks_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(TaskFormatError, match=re.escape(f"ale tasks new --out {tmp_path}")):
        load_tasks(tmp_path)


def test_a_task_without_tests_names_the_path_and_the_cure(task_dir: Path) -> None:
    (task_dir / "tests/test.sh").rename(task_dir / "tests/check.sh")
    message = refused(task_dir)
    assert "no tests/test.sh" in message
    assert "/logs/verifier/reward.txt" in message


@pytest.mark.parametrize("missing", ["task.toml", "instruction.md"])
def test_a_missing_file_is_named(task_dir: Path, missing: str) -> None:
    (task_dir / missing).unlink()
    assert f"There is no {task_dir / missing}" in refused(task_dir)


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ('agent = "fast"', "field agent:"),
        ('[agent]\ntimeout_sec = "60"', "field agent.timeout_sec:"),
        ("[verifier]\ntimeout_sec = 0", "field verifier.timeout_sec:"),
        ("[environment]\nmemory_mb = 1.5", "field environment.memory_mb:"),
        ('[environment]\nmemory = "plenty"', "field environment.memory:"),
        ('[environment]\nmemory = "1G"\nmemory_mb = 512', "contradict"),
        ("[environment]\ncpus = 0", "field environment.cpus:"),
        ('[metadata.ale]\nlevel = "hard"', "field metadata.ale.level:"),
        ('[metadata.ale]\nsplit = "test"', "field metadata.ale.split:"),
        ("[metadata.ale]\nsede = 1", "sede"),
        ("[[steps]]\nname = 'one'", "steps"),
        ('[environment]\ndocker_image = "python:3.13"', "needs the Docker backend"),
        ('[environment]\nworkdir = "/workspace"', "needs the Docker backend"),
        ("[agent", "not valid TOML"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(task_dir: Path, toml: str, named: str) -> None:
    (task_dir / "task.toml").write_text(toml + "\n")
    assert named in refused(task_dir)


@pytest.mark.parametrize(
    ("spelling", "memory_mb"), [("2G", 2048), ("512M", 512), ("1.5GB", 1536), ("2048K", 2), ("1 GiB", 1024)]
)
def test_memory_is_read_in_the_older_spelling(task_dir: Path, spelling: str, memory_mb: int) -> None:
    (task_dir / "task.toml").write_text(f'[environment]\nmemory = "{spelling}"\n')
    assert load_task(task_dir).memory_mb == memory_mb


@pytest.mark.parametrize(
    "where", ["environment/files/x", "environment/files/data/x", "tests/x", "instruction.md", "tests/test.sh"]
)
def test_a_symbolic_link_is_refused(task_dir: Path, tmp_path: Path, where: str) -> None:
    outside = tmp_path / "secret"
    outside.write_text("secret")
    (task_dir / where).unlink(missing_ok=True)
    (task_dir / where).symlink_to(outside)
    assert f"{task_dir / where} is a symbolic link" in refused(task_dir)


@pytest.mark.parametrize("where", ["environment/files", "environment/files/data", "tests", "environment", "solution"])
def test_a_linked_directory_is_refused(task_dir: Path, tmp_path: Path, where: str) -> None:
    (task_dir / where).rename(tmp_path / "moved")
    (task_dir / where).symlink_to(tmp_path / "moved")
    assert "is a symbolic link" in refused(task_dir)


def test_a_pipe_is_refused_without_waiting_for_its_writer(task_dir: Path) -> None:
    os.mkfifo(task_dir / "environment/files/pipe")
    assert "no regular file" in refused(task_dir)


def test_a_file_too_large_to_travel_is_refused(task_dir: Path) -> None:
    with (task_dir / "environment/files/big").open("wb") as big:
        big.truncate(MAX_FILE_BYTES)
        load_task(task_dir)
        big.truncate(MAX_FILE_BYTES + 1)
    assert "environment/files/big is larger than 16 MiB" in refused(task_dir)


def dockerfile(task_dir: Path, *lines: str) -> None:
    (task_dir / "environment/Dockerfile").write_text("\n".join(lines) + "\n")


def test_a_dockerfile_that_copies_says_what_the_agent_starts_with(task_dir: Path) -> None:
    (task_dir / "environment/b.txt").write_text("b\n")
    dockerfile(
        task_dir,
        "# syntax=docker/dockerfile:1",
        "FROM debian:12-slim",
        "WORKDIR /app",
        "COPY files/ \\",
        "     ./",
        "copy b.txt in/",
        "COPY b.txt /app/c.txt",
        "COPY b.txt files/data /app/both/",
        "COPY b.txt .",
    )
    paths = [file.path for file in load_task(task_dir).files]
    assert paths == ["b.txt", "both/a.txt", "both/b.txt", "c.txt", "data/a.txt", "in/b.txt"]


@pytest.mark.parametrize(
    "line",
    [
        "RUN apt-get install -y jq",
        "ENV A=1",
        "WORKDIR /workspace",
        "COPY --chown=1 files/ .",
        "COPY *.txt .",
        'COPY ["a b", "c"]',
        "COPY files/ /etc/",
        "COPY files/ ../etc/",
        "COPY files",
        "ADD files/ .",
        "FROM scratch",
        "CMD bash",
    ],
)
def test_a_dockerfile_that_does_more_is_refused_and_points_to_docker(task_dir: Path, line: str) -> None:
    dockerfile(task_dir, "FROM debian:12-slim", line)
    message = refused(task_dir)
    assert "needs the Docker backend" in message
    assert line in message


def test_a_dockerfile_cannot_copy_from_outside(task_dir: Path) -> None:
    dockerfile(task_dir, "FROM debian:12-slim", "COPY files/../../tests .")
    assert "outside the environment directory" in refused(task_dir)


def test_a_dockerfile_cannot_copy_through_a_link(task_dir: Path) -> None:
    (task_dir / "environment/way").symlink_to("/etc")
    dockerfile(task_dir, "FROM debian:12-slim", "COPY way/hostname .")
    assert "is a symbolic link" in refused(task_dir)


def test_a_dockerfile_that_copies_what_is_not_there_is_refused(task_dir: Path) -> None:
    dockerfile(task_dir, "FROM debian:12-slim", "COPY nothing .")
    assert "COPY nothing: there is no" in refused(task_dir)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "../up"}, "id '../up'"),
        ({"family": "a b"}, "family 'a b'"),
        ({"instruction": " "}, "instruction"),
        ({"files": (TaskFile("../x", b""),)}, "no plain path"),
        ({"files": (TaskFile("/etc/x", b""),)}, "no plain path"),
        ({"files": (TaskFile("./x", b""),)}, "no plain path"),
        ({"files": (TaskFile("x", b""), TaskFile("x/y", b""))}, "both a file and a directory"),
        ({"tests": (TaskFile("run.sh", b""),)}, "no test.sh"),
        ({"solution": ("a\nb",)}, "not one command on one line"),
        ({"solution": ("# a",)}, "not one command on one line"),
    ],
)
def test_a_task_that_cannot_stand_on_disk_is_not_written(tmp_path: Path, change: dict[str, object], said: str) -> None:
    task = msgspec.structs.replace(Task(id="t", instruction="Go.", files=(), tests=TEST), **change)
    with pytest.raises(TaskFormatError, match=re.escape(said)):
        write_task(task, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_task_is_never_written_over_another(tmp_path: Path) -> None:
    write_task(make("copy", 1), tmp_path)
    with pytest.raises(TaskFormatError, match="exists already"):
        write_task(make("copy", 1), tmp_path)
