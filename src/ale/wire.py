"""What a message is: plain, frozen, typed data that survives a round trip through msgpack.

`Message` is told, `Request[Reply]` is asked and answered with a `Reply`. Arrays travel as `Array`: bytes, dtype and
shape, so that encoding is a copy of memory and no framework's tensor ever sits on the bus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args, get_origin

import msgspec

if TYPE_CHECKING:
    import numpy.typing as npt

Reply = TypeVar("Reply")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that is told."""


class Request(Message, Generic[Reply], frozen=True, kw_only=True):
    """Base of everything that is asked: `class Grade(Request[Score])` is answered with a `Score`."""


class Array(msgspec.Struct, frozen=True, array_like=True):
    """An array as plain data. `Array.of(np.array([1, 2], "int32")).numpy()` gives it back without a copy, read-only."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Array:
        import numpy as np  # here, so that tasks and sandboxes load without it

        array = np.ascontiguousarray(values, dtype=dtype)
        return cls(array.dtype.str, array.shape, array.tobytes())

    def numpy(self) -> npt.NDArray[Any]:
        import numpy as np

        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)

    def __len__(self) -> int:
        return self.shape[0]


def reply_type(request: type[Request[Any]]) -> Any:
    """The type that answers a request: `Score` for `class Grade(Request[Score])`."""
    for base in getattr(request, "__orig_bases__", ()):
        if get_origin(base) is Request:
            return get_args(base)[0]
    raise TypeError(f"{request.__name__} does not say what answers it: derive it from Request[Reply]")


_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def round_trip(value: Any) -> Any:
    """Encodes and decodes a struct (anything else passes through): proves that a message is plain data."""
    if isinstance(value, msgspec.Struct):
        return msgspec.msgpack.decode(_encoder.encode(value), type=type(value))
    return value
