"""Every error `ale` raises, named after the boundary that was crossed.

    AleError
    ├── UserError            the user can mend it: the command line prints it as one paragraph, exit code 2
    │   ├── ConfigError          a field of a configuration file is unknown, of the wrong type or contradicts another
    │   ├── TaskFormatError      a task directory misses a file or holds an invalid one
    │   ├── ModelError           a model path is missing, incomplete or does not fit its tokenizer
    │   ├── RunFolderError       a run folder is missing, in use, full, damaged, or that of another configuration
    │   ├── SandboxUnavailable   this machine cannot isolate processes the way the configuration asks
    │   └── HubError             the hub has no such name, or cannot take in what it was given
    ├── Interrupted          the run ended because it was asked to; its folder can be resumed
    ├── Stalled              nothing was finished for too long; the message says why
    ├── DeadlineExceeded     a wait ran into its deadline; the message names the wait
    ├── ActorError           an actor crashed, or was asked after its end
    │   ├── ActorStopped         nobody will answer: the actor has ended
    │   ├── MailboxClosed        the last publisher has gone and the mailbox is drained
    │   └── RestartBudgetSpent   the supervisor gave up on an actor; `__cause__` is its last error
    ├── SandboxError         the sandbox, not the command inside it, failed
    │   ├── SandboxStopped       an alarm ended it: what its commands did is not allowed
    │   └── SandboxBusy          the pool admits no more now: come back later, or with less
    ├── PolicyError          the engine that generates tokens failed
    ├── EvaluatorError       the tests of a task crashed or timed out: no reward can be trusted
    ├── LearnerError         the learner failed
    └── WorkerDied           a worker process ended without being told to

A failed rollout is data with its cause (`Trajectory.status`), not an exception.
"""

from __future__ import annotations


class AleError(Exception):
    """Base of every error raised by `ale`."""


class UserError(AleError):
    """Something the user can mend; the message names the field, the file and the cure."""


class ConfigError(UserError):
    pass


class TaskFormatError(UserError):
    pass


class ModelError(UserError):
    pass


class RunFolderError(UserError):
    @classmethod
    def cannot_write(cls, path: object, cause: object) -> RunFolderError:
        """The disk is full, or the like: what was written before is whole."""
        return cls(
            f"{path} cannot be written: {cause}. The run has ended there, and nothing that had finished is lost: make "
            "room, then resume it with --resume."
        )


class SandboxUnavailable(UserError):
    pass


class HubError(UserError):
    pass


class Interrupted(AleError):
    pass


class DeadlineExceeded(AleError):
    """A wait ran into its deadline. `wait` is its name, `deadline_s` how long was allowed."""

    def __init__(self, wait: str, deadline_s: float) -> None:
        super().__init__(f"{wait}: no answer within {deadline_s:g} s")
        self.wait = wait
        self.deadline_s = deadline_s


class Stalled(AleError):
    """The watchdog has ended a run that stood still. `report` is what `ale why` says of it."""

    def __init__(self, said: str, report: str) -> None:
        super().__init__(said)
        self.report = report


class ActorError(AleError):
    pass


class ActorStopped(ActorError):
    pass


class MailboxClosed(ActorError):
    pass


class RestartBudgetSpent(ActorError):
    pass


class SandboxError(AleError):
    pass


class SandboxStopped(SandboxError):
    pass


class SandboxBusy(SandboxError):
    pass


class PolicyError(AleError):
    pass


class EvaluatorError(AleError):
    pass


class LearnerError(AleError):
    pass


class WorkerDied(AleError):
    pass


def first_error(errors: ExceptionGroup) -> Exception:
    """What failed first in a task group, or in one inside it: the others were cancelled because of it."""
    error: Exception = errors
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
