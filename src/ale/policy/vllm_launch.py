"""The vLLM server as a child of ours: `python -m ale.policy.vllm_launch ARGUMENTS`. It ends with whoever started it."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from importlib.util import find_spec

PARENT = "ALE_SERVER_PARENT"
"""Set by who starts the server: its process id."""
_ENTRIES = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """SIGKILL of the parent must leave no server behind. Nothing in a server that somebody else started."""
    if PARENT in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    if os.getppid() != int(os.environ[PARENT]):
        sys.exit("whoever started this server has gone")
    if find_spec("vllm") is None:
        sys.exit(f"vllm is not installed for {sys.executable}")
    entry = next(name for name in _ENTRIES if _there(name))
    runpy.run_module(entry, run_name="__main__", alter_sys=True)


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package on the way to it
        return False


if __name__ == "__main__":
    main()
