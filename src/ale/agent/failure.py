"""Why an episode must not be trained on, from the error that ended it: the same for every kind of agent."""

from __future__ import annotations

from ale.errors import DeadlineExceeded, EvaluatorError, PolicyError, SandboxError, SandboxStopped, WorkerDied
from ale.messages import Status

FAILURES = (SandboxError, PolicyError, WorkerDied, EvaluatorError, TimeoutError, DeadlineExceeded)
"""What an episode may end with. Anything else is a mistake of ours, and is raised."""


def failure_of(error: Exception, allowed_s: float) -> tuple[Status, str]:
    """Status and cause of an episode that `error`, one of `FAILURES`, ended; it may take `allowed_s`."""
    match error:
        case SandboxStopped():  # before SandboxError: what the agent did, not what the sandbox failed at
            return "stopped_by_alarm", str(error)
        case SandboxError():
            return "sandbox_failure", str(error)
        case PolicyError() | WorkerDied():
            return "policy_failure", str(error)
        case EvaluatorError():
            return "evaluator_error", str(error)
        case TimeoutError() | DeadlineExceeded():
            return "episode_timeout", str(error) or f"longer than {allowed_s:g} s"
    raise error
