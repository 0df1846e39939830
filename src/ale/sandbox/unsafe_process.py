"""The backend by explicit choice only: plain processes of this user in a private copy of the workspace. NO ISOLATION.

What a command can do here, you can do: read your files, use your network, kill your processes. It exists for machines
that forbid namespaces, where every command is trusted. Copies stand under a private root, which commands find in
`$ALE_ROOT` (empty in an isolating backend): `"$ALE_ROOT/tests/test.sh"` is right in both. Limits other than output and
time are resource limits of single processes. A process that leaves its session on purpose can outlive its sandbox's
time-outs, though not its close, unless it also drops its environment.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from ale.errors import DeadlineExceeded, SandboxError
from ale.sandbox.capture import Capture
from ale.sandbox.cgroup import Cgroups
from ale.sandbox.enforcement import Enforcement
from ale.sandbox.foundation import Foundation, LocalSnapshot
from ale.sandbox.launcher import remove_tree
from ale.sandbox.layers import LayerStore, copy_tree
from ale.sandbox.one_shot import become, open_stdin
from ale.sandbox.port import (
    MAX_FILE_BYTES,
    Command,
    Completed,
    EngineStatistics,
    SandboxSpec,
    SandboxStatistics,
    environment,
)
from ale.sandbox.rocklet import read_file, write_file
from ale.sandbox.shielded import shielded

_logger = logging.getLogger(__name__)
