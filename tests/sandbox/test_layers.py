"""Snapshots, forks and the layers under them: chains, flattening, and what is deleted when nobody needs it."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest

from ale.sandbox import Command, SandboxEngine, SandboxSpec
from ale.sandbox.flatten import flatten

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


async def test_a_chain_of_56_snapshots_stays_short_and_right(local: Any) -> None:
    before = local.statistics().layers
    async with local.start(SandboxSpec()) as sandbox:
        for number in range(56):
            # The processes of a real command in each would take minutes; the agent writes, the layer is as real.
            await sandbox.write_file(f"d{number % 7}/f{number}", b"%d" % number)
            await (await sandbox.snapshot()).release()
            assert len(sandbox._foundation.layers) <= 50
        done = await sandbox.exec(Command(shell="cat $(find . -type f) | tr -d '\\n' | wc -c; find . -type f | wc -l"))
        assert done.text().split() == [str(sum(len(str(number)) for number in range(56))), "56"]
        assert local.statistics().layers - before <= 50
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
