"""Snapshots, forks and the layers under them: chains, flattening, and what is deleted when nobody needs it."""

from __future__ import annotations

import asyncio
import io
import random
import tarfile
import threading
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ale.errors import SandboxError
from ale.sandbox import Command, SandboxEngine, SandboxSpec, checkpoint, foundation, open_engine, restore
from ale.sandbox.checkpoint import _read, _write
from ale.sandbox.flatten import flatten
from ale.sandbox.layers import LayerStore

LOOK = "find . -printf '%P %y %m %l\\n' | sort; find . -type f -exec md5sum {} + | sort"


async def look(sandbox: Any) -> str:
    done = await sandbox.exec(Command(shell=LOOK, timeout_s=60))
    assert done.ok, done
    return str(done.text())


def scramble(chance: random.Random) -> str:
    """A shell line that changes a small tree in one of the ways that overlayfs treats differently."""
    a, b = (f"d{chance.randrange(3)}/e{chance.randrange(2)}", f"d{chance.randrange(3)}/f{chance.randrange(3)}")
    return chance.choice(
        [
            f"mkdir -p {a}; echo {chance.random()} > {a}/x",
            f"rm -rf {a.split('/')[0]}",
            f"rm -rf {a}; mkdir -p {a}; echo new > {a}/y",
            f"mkdir -p {b.split('/')[0]}; rm -rf {b}; echo {chance.random()} > {b}",
            f"rm -rf {b}; mkdir -p {b}; touch {b}/inner",
            f"rm -rf {a}; mkdir -p {a.split('/')[0]}; ln -s ../target {a}",
            f"mkdir -p {a}; chmod 7{chance.randrange(8)}{chance.randrange(8)} {a}",
            f"mkdir -p {b.split('/')[0]}; [ -d {b} ] || echo more >> {b}",
            f"[ -d {a.split('/')[0]} ] && mv {a.split('/')[0]} moved{chance.randrange(3)}",
        ]
    )


@pytest.mark.parametrize("seed", range(3))
async def test_a_flattened_chain_shows_what_the_chain_showed(local: Any, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    (tmp_path / "d0" / "e0").mkdir(parents=True)
    (tmp_path / "d0" / "e0" / "base").write_text("base")
    (tmp_path / "d1").mkdir()
    (tmp_path / "d1" / "f1").write_text("base")
    async with local.start(SandboxSpec(base=(str(tmp_path),))) as sandbox:
        snapshots = []
        for _ in range(8):
            await sandbox.exec(Command(shell="; ".join(scramble(chance) for _ in range(4))))
            snapshots.append(await sandbox.snapshot())
        chained = await look(sandbox)
        foundation = sandbox._foundation
        chain = [layer for layer in foundation.layers if layer.frozen]
        assert len(chain) > 2
        merged = await foundation.store.merge(chain)
        await sandbox._end()
        foundation.layers = [*(layer for layer in foundation.layers if not layer.frozen), merged]
        await foundation.store.let_go(chain)
        assert await look(sandbox) == chained
        for snapshot in snapshots:
            await snapshot.release()


@pytest.mark.parametrize(("most", "long"), [(8, 20), pytest.param(50, 160, marks=pytest.mark.full)])
async def test_a_long_chain_of_snapshots_stays_short_and_right(
    local: Any, most: int, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert foundation.MAX_CHAIN == 50
    monkeypatch.setattr(foundation, "MAX_CHAIN", most)
    before = local.statistics().layers
    async with local.start(SandboxSpec()) as sandbox:
        for number in range(long):
            # The processes of a real command in each would take minutes; the agent writes, the layer is as real.
            await sandbox.write_file(f"d{number % 7}/f{number}", b"%d" % number)
            await (await sandbox.snapshot()).release()
            assert len(sandbox._foundation.layers) <= most
        done = await sandbox.exec(Command(shell="cat $(find . -type f) | tr -d '\\n' | wc -c; find . -type f | wc -l"))
        assert done.text().split() == [str(sum(len(str(number)) for number in range(long))), str(long)]
        assert local.statistics().layers - before <= most
    assert local.statistics().layers == before


async def test_layers_live_as_long_as_somebody_stands_on_them(local: Any) -> None:
    before = local.statistics().layers
    async with local.start(SandboxSpec()) as sandbox:
        await sandbox.write_file("one", b"1")
        first = await sandbox.snapshot()
        await sandbox.write_file("two", b"2")
        second = await sandbox.snapshot()
        assert local.statistics().layers - before == 2
    assert local.statistics().layers - before == 2
    await second.release()
    assert local.statistics().layers - before == 1
    async with local.start(SandboxSpec(base=first)) as sandbox:
        await first.release()
        assert await sandbox.read_file("one") == b"1"
    assert local.statistics().layers == before


async def test_sixty_four_forks_stand_side_by_side(engine: SandboxEngine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("base")
    async with engine.start(SandboxSpec(base=(str(tmp_path),))) as sandbox:
        await sandbox.write_file("added", b"1")
        async with sandbox.fork(64) as forks:
            assert engine.statistics().alive == 65
            assert len({fork.id for fork in forks}) == 64
            some = forks[::16]
            await asyncio.gather(*(fork.write_file("file", fork.id.encode()) for fork in some))
            for fork in some:
                assert await fork.read_file("file") == fork.id.encode()
            assert await forks[1].read_file("file") == b"base"
            assert await sandbox.read_file("added") == b"1"
        assert engine.statistics().alive == 1
    with pytest.raises(ValueError, match="at least 1"):
        async with sandbox.fork(0):
            pass


async def test_a_fork_costs_no_copy_of_the_workspace(local: Any, tmp_path: Path) -> None:
    for number in range(2000):
        folder = tmp_path / str(number // 100)
        folder.mkdir(exist_ok=True)
        (folder / str(number)).write_bytes(bytes(1000))
    async with local.start(SandboxSpec(base=(str(tmp_path),))) as sandbox:
        boxes = Path(local.capabilities()["state"]) / "boxes"
        began = time.process_time()
        async with sandbox.fork(16):
            took_s = time.process_time() - began
            assert sum(1 for path in boxes.rglob("*") if path.is_file()) == 0
    assert took_s < 1.0


def test_flattening_never_writes_to_what_it_merges(tmp_path: Path) -> None:
    low, high = tmp_path / "low", tmp_path / "high"
    for layer, content in ((low, "low"), (high, "high")):
        (layer / "dir").mkdir(parents=True)
        (layer / "dir" / "both").write_text(content)
        (layer / f"only-{content}").write_text(content)
    (low / "becomes").mkdir()
    (high / "becomes").write_text("file")
    (high / "dir").chmod(0o500)
    flatten([low, high], tmp_path / "merged")
    merged = tmp_path / "merged"
    assert (merged / "dir" / "both").read_text() == "high"
    assert (merged / "becomes").read_text() == "file"
    assert {path.name for path in merged.iterdir()} == {"dir", "only-low", "only-high", "becomes"}
    assert (merged / "dir").stat().st_mode & 0o777 == 0o500
    assert (merged / "only-low").stat().st_ino == (low / "only-low").stat().st_ino  # a link, not a copy
    assert (low / "dir" / "both").read_text() == "low"
    assert (low / "becomes").is_dir()
    for path in (merged / "dir", high / "dir"):
        path.chmod(0o700)


@asynccontextmanager
async def another(engine: SandboxEngine) -> AsyncIterator[SandboxEngine]:
    """Another engine: of the same kind, or the local one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        plain = engine.capabilities().get("isolation", "").startswith("no:")
        async with open_engine("unsafe-process" if plain else "local") as other:
            yield other


async def test_a_checkpoint_comes_back_whole_on_another_engine(engine: SandboxEngine, tmp_path: Path) -> None:
    async with engine.start(SandboxSpec(workdir="/project")) as sandbox:
        await sandbox.session().exec(
            Command(shell="mkdir -p a/b; cd a; echo data > b/f; chmod 751 b; ln -s b/f l; x=1")
        )
        snapshot = await sandbox.snapshot()
        sha256 = await checkpoint(engine, snapshot, tmp_path / "one.tar")
        assert await checkpoint(engine, snapshot, tmp_path / "same.tar") == sha256
        await sandbox.write_file("more", b"x")
        await snapshot.release()
        snapshot = await sandbox.snapshot()
        assert await checkpoint(engine, snapshot, tmp_path / "two.tar") != sha256
        await snapshot.release()
    assert not list(engine.scratch.iterdir())
    async with another(engine) as other:
        restored = await restore(other, tmp_path / "one.tar", sha256=sha256)
        async with other.start(SandboxSpec(base=restored, workdir=restored.workdir)) as sandbox:
            done = await sandbox.session().exec(Command(shell="cat l; echo $x; stat -c %a b"))
            assert done.text() == "data\n1\n751\n"
        assert await checkpoint(other, restored, tmp_path / "again.tar") == sha256
        await restored.release()
        with pytest.raises(SandboxError, match="was asked for"):
            await restore(other, tmp_path / "two.tar", sha256=sha256)


def test_an_archive_that_was_changed_or_is_hostile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("honest")
    archive = tmp_path / "a.tar"
    _write(tmp_path / "tree", archive, "/app", {"main": b"state"})
    assert _read(archive, tmp_path / "out", 1000).workdir == "/app"
    with pytest.raises(OSError, match="larger"):
        _read(archive, tmp_path / "small", 3)
    archive.write_bytes(archive.read_bytes().replace(b"honest", b"forged"))
    with pytest.raises(SandboxError, match="hash"):
        _read(archive, tmp_path / "forged", 1000)
    archive.write_bytes(archive.read_bytes()[:700])
    with pytest.raises(SandboxError, match="no checkpoint"):
        _read(archive, tmp_path / "cut", 1000)
    for name, kind in (("workspace/../escaped", tarfile.REGTYPE), ("/escaped", tarfile.REGTYPE),
                       ("workspace/device", tarfile.CHRTYPE), ("workspace/hard", tarfile.LNKTYPE)):  # fmt: skip
        with tarfile.open(archive, "w") as hostile:
            for member, type_ in (("ale.json", tarfile.REGTYPE), ("workspace", tarfile.DIRTYPE), (name, kind)):
                info = tarfile.TarInfo(member)
                info.type = type_
                data = b'{"format":1,"workdir":"/app","sessions":{},"sha256":""}' if member == "ale.json" else b""
                info.size = len(data)
                hostile.addfile(info, io.BytesIO(data))
        with pytest.raises(SandboxError, match="no checkpoint"):
            _read(archive, tmp_path / "hostile", 1000)
        assert sorted(path.name for path in tmp_path.iterdir() if "escaped" in path.name) == []
        if (tmp_path / "hostile").exists():
            (tmp_path / "hostile").rmdir()


async def test_a_snapshot_whose_asker_was_cancelled_is_let_go(local: Any) -> None:
    before = local.statistics().layers
    async with local.start(SandboxSpec()) as sandbox:
        await sandbox.exec(Command(shell="echo x > file"))
        asking = asyncio.ensure_future(sandbox.snapshot())
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await sandbox.exec(Command(shell="cat file"))).stdout == b"x\n"
        assert sandbox.statistics().snapshots == 1
    assert local.statistics().layers == before


async def test_the_copy_of_a_source_that_has_gone_goes_with_the_next(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "layers", None)
    (tmp_path / "layers").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        await store.let_go([await store.import_tree(str(tmp_path / name))])
        (tmp_path / name).rmdir()
        assert (store.alive, len(list((tmp_path / "layers").iterdir()))) == (1, 1)


async def test_a_copy_that_is_cancelled_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go, done = threading.Event(), threading.Event(), threading.Event()

    def slow(source: Path, target: Path, owner: object) -> None:
        started.set()
        assert go.wait(10)
        target.mkdir()
        done.set()

    monkeypatch.setattr("ale.sandbox.layers.copy_tree", slow)
    (tmp_path / "layers").mkdir()
    (tmp_path / "source").mkdir()
    importing = asyncio.ensure_future(LayerStore(tmp_path / "layers", None).import_tree(str(tmp_path / "source")))
    assert await asyncio.to_thread(started.wait, 10)
    importing.cancel()
    await asyncio.wait([importing], timeout=0.2)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await importing
    assert await asyncio.to_thread(done.wait, 10)
    assert list((tmp_path / "layers").iterdir()) == []
