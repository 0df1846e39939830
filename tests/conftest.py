"""Small models, made once. Torch is imported by the tests that ask for one, not by this file."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest

from ale.sandbox import SandboxEngine, open_engine

# Before torch is imported. Tensors here are tiny, and two workers with two threads each wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CORPUS = [
    "Copy oak.txt to fox.txt.",
    "cp oak.txt fox.txt",
    "sed -i s/^owl=.*/owl=bee/ elm.cfg",
    "grep -c ant ash.log",
] * 4


# The longest first, so that two workers end at about the same time; what runs long by itself is at home in `full`.
LONGEST = (
    *("test_learning.py", "test_chunk_advantage_kernel.py", "test_resume.py", "test_under_the_interpreter.py"),
    *("test_ranks.py", "test_embedding.py", "test_ahead_of_time.py"),
    *("test_chaos.py", "test_training.py", "test_docker_faults.py", "test_random_faults.py"),  # of `just test-full`
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What was imported until now lives as long as the process: no collection needs to look at it again."""
    gc.freeze()


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.Runner]:
    """A real event loop that holds what tests share: `loop.run(coroutine)`."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def shared_sandboxes(loop: asyncio.Runner) -> Iterator[SandboxEngine]:
    manager = open_engine("local")

    async def enter() -> SandboxEngine:
        return await manager.__aenter__()

    async def leave() -> None:
        await manager.__aexit__(None, None, None)

    engine = loop.run(enter())
    yield engine
    loop.run(leave())


@pytest.fixture
def sandboxes(shared_sandboxes: SandboxEngine) -> Iterator[SandboxEngine]:
    """The local engine. Whatever a test starts in it has to be gone when it ends."""
    yield shared_sandboxes
    assert shared_sandboxes.statistics().alive == 0
    assert shared_sandboxes.statistics().layers == 0
    assert list(shared_sandboxes.scratch.iterdir()) == []


Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def serve() -> Serve:
    """`with serve({"tenant": token}, ...) as url`: a real service, in a thread with a loop and engine of its own.

    Nothing may be left in its engine at the end. Keywords go to `open_service`.
    """
    from ale.service.server import open_service

    @contextmanager
    def serve(tokens: dict[str, str], **settings: Any) -> Iterator[str]:
        urls: Queue[str | BaseException] = Queue()
        stop = asyncio.Event()
        loops: list[asyncio.AbstractEventLoop] = []

        async def run() -> None:
            loops.append(asyncio.get_running_loop())
            async with open_engine("local") as engine:
                async with open_service(engine, tokens, **settings) as service:
                    urls.put(service.url)
                    await stop.wait()
                assert engine.statistics().alive == 0

        def main() -> None:
            try:
                asyncio.run(run())
            except BaseException as error:
                failed.append(error)
                urls.put(error)

        failed: list[BaseException] = []
        thread = Thread(target=main, name="the service under test")
        thread.start()
        try:
            url = urls.get(timeout=120)
            if isinstance(url, BaseException):
                raise url
            yield url
        finally:
            if loops and loops[0].is_running():
                loops[0].call_soon_threadsafe(stop.set)
            thread.join(120)
        assert not failed, failed

    return serve


@pytest.fixture(scope="session")
def nano_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a nano model: 2 layers, 8 experts, top-2, width 64, tied head."""
    import torch

    from ale.models.nano import save_nano

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("nano")
    save_nano(path, CORPUS, seed=0, hidden_size=64, vocab_size=384)
    return path


@pytest.fixture
def nano(nano_path: Path) -> Any:
    """That model, loaded afresh: a test may change its weights."""
    from ale.models.load import load_model

    return load_model(nano_path)


@pytest.fixture
def nano_tokenizer(nano_path: Path) -> Any:
    from ale.models.load import load_tokenizer

    return load_tokenizer(nano_path)
