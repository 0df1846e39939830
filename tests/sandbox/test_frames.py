"""The host's reading of the rocklet's frames: whatever comes, it decodes or says that the sandbox is broken."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ale.errors import SandboxError
from ale.sandbox import Usage
from ale.sandbox.frames import MAX_FRAME_BYTES, Decoder, Frame, completed
from ale.sandbox.rocklet.wire import DATA, DONE, FAILED, OK, READY, pack, unpack

HONEST = [
    pack(READY, 0, 0),
    pack(DONE, 1, b"0 0 1234 0 7 10 20 30", b"out", b"err", b""),
    pack(DATA, 2, b"\0" * 300),
    pack(OK, 2**32 - 1),
    pack(FAILED, 3, 2, b"No such file or directory"),
]


@given(st.lists(st.sampled_from(HONEST), max_size=6), st.lists(st.integers(1, 40), min_size=1))
def test_frames_survive_any_cutting_of_the_stream(frames: list[bytes], cuts: list[int]) -> None:
    stream, decoder, seen, at = b"".join(frames), Decoder(), [], 0
    for step in range(len(stream)):
        cut = cuts[step % len(cuts)]
        seen += decoder.feed(stream[at : at + cut])
        at += cut
    assert [pack(*frame[:2], *frame[2]) for frame in seen] == frames


@settings(max_examples=500)
@given(st.lists(st.binary(max_size=64), max_size=8))
def test_arbitrary_bytes_are_decoded_or_refused(chunks: list[bytes]) -> None:
    decoder = Decoder(max_frame_bytes=128)
    with suppress(SandboxError):
        for chunk in chunks:
            for frame in decoder.feed(chunk):
                assert len(frame.fields) <= 128 // 4


@settings(max_examples=500)
@given(st.sampled_from(HONEST), st.data())
def test_a_frame_with_any_byte_changed_is_decoded_or_refused(frame: bytes, data: st.DataObject) -> None:
    changed = bytearray(frame)
    changed[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with suppress(SandboxError):
        for decoded in Decoder().feed(bytes(changed)):
            if decoded.kind == DONE:
                completed(decoded, output_bytes=1000)


@pytest.mark.parametrize("size", [0, 4, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_before_anything_is_stored(size: int) -> None:
    with pytest.raises(SandboxError, match=f"length {size}"):
        Decoder().feed(size.to_bytes(4, "little"))


def test_a_field_that_reaches_past_its_frame_is_refused() -> None:
    body = bytes([DATA, 1, 0, 0, 0]) + (100).to_bytes(4, "little") + b"short"
    with pytest.raises(ValueError, match="past the end"):
        unpack(body)
    with pytest.raises(SandboxError, match="past the end"):
        Decoder().feed(len(body).to_bytes(4, "little") + body)


def test_a_request_is_no_answer() -> None:
    with pytest.raises(SandboxError, match="unknown kind 1"):
        Decoder().feed(pack(1, 1, b"x"))


@pytest.mark.parametrize(
    ("figures", "streams"),
    [
        (b"256 0 1 0 0 0 0 0", (b"", b"")),
        (b"-65 0 1 0 0 0 0 0", (b"", b"")),
        (b" 0 1 0 0 0 0 0", (b"", b"")),
        (b"9" * 5000 + b" 0 1 0 0 0 0 0", (b"", b"")),
        (b"\xb2 0 1 0 0 0 0 0", (b"", b"")),
        (b"0 2 1 0 0 0 0 0", (b"", b"")),
        (b"0 0 -1 0 0 0 0 0", (b"", b"")),
        (b"0 0 1 -1 0 0 0 0", (b"", b"")),
        (b"0 0 1 0 -1 0 0 0", (b"", b"")),
        (b"0 0 1 0 0 0 0", (b"", b"")),
        (b"0 0 1 0 0 0 0 0 0", (b"", b"")),
        (b"0 0 1 0 0 0 0 0 " + b"1 " * 100_000, (b"", b"")),
        (b"", (b"", b"")),
        (b"0 0 1 0 0 0 0 0", (b"x" * 11, b"")),
        (b"0 0 1 0 0 0 0 0", (b"", b"x" * 11)),
    ],
)
def test_a_result_out_of_bounds_is_refused(figures: bytes, streams: tuple[bytes, bytes]) -> None:
    (frame,) = Decoder().feed(pack(DONE, 1, figures, *streams, b""))
    with pytest.raises(SandboxError, match="malformed frame"):
        completed(frame, output_bytes=10)


def test_a_result_is_read_as_it_was_sent() -> None:
    frame = Frame(*unpack(pack(DONE, 1, b"-9 1 1500000 3 0 2000000 500000 7", b"out", b"err", b"")[4:]))
    done = completed(frame, output_bytes=10)
    assert (done.exit_code, done.signal, done.timed_out, done.duration_s) == (None, 9, True, 1.5)
    assert (done.stdout, done.stdout_dropped, done.stderr, done.stderr_dropped) == (b"out", 3, b"err", 0)
    assert done.usage == Usage(user_s=2.0, system_s=0.5, peak_memory_bytes=7 * 1024)
