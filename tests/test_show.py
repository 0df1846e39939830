import io
import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from rich.console import Console

from ale.config import AlgorithmConfig, ObjectiveName, RunConfig
from ale.data.run_folder import RunFolder
from ale.data.run_log import RunLog
from ale.messages import Chunk, ToolResult, Trajectory
from ale.show import GAMMA, Filter, overview, print_overview, print_trajectory, trajectory_view, visible
from ale.wire import Array

DROPPED = {"dropped": {"stale": 2}, "dropped_tokens": {"stale": 7}}
LEDGER = {"started": 9, "running": 1, "buffered": 2, "trained": 4, **DROPPED}


def member(number: int, reward: float, *, tokens: list[int], chunks: list[Chunk], output: str = "ok") -> Trajectory:
    sampled = sum(c.end - c.start for c in chunks)
    return Trajectory(
        id=f"g1/{number}",
        group="g1",
        task="copy-1",
        family="copy" if number else "sort",
        level=1,
        tokens_T=Array.of(tokens, "int32"),
        chunks=tuple(chunks),
        logp_A=Array.of([-0.5] * (sampled - 1) + [float("nan")], "float32"),
        logp_sampled_A=Array.of([-0.5] * sampled, "float32"),
        version_A=Array.of([3] * (sampled - 1) + [4], "int32"),
        results=(ToolResult("ls", output, 0, False, 0.25),),
        reward=reward,
    )


@pytest.fixture
def run(tmp_path: Path, nano_path: Path, nano_tokenizer: Any) -> RunLog:
    """One update on a group of two, one of them solved."""
    said = nano_tokenizer("<|user|>Copy oak.txt.<|end|><|assistant|>", add_special_tokens=False).input_ids
    call = nano_tokenizer("cp oak.txt fox.txt<|end|>", add_special_tokens=False).input_ids
    after = nano_tokenizer("<|tool|>ok<|end|><|assistant|>", add_special_tokens=False).input_ids
    done = nano_tokenizer("done<|end|>", add_special_tokens=False).input_ids
    a, b, c = len(said), len(said) + len(call), len(said) + len(call) + len(after)
    chunks = [Chunk(a, b, "call"), Chunk(c, c + len(done), "answer")]
    tokens = said + call + after + done
    config = RunConfig(name="a", runs_dir=str(tmp_path), algorithm=AlgorithmConfig(gamma=0.9))
    with RunFolder(config) as folder:
        folder.record(evaluation="heldout_before", success=0.25, ci95=(0.1, 0.5), n=8)
        folder.record(update=1, success=0.5, loss=float("nan"), lag=0.0, ledger=LEDGER)
        for number, reward in enumerate((1.0, 0.0)):
            output = "a\x1b]0;owned\x07\u202eb"
            folder.keep(member(number, reward, tokens=tokens, chunks=chunks, output=output), update=1)
    (tmp_path / "a" / "model").mkdir(exist_ok=True)
    (tmp_path / "a" / "model" / "tokenizer.json").write_bytes((nano_path / "tokenizer.json").read_bytes())
    return RunLog.open(tmp_path / "a")


def shown(view: Any, *, width: int = 80, terminal: bool = False, color: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=terminal, highlight=False, color_system="standard" if color else None
    )
    (print_trajectory if hasattr(view, "chunks") else print_overview)(view, console)
    return out.getvalue()


def test_a_chunk_carries_the_discounted_advantage_of_its_group(run: RunLog) -> None:
    won, lost = (trajectory_view(run, f"g1/{n}") for n in (0, 1))
    assert (won.advantage, lost.advantage, won.gamma) == (0.5, -0.5, 0.9)
    assert [chunk.weight for chunk in won.chunks] == pytest.approx([0.45, 0.5])
    assert [chunk.weight for chunk in lost.chunks] == pytest.approx([-0.45, -0.5])
    assert won.group_rewards == [1.0, 0.0]


def test_the_discount_of_every_objective_is_that_of_the_loss() -> None:
    from ale.algorithm.objectives import WEIGHTINGS

    for name in get_args(ObjectiveName):
        assert GAMMA.get(name, 1.0) == WEIGHTINGS[name].gamma, name


def test_a_turn_is_shown_as_it_was_sampled_with_what_came_of_it(run: RunLog) -> None:
    first, second = trajectory_view(run, "g1/0").chunks
    assert first.given == "<|user|>Copy oak.txt.<|end|><|assistant|>"
    assert first.text == "cp oak.txt fox.txt<|end|>"
    assert first.result is not None
    assert (first.result.call, first.result.duration_s) == ("ls", 0.25)
    assert (first.logp_mean, first.logp_min, first.versions) == (-0.5, -0.5, [3])
    assert (second.given, second.text, second.result) == ("<|tool|>ok<|end|><|assistant|>", "done<|end|>", None)
    assert second.versions == [3, 4]
    assert second.logp_mean == -0.5  # of those that are numbers


def test_one_that_was_not_trained_on_has_no_weights(run: RunLog) -> None:
    lines = (run.path / "trajectories.jsonl").read_text().replace('"update":1', '"evaluation":"heldout_after"')
    (run.path / "trajectories.jsonl").write_text(lines)
    view = trajectory_view(run, "g1/0")
    assert (view.advantage, view.group_rewards) == (None, [])
    assert [chunk.weight for chunk in view.chunks] == [None, None]


def test_a_group_of_which_a_part_is_missing_gives_no_wrong_weights(run: RunLog) -> None:
    lines = (run.path / "trajectories.jsonl").read_text().splitlines(keepends=True)
    (run.path / "trajectories.jsonl").write_text(lines[0])
    view = trajectory_view(run, "g1/0")
    assert view.advantage is None
    assert "only a part of it" in view.notes[0]


def test_without_a_tokenizer_the_tokens_are_numbers(run: RunLog) -> None:
    (run.path / "model" / "tokenizer.json").unlink()
    view = trajectory_view(run, "g1/0")
    assert "tokenizer.json is gone" in view.notes[0]
    assert all(part.isdigit() for part in view.chunks[0].text.split())


def test_what_a_model_wrote_cannot_steer_the_terminal(run: RunLog) -> None:
    view = trajectory_view(run, "g1/0")
    for terminal in (True, False):
        text = shown(view, terminal=terminal)
        assert r"a\x1b]0;owned\x07\u202eb" in text
        assert not set(text) & set("\x1b\x07\u202e")


def test_what_is_printed_as_itself_stays_so() -> None:
    assert visible("naïve 数\n\tx") == "naïve 数\n\tx"
    assert visible("\ud800\r\x7f") == r"\ud800\r\x7f"


@pytest.mark.parametrize(
    ("which", "ids"),
    [
        (Filter(), ["g1/0", "g1/1"]),
        (Filter(solved=True), ["g1/0"]),
        (Filter(solved=False), ["g1/1"]),
        (Filter(family="copy"), ["g1/1"]),
        (Filter(update=2), []),
        (Filter(evaluation="heldout_before"), []),
        (Filter(limit=1), ["g1/0"]),
    ],
)
def test_a_filter_lists_what_it_names(run: RunLog, which: Filter, ids: list[str]) -> None:
    assert [row.id for row in overview(run, which).trajectories] == ids


def test_the_overview_says_what_a_run_is(run: RunLog) -> None:
    seen = overview(run, Filter(limit=1))
    text = shown(seen)
    assert "a  not finished, 1 of 100 updates" in text
    assert "algorithm.gamma  0.9" in text
    assert "heldout_before  25.0% (95% interval 10.0% to 50.0%, 8 tasks)" in text
    assert "9 started = 4 trained + 2 buffered + 1 running + 2 dropped" in text
    assert "stale  2 dropped, 7 tokens on average" in text
    assert "loss     not a number" in text
    assert "2 of 2 kept match, 1 are listed" in text


def test_a_pipe_gets_whole_lines_without_colours(run: RunLog) -> None:
    line = next(line for line in shown(overview(run, Filter()), width=20).splitlines() if "g1/0" in line)
    assert line.endswith("update 1")
    assert "\x1b" not in shown(trajectory_view(run, "g1/0"), width=20)


def test_a_narrow_terminal_is_not_overrun(run: RunLog) -> None:
    for view in (overview(run, Filter()), trajectory_view(run, "g1/0")):
        assert max(map(len, shown(view, width=24, terminal=True).splitlines())) <= 24


def test_a_terminal_gets_colours(run: RunLog) -> None:
    assert "\x1b[" in shown(trajectory_view(run, "g1/0"), terminal=True, color=True)


def test_json_says_the_same(run: RunLog) -> None:
    view = json.loads(msgspec.json.encode(trajectory_view(run, "g1/0")))
    assert view["chunks"][0]["text"] == "cp oak.txt fox.txt<|end|>"
    assert view["chunks"][0]["weight"] == pytest.approx(0.45)
    assert json.loads(msgspec.json.encode(overview(run, Filter())))["books"] == LEDGER
