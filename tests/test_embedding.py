"""`ale.open_run`: how updates are handed over, on a scripted pipeline; then whole runs, as documented."""

import ast
import asyncio
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

import ale
from ale.actors.trainer import Update
from ale.config import RunConfig
from ale.data import moment as moments
from ale.data.moment import Moment
from ale.errors import LearnerError, UserError
from ale.messages import Batch, StepMetrics
from ale.vitals import Vitals
from ale.waiting import named, register

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
Watch = Callable[[Update], Awaitable[None]]
Train = Callable[[Watch], Awaitable[Any]]


def update(number: int) -> Update:
    metrics = StepMetrics(version=number, slot=0, loss=0.0, grad_norm=1.0, values={})
    return Update(number=number, batch=Batch(groups=()), metrics=metrics, lag=0, wait_s=0.0, step_s=0.0, sync_s=0.0)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Train], None]:
    """Lets `train(watch)` stand for the pipeline."""

    def script(train: Train) -> None:
        pipeline = SimpleNamespace(train=lambda config, *, watch, **more: train(watch))
        monkeypatch.setattr("ale.embedding.load_pipeline", lambda config: pipeline)

    return script


class Script:
    """A pipeline of three updates; `seen` tells what happened in which order."""

    def __init__(self, fail_after: int | None = None, linger: bool = False) -> None:
        self.seen: list[str] = []
        self._fail_after = fail_after
        self._linger = linger

    async def __call__(self, watch: Watch) -> str:
        try:
            for number in (1, 2, 3):
                self.seen.append(f"update {number}")
                await watch(update(number))
                if number == self._fail_after:
                    raise LearnerError("the learner failed")
        finally:
            for _ in range(3):  # closing takes its time
                await asyncio.sleep(0)
            self.seen.append("closed")
        return "summary"


def test_an_update_begins_when_the_body_asks_for_it(scripted: Callable[[Train], None]) -> None:
    script = Script()
    scripted(script)

    async def main() -> Any:
        async with ale.open_run(RunConfig()) as run:
            assert run.summary is None
            async for seen in run.updates():
                script.seen.append(f"body {seen.number}")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert script.seen[-1] == "closed"
            return run.summary

    assert asyncio.run(main()) == "summary"
    assert script.seen == ["update 1", "body 1", "update 2", "body 2", "update 3", "body 3", "closed"]


def test_leaving_early_waits_until_everything_is_closed(scripted: Callable[[Train], None]) -> None:
    script = Script()
    scripted(script)

    async def main() -> None:
        async with ale.open_run(RunConfig()) as run:
            async for _ in run.updates():
                break
        assert script.seen == ["update 1", "closed"]
        assert run.summary is None
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_after_a_break_the_updates_go_on_where_they_were(scripted: Callable[[Train], None]) -> None:
    scripted(Script())

    async def main() -> list[int]:
        numbers = []
        async with ale.open_run(RunConfig()) as run:
            async for seen in run.updates():
                numbers.append(seen.number)
                break
            async for seen in run.updates():
                numbers.append(seen.number)
        return numbers

    assert asyncio.run(main()) == [1, 2, 3]


def test_what_stops_the_run_is_raised_in_the_loop(scripted: Callable[[Train], None]) -> None:
    script = Script(fail_after=2)
    scripted(script)
    numbers = []

    async def main() -> None:
        async with ale.open_run(RunConfig()) as run:
            async for seen in run.updates():
                numbers.append(seen.number)

    with pytest.raises(LearnerError, match="the learner failed"):
        asyncio.run(main())
    assert (numbers, script.seen[-1]) == ([1, 2], "closed")


def test_a_failure_that_nobody_asked_about_is_raised_on_leaving(scripted: Callable[[Train], None]) -> None:
    async def fail(watch: Watch) -> None:
        raise LearnerError("at once")

    scripted(fail)

    async def main() -> None:
        async with ale.open_run(RunConfig()):
            await asyncio.sleep(0)

    with pytest.raises(LearnerError, match="at once"):
        asyncio.run(main())


def test_an_error_of_the_body_stays_what_it_is_and_closes_the_run(scripted: Callable[[Train], None]) -> None:
    script = Script()
    scripted(script)

    async def main() -> None:
        async with ale.open_run(RunConfig()) as run:
            async for _ in run.updates():
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(main())
    assert script.seen == ["update 1", "closed"]


def test_a_cancelled_program_closes_the_run_first(scripted: Callable[[Train], None]) -> None:
    script = Script()
    scripted(script)

    async def program() -> None:
        async with ale.open_run(RunConfig()) as run:
            async for _ in run.updates():
                await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(program())
        while not script.seen:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert script.seen == ["update 1", "closed"]

    asyncio.run(main())


def test_a_wait_that_is_given_up_loses_no_update(scripted: Callable[[Train], None]) -> None:
    scripted(Script())

    async def main() -> list[int]:
        async with ale.open_run(RunConfig()) as run:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await anext(run.updates())
            return [seen.number async for seen in run.updates()]

    assert asyncio.run(main()) == [1, 2, 3]


def test_a_run_that_was_left_says_so_and_nothing_of_its_loop_remembers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ale import pipeline

    moment = Moment(at=1.0, pid=1, vitals=Vitals(condition="running"), progress="of this life")
    begun = asyncio.Event()

    async def endless(config: RunConfig, folder: Any, *more: Any) -> None:
        assert not (folder.path / "moment.json").exists()
        folder.keep_moment(moment)
        with named("for ever"):
            await asyncio.sleep(0.002)  # what is shorter than a millisecond is not on the timeline
            begun.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(pipeline, "_train", endless)

    async def life(resume: bool) -> None:
        begun.clear()
        source: Any = object()
        run = asyncio.create_task(pipeline.train(RunConfig(runs_dir=str(tmp_path)), source=source, resume=resume))
        await begun.wait()
        run.cancel()
        await asyncio.wait({run})
        assert run.cancelled()
        assert not register().recorders
        seen = moments.read(tmp_path / "run")
        assert (seen.progress, seen.ended) == ("of this life", "left before its end")

    async def main() -> None:
        await life(resume=False)
        await life(resume=True)

    asyncio.run(main())
    assert b"for ever" in (tmp_path / "run" / "timeline.json").read_bytes()


def test_a_model_path_that_holds_none_is_refused_on_entering(tmp_path: Path) -> None:
    async def main() -> None:
        async with ale.open_run(ale.parse({"model": {"path": str(tmp_path)}})):
            raise AssertionError("it has no model")

    with pytest.raises(UserError, match="holds no complete model"):
        asyncio.run(main())


def test_every_public_name_is_there_and_documented() -> None:
    assert 10 <= len(ale.__all__) <= 15
    for name in ale.__all__:
        assert inspect.getdoc(getattr(ale, name)), name
        assert name in dir(ale)
    with pytest.raises(AttributeError, match="no attribute 'opne_run'"):
        ale.opne_run  # noqa: B018


def tiny(tmp_path: Path, **learner: Any) -> RunConfig:
    return ale.parse(
        {
            "name": "tiny",
            "runs_dir": str(tmp_path),
            "tasks": {"heldout": 2},
            "agent": {"max_turns": 2, "max_turn_tokens": 4, "max_context_tokens": 64},
            "rollout": {"group_size": 2, "groups_per_step": 2, "concurrency": 8},
            "learner": {"updates": 2, **learner},
        }
    )


class Echo:
    def __init__(self, task: ale.Task) -> None:
        self.task = task

    def reset(self) -> str:
        return f"Say {self.task.seed}."

    def step(self, action: str) -> ale.Step:
        return ale.Step("go on")


def number_of(trajectory: ale.Trajectory) -> float:
    return float(trajectory.id.rpartition("/")[2]) + 1  # members of a group differ


@pytest.mark.timeout(600)
def test_a_run_with_its_own_environment_and_reward_trains_and_lands_in_its_folder(tmp_path: Path) -> None:
    async def reward(trajectory: ale.Trajectory) -> float:
        return number_of(trajectory) if trajectory.group.startswith("g") else 1.0

    async def main() -> None:
        async with ale.open_run(tiny(tmp_path), environment=Echo, reward=reward) as run:
            rewards = [t.reward async for t in run.trajectories()]
        assert sorted(rewards) == [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
        assert run.summary is not None
        assert (run.summary.updates, run.summary.lost_samples) == (2, 0)
        assert run.summary.heldout_after is not None
        assert run.summary.heldout_after.success == 1.0
        assert (run.path / "checkpoints" / "final" / "model.safetensors").is_file()

    asyncio.run(main())


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_reward_function_that_always_raises_ends_the_run_with_its_error(tmp_path: Path) -> None:
    def broken(trajectory: ale.Trajectory) -> float:
        raise ZeroDivisionError("in my reward")

    async def main() -> None:
        async with ale.open_run(tiny(tmp_path), environment=Echo, reward=broken) as run:
            async for _ in run.updates():
                raise AssertionError("there is nothing to train on")

    with pytest.raises(UserError, match=r"in my reward.*never worked"):
        asyncio.run(main())


def python_block(document: str) -> str:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)[0]


@pytest.mark.timeout(900)
def test_the_script_of_the_readme_runs_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    config = (ROOT / "examples" / "guess.toml").read_text()
    assert "updates = 20\n" in config
    (tmp_path / "examples" / "guess.toml").write_text(config.replace("updates = 20\n", "updates = 4\n"))
    (tmp_path / "script.py").write_text(python_block("README.md"))
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [int(number) for number, _ in lines] == [1, 2, 3, 4]
    assert all(0 <= float(success) <= 1 for _, success in lines)


@pytest.mark.timeout(900)
@pytest.mark.full
def test_the_notebook_runs_as_it_is_written_in_a_loop_that_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    shutil.copy(ROOT / "examples" / "guess.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    async def execute() -> None:
        """As a notebook does it: each cell compiled with await at its top level."""
        for number, cell in enumerate(cells):
            code = compile(cell.source, f"cell {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if (waiting := eval(code, names)) is not None:
                await waiting

    asyncio.run(execute())
    assert len(names["rewards"]) == 3
    assert names["run"].summary.heldout_after.n == 16
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]
