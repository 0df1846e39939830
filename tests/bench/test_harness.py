import importlib.util
import json
from itertools import cycle
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "bench" / "harness.py"
spec = importlib.util.spec_from_file_location("harness", PATH)
harness = importlib.util.module_from_spec(spec)
spec.loader.exec_module(harness)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    return tmp_path


def test_a_wrong_result_is_not_timed_and_nothing_is_written(results, capsys):
    timed = []
    with pytest.raises(SystemExit) as exit_, harness.benchmark("sums") as bench:
        bench.check("one and one is three", lambda: 1 + 1 == 3)
        bench.rate("sum", ours=lambda: timed.append(1) or 1.0, baseline=None, against=None, unit="sums/s")
    assert exit_.value.code == 1
    assert "it does not hold that one and one is three" in capsys.readouterr().err
    assert timed == []
    assert list(results.iterdir()) == []


def test_a_check_after_a_timing_is_refused(results):
    with pytest.raises(RuntimeError, match="check first"), harness.benchmark("sums") as bench:
        bench.rate("sum", ours=lambda: 1.0, baseline=None, against=None, unit="sums/s")
        bench.check("one is one", lambda: True)


def test_a_ratio_above_one_means_better_for_rates_and_for_latencies(results):
    with harness.benchmark("speed", pairs=3) as bench:
        rate = bench.rate("rate", ours=lambda: 30.0, baseline=lambda: 10.0, against="slow", unit="1/s")
        latency = bench.latency("wait", ours=lambda: 2.0, baseline=lambda: 10.0, against="slow", unit="ms")
    assert (rate.ratio, latency.ratio) == (3.0, 5.0)


def test_figures_come_in_pairs_of_alternating_order_after_one_unrecorded_pair(results):
    calls = []
    ours, theirs = cycle([99.0, 1.0, 2.0, 3.0]), cycle([1.0, 1.0, 1.0, 1.0])
    with harness.benchmark("pairs", pairs=3) as bench:
        row = bench.rate(
            "pairs",
            ours=lambda: calls.append("ours") or next(ours),
            baseline=lambda: calls.append("base") or next(theirs),
            against="base",
            unit="1/s",
        )
    assert calls == ["ours", "base", "base", "ours", "ours", "base", "base", "ours"]
    assert (row.value, row.ratio, row.spread) == (2.0, 2.0, (1.0, 3.0))


def test_the_file_is_a_list_of_rows_with_the_agreed_fields(results):
    with harness.benchmark("speed", pairs=1) as bench:
        bench.rate("alone", ours=lambda: 3.0, baseline=None, against=None, unit="1/s")
    (row,) = json.loads((results / "speed.json").read_text())
    assert list(row) == [
        "name", "value", "unit", "baseline", "baseline_value", "ratio", "spread", "commit", "machine"
    ]  # fmt: skip
    assert (row["value"], row["baseline"], row["ratio"], row["spread"]) == (3.0, None, None, [3.0, 3.0])


def test_a_baseline_needs_its_name(results):
    with pytest.raises(ValueError, match="both `baseline` and its name"), harness.benchmark("speed") as bench:
        bench.rate("odd", ours=lambda: 1.0, baseline=lambda: 1.0, against=None, unit="1/s")
