import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ale.data.events import Event, GroupOpened, RolloutDropped, RolloutStarted
from ale.data.journal import Journal
from ale.errors import RunFolderError

EVENTS: list[Event] = [
    GroupOpened(group="g1", task="copy-7", drawn=1),
    RolloutStarted(rollout="g1/0"),
    RolloutDropped(rollout="g1/0", reason="sandbox_failure", tokens=31),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def written(path: Path) -> list[int]:
    """Writes the events; returns where each of them ends."""
    journal, ends = Journal(path), []
    for event in EVENTS:
        journal.write(event)
        ends.append(journal.size)
    journal.close()
    return ends


def read(path: Path, offset: int = 0) -> list[Event]:
    journal = Journal(path)
    try:
        return list(journal.read(offset))
    finally:
        journal.close()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a full disk is like: no file of this process can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_events_come_back_in_order_from_any_place(path: Path) -> None:
    ends = written(path)
    assert read(path) == EVENTS
    assert read(path, ends[0]) == EVENTS[1:]
    assert read(path, ends[2]) == []


def test_a_record_that_was_cut_off_anywhere_goes_and_the_others_stay(path: Path) -> None:
    ends = written(path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends)
        assert read(path) == EVENTS[:kept]
        assert path.stat().st_size == ([0, *ends][kept])


def test_what_follows_a_torn_record_stands_behind_whole_ones(path: Path) -> None:
    ends = written(path)
    path.write_bytes(path.read_bytes()[: ends[2] - 1])
    journal = Journal(path)
    journal.write(EVENTS[0])
    journal.close()
    assert read(path) == [*EVENTS[:2], EVENTS[0]]


@pytest.mark.parametrize("place", range(0, 60, 5))
def test_a_damaged_byte_in_the_middle_is_an_error_that_names_the_file(path: Path, place: int) -> None:
    written(path)
    data = bytearray(path.read_bytes())
    data[place] ^= 0x41
    path.write_bytes(data)
    with pytest.raises(RunFolderError, match=rf"{path} is damaged: .* at byte \d+.*--overwrite"):
        read(path)


def test_a_record_that_another_version_wrote_is_an_error(path: Path) -> None:
    import zlib

    body = b"\x92\xcb" + struct.pack(">d", 1.0) + b"\x81\xa4type\xa5Never"
    head = struct.pack("<II", len(body), zlib.crc32(body))
    path.write_bytes(head + struct.pack("<I", zlib.crc32(head)) + body)
    with pytest.raises(RunFolderError, match="another version of ale wrote it"):
        read(path)


def test_a_journal_shorter_than_a_checkpoint_says_is_an_error(path: Path) -> None:
    ends = written(path)
    with pytest.raises(RunFolderError, match=f"a checkpoint was taken at byte {ends[2] + 1}"):
        read(path, ends[2] + 1)


def test_time_goes_on_from_the_last_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    first = Journal(path)
    now = 130.0
    first.write(EVENTS[0])
    first.close()
    now = 1000.0  # the time between two lives does not count
    second = Journal(path)
    now = 1005.0
    assert second.elapsed_s == 35.0
    second.close()


def test_a_full_disk_leaves_whole_records_and_says_how_to_go_on(path: Path) -> None:
    ends = written(path)
    journal = Journal(path)
    with (
        largest_file(ends[2] + 10),
        pytest.raises(RunFolderError, match=rf"{path} cannot be written: .*File too large.*--resume"),
    ):
        journal.write(EVENTS[0])
    journal.write(EVENTS[1])  # there is room again
    journal.close()
    assert read(path) == [*EVENTS, EVENTS[1]]
