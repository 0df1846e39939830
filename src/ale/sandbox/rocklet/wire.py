"""The wire between engine and rocklet. Nothing here believes what it reads; `ale.sandbox.frames` bounds it.

    frame = length u32 | kind u8 | number u32 | field*       length counts what follows it; little-endian
    field = length u32 | bytes                               numbers are decimal ASCII

A request has a number, which rises by one with each. The rocklet keeps what became of it until the engine has
acknowledged the answer, so that a connection that breaks is mended by asking, never by doing a thing again.

A stream has the number of the request that opened it (one that the rocklet opens has a number from FIRST_INCOMING
up). Each side may send WINDOW bytes of pieces, and as many more as the other has given it credit for.
"""

# Requests, each answered once. In brackets: fields, and the answer's kind. argv and env: each a list with NULs between.
RUN = 1  # [time-out s, cpu s or "", bytes kept, cwd, stdin, session, argv, env] DONE
CANCEL = 2  # ends the command of that number; answered by its DONE
READ = 3  # [path, most bytes] DATA
WRITE = 4  # [path, mode, bytes] OK
LIST = 5  # [path] LISTED
STAT = 6  # [path] LISTED, one entry
PING = 7  # [] OK
ASK = 8  # what became of that number: its answer again, now or when it is there
ACK = 9  # [numbers, spaces between] their answers have come; not answered
# Requests that open a stream, answered by OPENED.
PACK = 10  # [path] a tree, out of the sandbox
UNPACK = 11  # [path, most bytes] a tree, into the sandbox
TERMINAL = 12  # [rows, columns, cpu s or "", cwd, argv, env]
CONNECT = 13  # [address]
LISTEN = 14  # [address] answered by OPENED; each connection then comes as INCOMING
RESIZE = 15  # [rows, columns] of the terminal of that number; not answered
# On a stream, in both directions.
PIECE = 32  # [bytes]
CREDIT = 33  # [count]
END = 34  # [exit status of a terminal, else ""] no more pieces from this side
RESET = 35  # the stream is given up
# Answers.
READY = 64  # [highest number seen] the first frame of every connection
DONE = 65  # [figures, stdout, stderr, session]
# figures: status, timed out, microseconds, dropped of stdout and of stderr, user us, system us, peak kB; spaces between
DATA = 66  # [bytes]
OK = 67
FAILED = 68  # [errno, reason]
LISTED = 69  # [entry...]
OPENED = 70
INCOMING = 71  # [number of the listener] a new stream

HEADER_BYTES = 5  # kind and number
PIECE_BYTES = 65536
WINDOW = 8 * PIECE_BYTES
FIRST_INCOMING = 1 << 31
MAX_INCOMING = 64  # connections through one listener at once; more are refused inside
MAX_SESSION_BYTES = 1 << 20
SESSION_FD = 199  # where a session's shell finds its state, and leaves it


def pack(kind: int, number: int, *fields: bytes | int) -> bytes:
    """One frame. Every field is bytes or an int."""
    body: list[bytes] = [kind.to_bytes(1, "little"), number.to_bytes(4, "little")]
    for field in fields:
        data = field if isinstance(field, bytes) else b"%d" % field
        body += (len(data).to_bytes(4, "little"), data)
    frame = b"".join(body)
    return len(frame).to_bytes(4, "little") + frame


def unpack(frame: bytes) -> tuple[int, int, list[bytes]]:
    """(kind, number, fields) of a frame without its length. Raises ValueError when the fields do not fill it."""
    if len(frame) < HEADER_BYTES:
        raise ValueError("frame shorter than its header")
    fields: list[bytes] = []
    at = HEADER_BYTES
    while at < len(frame):
        size = int.from_bytes(frame[at : at + 4], "little")
        at += 4 + size
        if at > len(frame):
            raise ValueError("field reaches past the end of its frame")
        fields.append(frame[at - size : at])
    return frame[0], int.from_bytes(frame[1:5], "little"), fields
