"""Files and trees in and out of sandboxes: what arrives, what is refused, and how little memory it takes."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ale.errors import SandboxError
from ale.sandbox import Command, Limits, SandboxEngine, SandboxSpec
from ale.sandbox.rocklet.trees import Entry, TreeReader, TreeWriter, end_of_tree, pack_tree

MB = 1024 * 1024


def make_tree(root: Path) -> None:
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "sub" / "script.sh").write_text("#!/bin/sh\necho ran\n")
    (root / "sub" / "script.sh").chmod(0o755)
    (root / "data").write_bytes(bytes(range(256)) * 300)
    (root / "nothing").touch()
    (root / "link").symlink_to("sub/script.sh")
    (root / "dangling").symlink_to("/no/such/place")
    (root / "näme with spaces\n").write_text("x")
    os.utime(root / "data", ns=(1, 1_600_000_000_123_456_789))


def described(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = path.stat().st_mode
        else:
            found[name] = (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
    return found


async def test_a_tree_comes_back_as_it_went_in(engine: SandboxEngine, tmp_path: Path) -> None:
    make_tree(tmp_path / "out")
    async with engine.start(SandboxSpec()) as sandbox:
        await sandbox.upload(tmp_path / "out", "a/b")
        ran = await sandbox.exec(Command(shell="a/b/link"))
        assert await sandbox.download("a/b", tmp_path / "back", max_bytes=MB) == 0
        await sandbox.download("a/b/data", tmp_path / "one", max_bytes=MB)
    assert ran.stdout == b"ran\n"
    assert described(tmp_path / "back") == described(tmp_path / "out")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "out" / "data").read_bytes()


async def test_an_upload_writes_over_what_is_there(engine: SandboxEngine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("new")
    async with engine.start(SandboxSpec()) as sandbox:
        await sandbox.exec(Command(shell="mkdir t; echo old > t/file; echo kept > t/other; chmod 400 t/file"))
        await sandbox.upload(tmp_path, "t")
        done = await sandbox.exec(Command(shell="cat t/file t/other"))
    assert done.stdout == b"newkept\n"


async def test_files_are_listed_and_described(engine: SandboxEngine) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        await sandbox.exec(
            Command(shell="mkdir d; echo 12345 > d/f; chmod 640 d/f; ln -s f d/l; mkfifo d/p; mkdir d/s")
        )
        listed = {info.name: info for info in await sandbox.list_files("d")}
        info = await sandbox.stat("d/f")
        with pytest.raises(NotADirectoryError):
            await sandbox.list_files("d/f")
        with pytest.raises(FileNotFoundError) as missing:
            await sandbox.stat("gone")
    assert {name: info.kind for name, info in listed.items()} == {
        "f": "file", "l": "link", "p": "other", "s": "directory",
    }  # fmt: skip
    assert (listed["f"].size, listed["f"].mode) == (6, 0o640)
    assert info.name == "d/f"
    assert info.mtime_s > 1e9
    assert missing.value.filename == "/app/gone"


async def test_what_is_too_large_is_refused_and_leaves_nothing(engine: SandboxEngine, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 1000)
    async with engine.start(SandboxSpec(limits=Limits(file_mb=1))) as sandbox:
        with pytest.raises(OSError) as large:
            await sandbox.upload(tmp_path / "source", "target", max_bytes=999)
        assert large.value.errno == errno.EFBIG
        await sandbox.exec(Command(shell="mkdir t; for i in 1 2 3; do head -c 500 /dev/zero > t/$i; done"))
        with pytest.raises(OSError) as large:
            await sandbox.download("t", tmp_path / "t", max_bytes=1499)
        assert large.value.errno == errno.EFBIG
        (tmp_path / "huge").write_bytes(bytes(2 * MB))
        with pytest.raises(OSError):  # the sandbox's own limit
            await sandbox.upload(tmp_path / "huge", "huge")
        assert (await sandbox.exec(Command(shell="echo alive"))).stdout == b"alive\n"
    assert sorted(os.listdir(tmp_path)) == ["huge", "source"]


async def test_special_files_are_counted_out_and_refused_in(engine: SandboxEngine, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    async with engine.start(SandboxSpec()) as sandbox:
        with pytest.raises(OSError, match="neither file"):
            await sandbox.upload(tmp_path, "t")
        await sandbox.exec(Command(shell="mkdir d; mkfifo d/p; echo x > d/f"))
        assert await sandbox.download("d", tmp_path / "d", max_bytes=MB) == 1
        with pytest.raises(FileExistsError):
            await sandbox.download("d", tmp_path / "d", max_bytes=MB)
        with pytest.raises(FileNotFoundError):
            await sandbox.download("gone", tmp_path / "gone", max_bytes=MB)
    assert os.listdir(tmp_path / "d") == ["f"]


async def test_modes_that_lock_their_owner_out_do_not_stop_a_download(engine: SandboxEngine, tmp_path: Path) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        await sandbox.exec(Command(shell="mkdir d; echo x > d/f; chmod 0 d/f; chmod 500 d"))
        await sandbox.download("d", tmp_path / "d", max_bytes=MB)
        assert (await sandbox.stat("d/f")).mode == 0
        await sandbox.exec(Command(shell="chmod -R 700 d"))
    assert (tmp_path / "d" / "f").stat().st_mode & 0o777 == 0o600  # who receives it can read it


@pytest.mark.parametrize("size_mb", [96, pytest.param(1024, marks=[pytest.mark.full, pytest.mark.timeout(1200)])])
async def test_a_large_file_goes_both_ways_in_little_memory(local: SandboxEngine, size_mb: int, tmp_path: Path) -> None:
    make_large(tmp_path / "large", size_mb)
    limits = Limits(file_mb=size_mb + 1, memory_mb=2 * size_mb + 256)
    before = peak_mb()
    async with local.start(SandboxSpec(limits=limits)) as sandbox:
        await sandbox.upload(tmp_path / "large", "large")
        done = await sandbox.exec(Command(shell="sha256sum < large", timeout_s=120))
        await sandbox.download("large", tmp_path / "back", max_bytes=size_mb * MB)
    grown = peak_mb() - before
    digests = {digest(tmp_path / name) for name in ("large", "back")} | {done.text().split()[0]}
    for name in ("large", "back"):
        (tmp_path / name).unlink()
    assert len(digests) == 1
    assert grown < 32, f"{grown} MB more at the peak"


def make_large(path: Path, size_mb: int) -> None:
    block = os.urandom(MB)
    with open(path, "wb") as file:
        for number in range(size_mb):
            file.write(number.to_bytes(8, "little") + block[8:])


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- the bytes of a tree, as a hostile sandbox would send them


def entry(kind: bytes, path: bytes, content: bytes = b"") -> bytes:
    return Entry(kind, 0o644, 0, len(content), path).header() + content


ROOT = Entry(b"d", 0o755, 0, 0, b"").header()
HOSTILE = {
    "dots": ROOT + entry(b"f", b"../escaped", b"x"),
    "inner dots": ROOT + entry(b"d", b"a") + entry(b"f", b"a/../../escaped", b"x"),
    "absolute": ROOT + entry(b"f", b"/tmp/ale-escaped", b"x"),
    "through a link": ROOT + entry(b"l", b"a", b"/tmp") + entry(b"f", b"a/ale-escaped", b"x"),
    "over a link": ROOT + entry(b"l", b"a", b"/tmp/ale-escaped") + entry(b"f", b"a", b"x"),
    "a link as directory": ROOT + entry(b"l", b"a", b"/tmp") + entry(b"d", b"a") + entry(b"f", b"a/ale-escaped", b"x"),
    "twice": ROOT + entry(b"f", b"a", b"1") + entry(b"f", b"a", b"2"),
    "without its directory": ROOT + entry(b"f", b"a/b", b"x"),
    "a device": ROOT + entry(b"o", b"a"),
    "no root": entry(b"f", b"a", b"x"),
    "two roots": ROOT + ROOT,
    "a NUL": ROOT + entry(b"f", b"a\0b", b"x"),
    "an endless link": ROOT + Entry(b"l", 0o777, 0, 1 << 40, b"a").header(),
    "too large": ROOT + Entry(b"f", 0o644, 0, 1 << 62, b"a").header(),
    "bytes after the end": ROOT + end_of_tree(0) + b"x",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tree_is_refused_and_touches_nothing_else(name: str, tmp_path: Path) -> None:
    writer = TreeWriter(os.fsencode(tmp_path / "root"), MB, fresh=True)
    with pytest.raises((ValueError, OSError)):
        for byte in HOSTILE[name]:
            writer.feed(bytes([byte]))
        writer.feed(end_of_tree(0))
        writer.finish()
    writer.close()
    assert os.listdir(tmp_path) in ([], ["root"])
    assert not os.path.lexists("/tmp/ale-escaped")


def test_a_tree_that_ends_early_is_refused(tmp_path: Path) -> None:
    writer = TreeWriter(os.fsencode(tmp_path / "root"), MB, fresh=True)
    writer.feed(ROOT + entry(b"f", b"a", b"12345")[:-1])
    with pytest.raises(ValueError, match="before its end"):
        writer.finish()
    writer.close()


def test_equal_trees_give_equal_bytes_however_they_are_cut(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    stream = b"".join(pack_tree(os.fsencode(tmp_path / "tree"), strict=True))
    for step in (7, 4096, 100_000):
        writer = TreeWriter(os.fsencode(tmp_path / f"copy{step}"), 10 * MB, fresh=True)
        for at in range(0, len(stream), step):
            writer.feed(stream[at : at + step])
        assert writer.finish() == 0
        assert b"".join(pack_tree(os.fsencode(tmp_path / f"copy{step}"), strict=True)) == stream


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=64), max_size=8))
def test_arbitrary_bytes_are_a_tree_or_refused(chunks: list[bytes]) -> None:
    reader = TreeReader()
    with suppress(ValueError):
        for chunk in chunks:
            for part in reader.feed(ROOT + chunk if chunk is chunks[0] else chunk):
                assert isinstance(part, Entry | bytes)


async def test_a_file_error_breaks_nothing(engine: SandboxEngine, tmp_path: Path) -> None:
    async with engine.start(SandboxSpec()) as sandbox:
        with pytest.raises(FileNotFoundError):
            await sandbox.upload(tmp_path / "missing", "x")
        await sandbox.exec(Command(shell="echo > file"))
        (tmp_path / "t").mkdir()
        with pytest.raises(OSError):
            await sandbox.upload(tmp_path / "t", "file/below")
        assert not isinstance((await sandbox.exec(Command(shell="echo fine"))), SandboxError)
