import asyncio
import socket
import time

import pytest

from ale.testing.clock import Deadlock, run


def test_time_jumps_instead_of_passing():
    async def scenario():
        loop = asyncio.get_running_loop()
        order = []
        loop.call_later(7200, order.append, "two hours")
        loop.call_later(3600, order.append, "one hour")
        await asyncio.sleep(10_000)
        assert loop.time() == pytest.approx(10_000)
        return order

    begin = time.monotonic()
    assert run(scenario()) == ["one hour", "two hours"]
    assert time.monotonic() - begin < 60


def test_a_scenario_in_which_every_task_waits_for_ever_is_a_deadlock_that_names_them():
    async def wait_for_ever():
        await asyncio.Event().wait()

    async def scenario():
        waiting = asyncio.create_task(wait_for_ever(), name="the culprit")
        await waiting

    with pytest.raises(Deadlock, match=r"every task waits: .*the culprit"):
        run(scenario())


def test_time_stands_still_while_a_socket_is_ready():
    async def scenario():
        loop = asyncio.get_running_loop()
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            there.send(b"x")
            loop.call_later(1, here.close)
            assert await loop.sock_recv(here, 1) == b"x"
            assert loop.time() == 0

    run(scenario())
