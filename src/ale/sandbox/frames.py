"""Reading the rocklet's frames on the host, where every byte is hostile: bounded, and malformed means broken."""

from __future__ import annotations

from typing import NamedTuple

from ale.errors import SandboxError
from ale.sandbox.port import MAX_FILE_BYTES, MAX_OUTPUT_BYTES, Completed, FileInfo, FileKind, Usage
from ale.sandbox.rocklet.files import MAX_LISTED_BYTES
from ale.sandbox.rocklet.wire import (
    CREDIT,
    DATA,
    DONE,
    END,
    FAILED,
    HEADER_BYTES,
    INCOMING,
    LISTED,
    MAX_SESSION_BYTES,
    OK,
    OPENED,
    PIECE,
    READY,
    RESET,
    unpack,
)

# The largest honest frame is a file or two full streams and a session; the rest is headers and a reason.
MAX_FRAME_BYTES = max(MAX_FILE_BYTES, 2 * MAX_OUTPUT_BYTES + MAX_SESSION_BYTES, MAX_LISTED_BYTES) + 4096
# How many fields a kind has; None: any number.
_FIELDS: dict[int, int | None] = {
    READY: 1,
    DONE: 4,
    DATA: 1,
    OK: 0,
    FAILED: 2,
    LISTED: None,
    OPENED: 0,
    INCOMING: 1,
    PIECE: 1,
    CREDIT: 1,
    END: 1,
    RESET: 0,
}
_MAX_DIGITS = 20
_FIGURES = 8  # of a command that ended
_MAX_EXIT, _MAX_SIGNAL = 255, 64
_MAX_ERRNO = 4095  # the kernel's own bound
_MAX_REASON = 2000
_KINDS: dict[bytes, FileKind] = {b"f": "file", b"d": "directory", b"l": "link", b"o": "other"}


class Frame(NamedTuple):
    kind: int
    number: int
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
        if _FIELDS[frame.kind] not in (None, len(frame.fields)):
            raise SandboxError(f"malformed frame: kind {frame.kind} with {len(frame.fields)} fields")
        return frame


def number(field: bytes, low: int, high: int) -> int:
    """A decimal field within bounds, or SandboxError."""
    digits = field.removeprefix(b"-")
    if len(digits) <= _MAX_DIGITS and digits.isdigit() and low <= (value := int(field)) <= high:
        return value
    raise SandboxError(f"malformed frame: {field[:_MAX_DIGITS]!r} is no number in {low}..{high}")


def status(field: bytes) -> int:
    """An exit code, or minus a signal."""
    return number(field, -_MAX_SIGNAL, _MAX_EXIT)


def completed(frame: Frame, output_bytes: int) -> Completed:
    """A DONE frame as a `Completed`, its streams no longer than was asked for. The session is the last field."""
    figures, out, err, session = frame.fields
    parts = figures.split(b" ", _FIGURES)
    if len(parts) != _FIGURES:
        raise SandboxError(f"malformed frame: {len(parts)} figures of a command where {_FIGURES} belong")
    ended, timed_out, took_us, out_dropped, err_dropped, user_us, system_us, peak_kb = parts
    if len(out) > output_bytes or len(err) > output_bytes:
        raise SandboxError(f"malformed frame: more than {output_bytes} bytes of output")
    if len(session) > MAX_SESSION_BYTES:
        raise SandboxError(f"malformed frame: more than {MAX_SESSION_BYTES} bytes of session")
    code = status(ended)
    return Completed(
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        stdout=out,
        stderr=err,
        stdout_dropped=number(out_dropped, 0, 2**63),
        stderr_dropped=number(err_dropped, 0, 2**63),
        timed_out=bool(number(timed_out, 0, 1)),
        duration_s=number(took_us, 0, 2**63) / 1e6,
        usage=Usage(
            user_s=number(user_us, 0, 2**63) / 1e6,
            system_s=number(system_us, 0, 2**63) / 1e6,
            peak_memory_bytes=number(peak_kb, 0, 2**53) * 1024,
        ),
    )


def os_error(frame: Frame, path: str | None) -> OSError:
    """A FAILED frame as the error that the system call inside had."""
    code, reason = frame.fields
    return OSError(number(code, 1, _MAX_ERRNO), reason[:_MAX_REASON].decode("utf-8", "replace"), path)


def file_info(field: bytes) -> FileInfo:
    """An entry of a LISTED frame."""
    parts = field.split(b" ", 4)
    if len(parts) != 5 or parts[0] not in _KINDS or not parts[4] or b"\0" in parts[4]:
        raise SandboxError(f"malformed frame: {field[:_MAX_DIGITS]!r} is no directory entry")
    return FileInfo(
        name=parts[4].decode("utf-8", "surrogateescape"),
        kind=_KINDS[parts[0]],
        mode=number(parts[1], 0, 0o7777),
        size=number(parts[2], 0, 2**63),
        mtime_s=number(parts[3], -(2**63), 2**63) / 1e9,
    )
