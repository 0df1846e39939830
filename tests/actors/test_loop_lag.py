"""How late the event loop is: a quantile of the last samples."""

from __future__ import annotations

import pytest

from ale.actors.loop_lag import LoopLag


def test_the_quantile_is_that_of_the_last_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ale.actors.loop_lag._KEEP", 100)
    lag = LoopLag()
    assert lag.quantile_ms(0.5) == 0.0
    for number in range(51):
        lag._keep(number / 1000)
    assert lag.quantile_ms(0.5) == pytest.approx(25.0)
    for number in range(249):
        lag._keep((number + 51) / 1000)
    assert lag.quantile_ms(0.0) == pytest.approx(200.0)
    assert lag.quantile_ms(1.0) == pytest.approx(299.0)
