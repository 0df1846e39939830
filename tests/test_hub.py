"""The hub: what is added comes back as it was, once on disk, and what was changed is found."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ale.config import TasksConfig
from ale.envs.families import make as make_task
from ale.envs.source import open_source
from ale.envs.task_dir import load_tasks, write_task
from ale.errors import HubError
from ale.hub import EPOCH, Hub
from ale.sandbox import Command, SandboxEngine, SandboxSpec, checkpoint


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "hub")


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    root = tmp_path / "layer"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "run").write_text("#!/bin/sh\necho ran\n")
    (root / "bin" / "run").chmod(0o755)
    (root / "same").write_text("#!/bin/sh\necho ran\n")
    (root / "link").symlink_to("bin/run")
    (root / "empty").mkdir()
    (root / "secret").write_text("x")
    (root / "secret").chmod(0o600)
    return root


def inodes(root: Path) -> int:
    return len({path.stat().st_ino for path in root.rglob("*") if path.is_file() and not path.is_symlink()})


def test_a_template_comes_back_as_it_went_in(hub: Hub, layer: Path) -> None:
    entry = hub.add_template("base", [layer], workdir="/work", env={"A": "1"})
    template = hub.template("base")
    (tree,) = template.layers
    assert (template.workdir, template.env) == ("/work", {"A": "1"})
    assert (tree / "bin" / "run").stat().st_mode & 0o777 == 0o755
    assert (tree / "secret").stat().st_mode & 0o777 == 0o600
    assert os.readlink(tree / "link") == "bin/run"
    assert list((tree / "empty").iterdir()) == []
    assert (tree / "same").stat().st_mtime == EPOCH
    assert hub.verify() == []
    assert [one.name for one in hub.entries()] == ["base"]
    assert hub.entry("base") == entry


def test_equal_content_has_one_hash_and_one_place_on_disk(hub: Hub, layer: Path, tmp_path: Path) -> None:
    one = hub.add_template("one", [layer])
    os.utime(layer / "same", (1, 1))
    two = hub.add_template("two", [layer])
    assert (one.sha256, one.trees) == (two.sha256, two.trees)
    before = inodes(hub.root / "files")
    (layer / "more").write_text("new")
    three = hub.add_template("three", [layer])
    assert three.trees != one.trees
    assert inodes(hub.root / "files") == before + 1
    assert (hub.template("three").layers[0] / "same").samefile(hub.template("one").layers[0] / "same")
    (layer / "same").chmod(0o755)
    assert hub.add_template("four", [layer]).trees != three.trees


def test_what_was_changed_is_found_and_named(hub: Hub, layer: Path) -> None:
    hub.add_template("base", [layer])
    (tree,) = hub.template("base").layers
    (tree / "secret").write_text("y")
    (tree / "link").unlink()
    (tree / "planted").write_text("z")
    (tree / "bin").chmod(0o700)
    wrong = hub.verify("base")
    assert [line.split("'")[1] for line in wrong] == ["bin", "link", "planted", "secret"]
    assert [next(word for word in ("changed", "missing", "added") if word in line) for line in wrong] == [
        "changed",
        "missing",
        "added",
        "changed",
    ]
    hub.add_template("base", [layer], replace=True)  # the cure that errors name
    assert hub.verify() == []
    entry = hub.root / "entries" / "base.json"
    entry.write_text(entry.read_text().replace('"/app"', '"/elsewhere"'))
    assert "does not have the hash" in hub.verify()[0]
    entry.write_text("{")
    assert "damaged" in hub.verify()[0]
    with pytest.raises(HubError, match="damaged"):
        hub.template("base")


def test_what_no_name_stands_for_is_deleted_and_nothing_else(hub: Hub, layer: Path) -> None:
    hub.add_template("one", [layer])
    (layer / "more").write_text("12345")
    hub.add_template("two", [layer])
    hub.remove("two")
    freed = hub.gc()
    assert (freed.trees, freed.files, freed.bytes) == (1, 1, 5)
    assert hub.verify() == []
    hub.remove("one")
    hub.gc()
    assert [path for path in hub.root.rglob("*") if path.is_file() and path.name != "lock"] == []
    with pytest.raises(HubError, match="hub list"):
        hub.remove("one")


def test_a_name_is_taken_once_and_replaced_when_asked(hub: Hub, layer: Path) -> None:
    first = hub.add_template("base", [layer])
    (layer / "more").write_text("x")
    with pytest.raises(HubError, match="--replace"):
        hub.add_template("base", [layer])
    assert hub.entry("base") == first
    assert hub.add_template("base", [layer], replace=True).sha256 != first.sha256


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 64, "a b"])
def test_a_name_that_leads_elsewhere_is_refused(hub: Hub, layer: Path, name: str) -> None:
    with pytest.raises(HubError, match="no name"):
        hub.add_template(name, [layer])
    with pytest.raises(HubError, match="no name"):
        hub.entry(name)


def test_what_cannot_be_kept_is_refused_and_leaves_nothing(hub: Hub, layer: Path) -> None:
    os.mkfifo(layer / "pipe")
    with pytest.raises(HubError, match="pipe"):
        hub.add_template("base", [layer])
    with pytest.raises(HubError, match="no directory"):
        hub.add_template("base", [layer / "nowhere"])
    with pytest.raises(ValueError, match="workdir"):
        hub.add_template("base", [layer], workdir="/etc")
    assert hub.entries() == []
    assert list((hub.root / "trees").iterdir()) == []


def test_a_task_pack_is_a_source_of_tasks(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_task("copy", seed) for seed in range(3)]
    for task in made:
        write_task(task, tmp_path / "tasks")
    hub.add_tasks("pack", tmp_path / "tasks")
    assert [task.content_hash for task in load_tasks(hub.tasks("pack"))] == [
        task.content_hash for task in load_tasks(tmp_path / "tasks")
    ]
    hub.add_tasks("single", tmp_path / "tasks" / made[0].id)
    assert [task.id for task in load_tasks(hub.tasks("single"))] == [made[0].id]
    monkeypatch.setenv("ALE_HUB", str(hub.root))
    source = open_source(TasksConfig(source="hub:pack", heldout=1), seed=0)
    assert {source.heldout[0].id, next(source.train).id, next(source.train).id} == {task.id for task in made}
    with pytest.raises(HubError, match="a task pack, and a template"):
        hub.template("pack")
    with pytest.raises(HubError, match="no missing"):
        open_source(TasksConfig(source="hub:missing", heldout=1), seed=0)


def test_a_checkpoint_becomes_a_template_that_starts_measured(
    hub: Hub, loop: Any, sandboxes: SandboxEngine, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with sandboxes.start(SandboxSpec(workdir="/project")) as sandbox:
            await sandbox.session().exec(Command(shell="mkdir a; cd a; echo data > f; x=1"))
            snapshot = await sandbox.snapshot()
            await checkpoint(sandboxes, snapshot, tmp_path / "one.tar")
            await snapshot.release()
        hub.add_checkpoint("grown", tmp_path / "one.tar")
        from ale.sandbox import open_engine

        async with open_engine("local") as engine:
            assert hub.starts("grown") is None
            measured = await hub.measure("grown", engine)
            assert hub.starts("grown") == measured
            assert measured.cold_ms > 0 < measured.cached_ms
            template = hub.template("grown")
            spec = SandboxSpec(
                base=tuple(map(str, template.layers)), workdir=template.workdir, sessions=template.sessions
            )
            async with engine.start(spec) as sandbox:
                done = await sandbox.session().exec(Command(shell="cat f; echo $x"))
            assert done.text() == "data\n1\n"
        hub.add_template("grown", [tmp_path], replace=True)
        assert hub.starts("grown") is None  # of other content

    loop.run(scenario())


def test_a_content_that_has_all_the_links_that_it_may_is_copied(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def bounded(source: Path, target: Path) -> None:
        if source.stat().st_nlink > 2:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        link(source, target)

    monkeypatch.setattr(os, "link", bounded)
    (tmp_path / "many").mkdir()
    for number in range(5):
        (tmp_path / "many" / str(number)).write_text("the same")
    hub.add_template("many", [tmp_path / "many"])
    assert hub.verify() == []
    (layer,) = hub.template("many").layers
    assert len({path.stat().st_ino for path in layer.iterdir()}) == 3
    assert hub.gc().files == 0


def test_a_tree_that_somebody_reads_outlives_the_name_and_gc(hub: Hub, layer: Path) -> None:
    hub.add_template("base", [layer])
    with Hub(hub.root).using("base") as template:  # as another process would
        (layer / "same").write_text("another")
        hub.add_template("base", [layer], replace=True)
        freed = hub.gc()
        assert (freed.trees, freed.in_use) == (0, 1)
        assert (template.layers[0] / "same").read_text() == "#!/bin/sh\necho ran\n"
    freed = hub.gc()
    assert (freed.trees, freed.in_use) == (1, 0)
    assert not template.layers[0].exists()
    kept = hub.template("base")  # for as long as this process runs
    hub.remove("base")
    assert hub.gc().in_use == 1
    assert (kept.layers[0] / "same").read_text() == "another"


def test_a_damaged_entry_hides_no_other_and_is_mended_or_removed(hub: Hub, layer: Path) -> None:
    for name in ("one", "two"):
        hub.add_template(name, [layer])
    (hub.root / "entries" / "one.json").write_text("{")
    assert [entry.name for entry in hub.entries()] == ["two"]
    (said,) = hub.damaged()
    assert "one.json is damaged" in said
    assert any("one.json is damaged" in line for line in hub.verify())
    with pytest.raises(HubError, match="Nothing was deleted"):
        hub.gc()
    hub.add_template("one", [layer], replace=True)
    assert hub.damaged() == []
    (hub.root / "entries" / "two.json").write_text("{")
    hub.remove("two")
    assert hub.gc().trees == 0
    assert [entry.name for entry in hub.entries()] == ["one"]
