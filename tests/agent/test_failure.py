from __future__ import annotations

import pytest

from ale.agent.failure import FAILURES, failure_of
from ale.errors import (
    DeadlineExceeded,
    EvaluatorError,
    PolicyError,
    SandboxBusy,
    SandboxError,
    SandboxStopped,
    WorkerDied,
)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SandboxStopped("miner: xmrig"), "stopped_by_alarm"),
        (SandboxError("gone"), "sandbox_failure"),
        (SandboxBusy("full"), "sandbox_failure"),
        (PolicyError("no memory"), "policy_failure"),
        (WorkerDied("signal 9"), "policy_failure"),
        (EvaluatorError("exit 3"), "evaluator_error"),
        (DeadlineExceeded("a turn", 5), "episode_timeout"),
    ],
)
def test_an_error_has_one_status_whatever_the_agent(error: Exception, status: str) -> None:
    assert isinstance(error, FAILURES)
    assert failure_of(error, 9) == (status, str(error))


def test_a_time_out_without_words_says_how_long_there_was() -> None:
    assert failure_of(TimeoutError(), 1.5) == ("episode_timeout", "longer than 1.5 s")


def test_a_mistake_of_ours_is_no_status() -> None:
    with pytest.raises(KeyError):
        failure_of(KeyError("tokens"), 9)
