import hashlib
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from ale.envs.families import TRAINED, UNSEEN, WORDS, make, make_splits
from ale.errors import ConfigError
from ale.task import REWARD_FILE, Task

FAMILIES = [*TRAINED, *UNSEEN]
SEEDS = range(20)


def lay_out(task: Task, root: Path) -> Path:
    """The task's files under `root`/app, its tests under `root`/tests with the reward written to `root`/reward."""
    for folder, files in (("app", task.files), ("tests", task.tests)):
        (root / folder).mkdir(parents=True)
        for file in files:
            path = root / folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data.replace(REWARD_FILE.encode(), str(root / "reward").encode()))
            path.chmod(file.mode)
    return root / "app"


def grade(root: Path) -> str:
    tests = ["bash", str(root / "tests/test.sh")]
    subprocess.run(tests, cwd=root / "app", check=True, capture_output=True, timeout=20)
    return (root / "reward").read_text().strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_solution_earns_the_reward_and_an_untouched_workspace_does_not(family: str, tmp_path: Path) -> None:
    for seed in SEEDS:
        task = make(family, seed)
        app = lay_out(task, tmp_path / str(seed))
        assert grade(app.parent) == "0", task
        for step in task.solution:
            subprocess.run(["bash", "-c", step], cwd=app, check=False, capture_output=True, timeout=20)
        assert grade(app.parent) == "1", task


@pytest.mark.parametrize("family", FAMILIES)
def test_a_solution_short_of_its_last_step_earns_nothing(family: str, tmp_path: Path) -> None:
    for seed in range(5):
        task = make(family, seed)
        app = lay_out(task, tmp_path / str(seed))
        for step in task.solution[:-1]:
            subprocess.run(["bash", "-c", step], cwd=app, check=False, capture_output=True, timeout=20)
        assert grade(app.parent) == "0", task


def test_no_word_is_part_of_another() -> None:
    """`grep` finds parts of words: a task that counts bees must not count beets."""
    assert len(set(WORDS)) == len(WORDS)
    assert [(a, b) for a in WORDS for b in WORDS if a != b and a in b] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_instruction_names_no_answer_and_every_file_stays_in_the_workspace(family: str) -> None:
    for seed in SEEDS:
        task = make(family, seed)
        assert task.level == len(task.solution)
        assert (task.family, task.seed, task.id) == (family, seed, f"{family}-{seed}")
        assert task.instruction.endswith(".")
        assert "\n" not in task.instruction
        paths = [Path(file.path) for file in task.files]
        assert len(set(paths)) == len(paths) > 0
        assert not any(path.is_absolute() or ".." in path.parts for path in paths)


def test_levels_one_to_six_occur_and_no_other() -> None:
    levels = {make(family, seed).level for family in TRAINED for seed in range(100)}
    assert levels == {1, 2, 3, 4, 5, 6}


def test_a_task_is_the_same_in_another_process_with_other_hashes() -> None:
    code = (
        "import hashlib; from ale.envs.families import *; "
        "hashes = ''.join(make(f, s).content_hash for f in [*TRAINED, *UNSEEN] for s in range(20)); "
        "print(hashlib.sha256(hashes.encode()).hexdigest()); print(next(make_splits(20, 6, 1).train(3)).id)"
    )
    mine = hashlib.sha256("".join(make(f, s).content_hash for f in FAMILIES for s in SEEDS).encode()).hexdigest()
    first = next(make_splits(20, 6, 1).train(3)).id
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        said = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout
        assert said.split() == [mine, first]


def test_no_content_stands_in_two_splits_or_twice_in_one() -> None:
    splits = make_splits(200, 60, seed=0)
    assert (len(splits.heldout), len(splits.families)) == (200, 60)
    assert {t.family for t in splits.heldout} == set(TRAINED)
    assert {t.family for t in splits.families} == set(UNSEEN)
    assert {t.split for t in splits.heldout} == {"heldout"}
    assert {t.split for t in splits.families} == {"families"}
    stream = splits.train(0)
    train = [next(stream) for _ in range(2000)]
    assert {t.family for t in train} == set(TRAINED)
    hashes = [t.content_hash for t in (*splits.heldout, *splits.families, *train)]
    assert len(set(hashes)) == len(hashes)


def test_only_the_named_families_are_drawn_and_a_small_one_comes_to_an_end() -> None:
    splits = make_splits(20, 0, seed=0, only=["note"])
    assert {t.family for t in splits.heldout} == {"note"}
    train = list(islice(splits.train(0), 2000))
    assert len(train) == 12 * 11 * 10 - 20
    assert not {t.content_hash for t in train} & {t.content_hash for t in splits.heldout}
    both = make_splits(4, 2, seed=0, only=["copy", "note"])
    assert [t.family for t in both.heldout] == ["copy", "note"] * 2
    assert {t.family for t in both.families} <= set(UNSEEN)


@pytest.mark.parametrize(
    ("heldout", "families", "only", "said"),
    [
        (4, 0, ["note", "copi"], "tasks.only: there is no family 'copi'"),
        (2000, 0, ["note"], "note give no more than 1320 tasks"),
        (4, 4, ["sort"], "tasks.only names 'sort', which tasks.families keeps unseen"),
    ],
)
def test_families_that_cannot_be_drawn_are_refused(heldout: int, families: int, only: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_splits(heldout, families, 0, only)


def test_what_is_held_out_would_otherwise_be_drawn() -> None:
    """The check by hash does work: a stream that meets a held-out task skips it."""
    splits = make_splits(20, 3, seed=0)
    stream = splits.train(0)
    met = next(stream)
    reserved = type(splits)(splits.heldout, splits.families, splits.reserved | {met.content_hash})
    assert next(reserved.train(0)).content_hash != met.content_hash


def test_the_content_hash_sees_instruction_files_modes_and_tests_but_no_name() -> None:
    import msgspec

    task = make("copy", 1)
    replace = msgspec.structs.replace
    file = task.files[0]
    same = replace(task, id="x", seed=99, split="heldout", solution=())
    assert same.content_hash == task.content_hash
    others = [
        replace(task, instruction=task.instruction + " "),
        replace(task, files=(replace(file, data=file.data + b"\n"), *task.files[1:])),
        replace(task, files=(replace(file, mode=0o600), *task.files[1:])),
        replace(task, files=(replace(file, path=file.path + "x"), *task.files[1:])),
        replace(task, tests=()),
    ]
    assert len({t.content_hash for t in (task, *others)}) == 6
