import asyncio

import pytest

from ale.errors import ActorStopped, DeadlineExceeded
from ale.mailbox import Envelope, Mailbox
from ale.testing.clock import run
from ale.wire import Message


class Item(Message, frozen=True):
    number: int


def item(number: int) -> Envelope:
    return Envelope(Item(number=number), 0.0)


def numbers(mailbox: Mailbox) -> list[int]:
    return [envelope.message.number for envelope in mailbox.items]


async def send(mailbox: Mailbox, number: int, deadline: float = 1e9) -> None:
    envelope = item(number)
    if not mailbox.offer(envelope):
        await mailbox.reserve(0.0, deadline)
        mailbox.put(envelope)


async def settle() -> None:
    """Lets every task that can run do so, a few times over."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_mailbox_needs_a_capacity_of_at_least_one():
    async def scenario():
        with pytest.raises(ValueError, match="the attic needs a capacity of at least 1, not 0"):
            Mailbox("the attic", 0)

    run(scenario())


def test_a_full_mailbox_holds_the_sender_until_there_is_room():
    async def scenario():
        mailbox = Mailbox("the attic", 2)
        for number in (1, 2):
            await send(mailbox, number)
        held = asyncio.create_task(send(mailbox, 3))
        await settle()
        assert not held.done()
        assert numbers(mailbox) == [1, 2]
        assert mailbox.take().message.number == 1
        await held
        assert numbers(mailbox) == [2, 3]
        assert mailbox.high_water == 2

    run(scenario())


def test_held_senders_are_served_in_order_and_nobody_overtakes_them():
    async def scenario():
        mailbox = Mailbox("the attic", 1)
        await send(mailbox, 0)
        held = [asyncio.create_task(send(mailbox, number)) for number in (1, 2, 3)]
        await settle()
        mailbox.take()
        assert not mailbox.offer(item(99)), "the slot is promised to the first in line"
        seen = []
        for _ in held:
            await settle()
            seen.append(mailbox.take().message.number)
        assert seen == [1, 2, 3]

    run(scenario())


def test_a_cancelled_sender_has_not_sent_and_leaves_nothing():
    async def scenario():
        mailbox = Mailbox("the attic", 1)
        await send(mailbox, 0)
        held = asyncio.create_task(send(mailbox, 1))
        await settle()
        held.cancel()
        await asyncio.wait([held])
        assert numbers(mailbox) == [0]
        assert not mailbox.held
        mailbox.take()
        assert mailbox.offer(item(2))

    run(scenario())


def test_a_slot_handed_to_a_sender_in_the_moment_of_its_cancellation_goes_to_the_next():
    async def scenario():
        mailbox = Mailbox("the attic", 1)
        await send(mailbox, 0)
        first, second = (asyncio.create_task(send(mailbox, number)) for number in (1, 2))
        await settle()
        mailbox.take()  # promises the slot to the first, which has not run yet
        first.cancel()
        await asyncio.wait([first, second])
        assert first.cancelled()
        assert numbers(mailbox) == [2]
        assert mailbox.room == mailbox.capacity

    run(scenario())


def test_a_slot_handed_to_the_only_sender_in_the_moment_of_its_cancellation_is_free_again():
    async def scenario():
        mailbox = Mailbox("the attic", 1)
        await send(mailbox, 0)
        only = asyncio.create_task(send(mailbox, 1))
        await settle()
        mailbox.take()
        only.cancel()
        await asyncio.wait([only])
        assert mailbox.offer(item(2))
        assert numbers(mailbox) == [2]

    run(scenario())


def test_a_sender_cancelled_after_it_was_passed_over_leaves_quietly():
    async def scenario():
        mailbox = Mailbox("the attic", 1)
        await send(mailbox, 0)
        held = asyncio.create_task(send(mailbox, 1))
        await settle()
        held.cancel()  # has not run yet, so it still stands in line
        mailbox.take()  # passes over it
        await asyncio.wait([held])
        assert held.cancelled()
        assert mailbox.offer(item(2))

    run(scenario())


def test_a_reader_cancelled_in_the_moment_it_is_woken_wakes_the_next():
    async def scenario():
        mailbox = Mailbox("the attic", 4)
        seen = []

        async def read():
            while not mailbox.items:
                await mailbox.wait(0.0)
            seen.append(mailbox.take().message.number)

        first, second = (asyncio.create_task(read()) for _ in range(2))
        await settle()
        await send(mailbox, 1)
        first.cancel()
        await asyncio.wait([first, second], timeout=1)
        assert first.cancelled()
        assert seen == [1]

    run(scenario())


def test_a_deadline_that_passes_fails_the_waiter_by_name():
    async def scenario():
        mailbox = Mailbox("the attic", 1)
        await send(mailbox, 0)
        held = asyncio.create_task(send(mailbox, 1, deadline=5.0), name="mover")
        await settle()
        assert mailbox.expire(4.0) == 5.0
        mailbox.expire(5.0)
        with pytest.raises(DeadlineExceeded, match="mover waits for room in the attic: no answer within 5 s"):
            await held
        assert not mailbox.held

    run(scenario())


def test_closing_refuses_new_senders_and_those_that_wait_but_keeps_what_is_inside():
    async def scenario():
        mailbox = Mailbox("the attic", 1)
        await send(mailbox, 0)
        held = asyncio.create_task(send(mailbox, 1))
        await settle()
        mailbox.close()
        with pytest.raises(ActorStopped, match="the attic is closed"):
            await held
        with pytest.raises(ActorStopped, match="the attic is closed"):
            await send(mailbox, 2)
        assert mailbox.take().message.number == 0
        assert not mailbox.offer(item(3)), "taking from a closed mailbox makes no room"

    run(scenario())


def test_a_slot_promised_before_the_close_is_refused_after_it():
    async def scenario():
        mailbox = Mailbox("the attic", 1)
        await send(mailbox, 0)
        held = asyncio.create_task(send(mailbox, 1))
        await settle()
        mailbox.take()
        mailbox.close()
        with pytest.raises(ActorStopped, match="closed"):
            await held
        assert not mailbox.items

    run(scenario())
