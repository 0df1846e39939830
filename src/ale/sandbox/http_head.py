"""The head of a proxy request, read strictly: what two programs could read differently is refused, never repaired."""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_HEAD_BYTES = 32768
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_METHOD = re.compile(r"[A-Z]{1,20}")
_HOST = re.compile(r"[a-z0-9_.-]{1,253}|\[[0-9a-f:.]{2,45}\]")
_TARGET = re.compile(r"http://([^/?#]*)([/?][!-~]*)?", re.IGNORECASE)
_LENGTH = re.compile(r"[0-9]{1,15}")
_HOP_BY_HOP = frozenset(
    {"connection", "proxy-connection", "proxy-authorization", "proxy-authenticate", "keep-alive", "te", "trailer"}
    | {"upgrade"}
)


class BadRequest(Exception):
    """The request cannot be read in one way only; the message says what is wrong with it."""


class Head(NamedTuple):
    method: str
    host: str
    """Lower case, without brackets or a final dot."""
    port: int
    forward: bytes
    """The head as the destination gets it; empty for CONNECT."""
    body: int | None
    """Bytes of the body; None: chunked."""


def parse_head(data: bytes) -> Head:
    """Reads a head that ends with an empty line. Raises BadRequest."""
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        raise BadRequest("bytes beyond ASCII in the head") from None
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text.replace("\r\n", "").replace("\t", "")):
        raise BadRequest("a control character in the head")  # a lone CR or LF among them
    line, *rest = text.removesuffix("\r\n\r\n").split("\r\n")
    parts = line.split(" ")
    if len(parts) != 3 or not _METHOD.fullmatch(parts[0]) or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise BadRequest(f"the request line {line[:200]!r}")
    method, target, _ = parts
    fields = [_field(line) for line in rest]
    if method == "CONNECT":
        return Head(method, *_authority(target, None), b"", 0)
    match = _TARGET.fullmatch(target)
    if match is None:
        raise BadRequest("a target that is no absolute http:// address")
    authority, path = match.group(1), match.group(2) or "/"
    host, port = _authority(authority, 80)
    named = [value for name, value in fields if name == "host"]
    if len(named) > 1 or (named and _authority(named[0], 80) != (host, port)):
        raise BadRequest("a Host that is not the target's")
    listed = {word.strip().lower() for name, value in fields if name == "connection" for word in value.split(",")}
    dropped = _HOP_BY_HOP | listed | {"host"}
    if listed & {"content-length", "transfer-encoding"}:
        raise BadRequest("Connection names the framing of the body")
    lines = [f"{method} {path if path.startswith('/') else '/' + path} HTTP/1.1", f"Host: {authority}"]
    lines += [f"{name}: {value}" for name, value in fields if name not in dropped]
    forward = "\r\n".join([*lines, "Connection: close", "", ""]).encode()
    return Head(method, host, port, forward, _body(fields))


def _field(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or not _TOKEN.fullmatch(name):  # folded lines and blanks before the colon among them
        raise BadRequest(f"the header line {line[:200]!r}")
    return name.lower(), value.strip(" \t")


def _authority(text: str, default_port: int | None) -> tuple[str, int]:
    host, port = text.lower(), default_port
    match = re.fullmatch(r"(.*):([0-9]{1,5})", host)
    if match and (not match.group(1).startswith("[") or match.group(1).endswith("]")):
        host, port = match.group(1), int(match.group(2))
    if not _HOST.fullmatch(host) or port is None or not 0 < port < 65536:
        raise BadRequest(f"the destination {text[:200]!r}")  # a user name before an @ among them
    return host.strip("[]").removesuffix("."), port


def _body(fields: list[tuple[str, str]]) -> int | None:
    lengths = [value for name, value in fields if name == "content-length"]
    codings = [value.lower() for name, value in fields if name == "transfer-encoding"]
    if len(lengths) + len(codings) > 1:
        raise BadRequest("a body whose length is given twice")
    if codings:
        if codings != ["chunked"]:
            raise BadRequest(f"the transfer coding {codings[0][:100]!r}")
        return None
    if lengths and not _LENGTH.fullmatch(lengths[0]):
        raise BadRequest(f"the length {lengths[0][:100]!r}")
    return int(lengths[0]) if lengths else 0
