"""A learner's rank other than the first: `python -m ale.learner.rank_process FD PARENT`.

Does what rank 0 does and answers nothing: what comes of an update is the same on all of them, and rank 0 tells it.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress

import torch

from ale.errors import LearnerError
from ale.learner.crew import end_with
from ale.learner.learner_process import REQUESTS, carry_out, join
from ale.learner.opening import open_sharded
from ale.messages import OpenRank
from ale.process import Requests


def main(fd: int, parent: int) -> None:
    requests = Requests(fd, (OpenRank, *REQUESTS))
    if os.getppid() != parent:  # it died before its death would end this process
        return
    with suppress(EOFError):  # rank 0 has ended
        ((_, opening),) = requests.take(block=True)
        try:
            torch.set_num_threads(opening.settings.threads)
            learner = open_sharded(opening.settings, join(opening.settings, opening.rank, opening.store), None)
            while True:
                # No deadline: the next request comes when there is a batch, or never.
                for _, request in requests.take(block=True):
                    with suppress(LearnerError):  # raised on all ranks; rank 0 answers with it
                        carry_out(learner, request)
        except EOFError:
            raise
        except Exception:
            end_with(f"rank {opening.rank} of the learner: {traceback.format_exc()}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
