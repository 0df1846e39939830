import subprocess
from pathlib import Path

import msgspec
import pytest

from ale.data.books import Books
from ale.data.checkpoints import Checkpoints, freeze
from ale.data.events import FileSizes, GroupOpened, RolloutKept, RolloutStarted
from ale.errors import RunFolderError
from ale.messages import Trajectory
from ale.wire import Array


def some_books() -> Books:
    """Books with something in every kind of place."""
    trajectory = Trajectory(
        id="g1/0",
        group="g1",
        task="copy-7",
        family="copy",
        level=1,
        tokens_T=Array.of([1, 2, 3], "int32"),
        chunks=(),
        logp_A=Array.of([-0.5], "float32"),
        logp_sampled_A=Array.of([-0.5], "float32"),
        version_A=Array.of([3], "int32"),
        reward=1.0,
    )
    books = Books(drawn=4, warm=True, demonstrations=(), pool=[0.0, 1.0], exchanges=66, sizes=FileSizes(metrics=7))
    books.apply(GroupOpened(group="g1", task="copy-7", drawn=5))
    books.apply(RolloutStarted(rollout="g1/0"))
    books.apply(RolloutStarted(rollout="g1/1"))
    books.apply(RolloutKept(trajectory=trajectory, solved=True))
    return books


def commit(checkpoints: Checkpoints, journal: int = 11, weights: bytes = b"weights") -> Path:
    checkpoints.begin().write_bytes(weights)
    return checkpoints.commit(freeze(some_books(), journal))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "state")


def test_there_is_none_before_the_first(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None
    checkpoints.begin().write_bytes(b"half")
    assert checkpoints.latest() is None


def test_the_latest_comes_back_as_it_was_and_two_are_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for number in range(1, 5):
        commit(checkpoints, journal=number)
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest.path.name, latest.journal, latest.learner.read_bytes()) == ("4", 4, b"weights")
    assert latest.books == some_books()
    assert msgspec.msgpack.encode(latest.books) == msgspec.msgpack.encode(some_books())
    assert sorted(entry.name for entry in (tmp_path / "state").iterdir()) == ["3", "4"]


def test_what_was_left_half_done_is_no_checkpoint_and_is_not_in_the_way(checkpoints: Checkpoints) -> None:
    commit(checkpoints)
    checkpoints.begin().write_bytes(b"half")
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.path.name == "1"
    assert commit(checkpoints).name == "2"


@pytest.mark.parametrize("name", ["learner.safetensors", "books.msgpack"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_with_a_cure_that_loses_nothing(
    checkpoints: Checkpoints, tmp_path: Path, name: str, damage: str
) -> None:
    commit(checkpoints)
    file = commit(checkpoints) / name
    data = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        case "cut":
            file.write_bytes(data[:-1])
        case "remove":
            file.unlink()
    with pytest.raises(RunFolderError) as raised:
        checkpoints.latest()
    said = str(raised.value)
    assert name in said
    assert f"Delete {tmp_path / 'state' / '2'} and resume again" in said
    subprocess.run(["rm", "-r", str(tmp_path / "state" / "2")], check=True)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.path.name == "1"


def test_damage_of_the_only_one_says_that_there_is_no_other(checkpoints: Checkpoints) -> None:
    (commit(checkpoints) / "SHA256SUMS").write_text("")
    with pytest.raises(RunFolderError, match=r"There is no older one.*--overwrite"):
        checkpoints.latest()


def test_the_sums_are_those_that_sha256sum_checks(checkpoints: Checkpoints) -> None:
    path = commit(checkpoints)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["books.msgpack: OK", "learner.safetensors: OK"]
