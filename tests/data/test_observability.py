"""What a run says of itself beside its metrics: timeline, names, the page for Prometheus."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path

import pytest

from ale.data.instruments import Page, instrument, prometheus
from ale.data.moment import Moment
from ale.data.timeline import Timeline
from ale.testing.clock import run
from ale.vitals import ProcessState, Vitals
from ale.waiting import named, recorded, waiting

MOMENT = Moment(
    at=1.0,
    pid=1,
    vitals=Vitals(condition="running", memory_mb=100.0),
    processes=(ProcessState(name="engine", pid=2, vitals=Vitals(condition="running", memory_mb=800.0), asked=12),),
)


def test_a_timeline_is_a_chrome_trace_of_waits_and_of_what_processes_use(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json", 1)

    async def scenario() -> None:
        with recorded(timeline.span):
            async with waiting("a turn", on="process engine"):
                await asyncio.sleep(2.0)
            with named("nothing to do", idle=True):
                await asyncio.sleep(2.0)
            with named("the answer of process learner to TrainStep", on="process learner"):
                await asyncio.sleep(3.0)
        with named("what comes after the run"):
            await asyncio.sleep(2.0)

    run(scenario())
    timeline.sample(MOMENT)
    timeline.flush()
    timeline = Timeline(tmp_path / "timeline.json", 1, life=2)  # goes on where the last one ended
    timeline.sample(MOMENT)
    timeline.flush()
    text = (tmp_path / "timeline.json").read_text()
    events = json.loads(text.rstrip(",\n") + "]")
    spans = [(e["name"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [("a turn", 2e6)] + 2 * [("the answer of process learner to TrainStep", 3e6)]
    rows = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert "process learner" in rows
    counters = [(e["pid"], e["args"]) for e in events if e["name"] == "memory (MB)"]
    assert counters == [(1, {"controller": 100.0, "engine": 800.0}), (2, {"controller": 100.0, "engine": 800.0})]
    assert {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"} == {1: "life 1", 2: "life 2"}


def test_a_timeline_ends_at_its_size_and_says_so(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json", 1)
    for number in range(20_000):
        timeline.sample(MOMENT)
        if number % 1000 == 0:
            timeline.flush()
    timeline.flush()
    data = (tmp_path / "timeline.json").read_bytes()
    assert 1 << 20 < len(data) < (1 << 20) + 1000
    assert b"the timeline is full" in data


@pytest.mark.parametrize(
    ("value", "name", "unit", "attributes"),
    [
        ("engine_memory_mb", "process.memory.usage", "By", {"ale.component": "engine"}),
        (
            "learner_descriptors",
            "process.open_file_descriptor.count",
            "{file_descriptor}",
            {"ale.component": "learner"},
        ),
        ("action_tokens", "gen_ai.client.token.usage", "{token}", {"gen_ai.token.type": "output"}),
        ("something_new", "ale.something_new", "1", {}),
    ],
)
def test_numbers_have_names_by_the_conventions(value: str, name: str, unit: str, attributes: dict[str, str]) -> None:
    found = instrument(value)
    assert (found.name, found.unit, found.attributes) == (name, unit, attributes)


def test_prometheus_reads_the_last_numbers_on_loopback() -> None:
    pytest.importorskip("prometheus_client", reason="the extra `prometheus` is not installed")
    page = Page("mine")
    page.show({"engine_memory_mb": 2.0, "learner_memory_mb": 1.0, "engine_bubble": 0.25, "ledger/started": 8.0})
    with (
        prometheus(page, 0) as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer,
    ):
        text = answer.read().decode()
    assert 'process_memory_usage_bytes{ale_component="engine",ale_run="mine"} 2.097152e+06' in text
    assert 'ale_component_bubble{ale_component="engine",ale_run="mine"} 0.25' in text
    assert "ale_ledger_started" in text
