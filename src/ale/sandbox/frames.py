"""Reading the rocklet's frames on the host, where every byte is hostile: bounded, and malformed means broken."""

from __future__ import annotations

from typing import NamedTuple

from ale.errors import SandboxError
from ale.sandbox.port import MAX_FILE_BYTES, MAX_OUTPUT_BYTES, Completed
from ale.sandbox.rocklet import DATA, DONE, FAILED, HEADER_BYTES, READY, WROTE, unpack

# The largest honest frame is a file or two full streams; the rest is headers and a reason.
MAX_FRAME_BYTES = max(MAX_FILE_BYTES, 2 * MAX_OUTPUT_BYTES) + 4096
_FIELDS = {READY: 0, DONE: 7, DATA: 1, WROTE: 0, FAILED: 2}
_MAX_DIGITS = 20
_MAX_EXIT, _MAX_SIGNAL = 255, 64


class Frame(NamedTuple):
    kind: int
    request: int
    fields: list[bytes]


class Decoder:
    """Bytes in, frames out. Raises SandboxError at the first byte that cannot belong to an honest stream."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max = max_frame_bytes

    def feed(self, data: bytes) -> list[Frame]:
        self._buffer += data
        frames: list[Frame] = []
        at = 0
        while len(self._buffer) - at >= 4:
            size = int.from_bytes(self._buffer[at : at + 4], "little")
            if not HEADER_BYTES <= size <= self._max:
                raise SandboxError(f"malformed frame: length {size} outside {HEADER_BYTES}..{self._max}")
            if len(self._buffer) - at < 4 + size:
                break
            frames.append(self._frame(bytes(self._buffer[at + 4 : at + 4 + size])))
            at += 4 + size
        del self._buffer[:at]
        return frames

    @staticmethod
    def _frame(body: bytes) -> Frame:
        if body[0] not in _FIELDS:
            raise SandboxError(f"malformed frame: unknown kind {body[0]}")
        try:
            frame = Frame(*unpack(body))
        except ValueError as error:
            raise SandboxError(f"malformed frame: {error}") from error
        if len(frame.fields) != _FIELDS[frame.kind]:
            raise SandboxError(f"malformed frame: kind {frame.kind} with {len(frame.fields)} fields")
        return frame


def number(field: bytes, low: int, high: int) -> int:
    """A decimal field within bounds, or SandboxError."""
    digits = field.removeprefix(b"-")
    if len(digits) <= _MAX_DIGITS and digits.isdigit() and low <= (value := int(field)) <= high:
        return value
    raise SandboxError(f"malformed frame: {field[:_MAX_DIGITS]!r} is no number in {low}..{high}")


def completed(frame: Frame, output_bytes: int) -> Completed:
    """A DONE frame as a `Completed`, its streams no longer than was asked for."""
    status, timed_out, took_us, out, out_dropped, err, err_dropped = frame.fields
    if len(out) > output_bytes or len(err) > output_bytes:
        raise SandboxError(f"malformed frame: more than {output_bytes} bytes of output")
    code = number(status, -_MAX_SIGNAL, _MAX_EXIT)
    return Completed(
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        stdout=out,
        stderr=err,
        stdout_dropped=number(out_dropped, 0, 2**63),
        stderr_dropped=number(err_dropped, 0, 2**63),
        timed_out=bool(number(timed_out, 0, 1)),
        duration_s=number(took_us, 0, 2**63) / 1e6,
    )
