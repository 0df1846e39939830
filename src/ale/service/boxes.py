"""The Sandbox API: what can be asked about sandboxes, their files and terminals, a line of the table each."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse

import ale
from ale.sandbox import wire
from ale.sandbox.audit_log import MAX_EVENTS
from ale.sandbox.held import Held
from ale.sandbox.launcher import remove_tree
from ale.sandbox.port import MAX_FILE_BYTES, Command, Completed, Terminal
from ale.sandbox.rocklet.trees import TreeWriter
from ale.sandbox.shielded import shielded
from ale.sandbox.transfer import packed, remove
from ale.service.house import House
from ale.service.http import BYTES, MAX_WAIT_S, Call, Operation, Tree, answered
from ale.service.tenant import Box, KeptTree

_SHA256 = frozenset("0123456789abcdef")


class SandboxApi:
    def __init__(self, house: House) -> None:
        self._house = house

    # -- the service, requests, trees

    async def info(self, call: Call) -> wire.ServiceInfo:
        house, tenant = self._house, call.tenant
        return wire.ServiceInfo(
            version=ale.__version__,
            tenant=tenant.name,
            pid=os.getpid(),
            capabilities=dict(house.engine.capabilities()),
            statistics=msgspec.structs.asdict(house.engine.statistics()),
            sandboxes=len(tenant.boxes),
            max_sandboxes=tenant.limits.sandboxes,
            idle_s=tenant.limits.idle_s,
        )

    async def ask(self, call: Call) -> Response:
        key = call.path["key"]
        return answered(key, await call.tenant.ledger.answer(key, call.number("wait_s", 30.0, 0.0, MAX_WAIT_S)))

    async def cancel(self, call: Call) -> wire.Nothing:
        if not wire.KEY.fullmatch(call.path["key"]):
            raise wire.Malformed(f"a key must match {wire.KEY.pattern}")
        await shielded(call.tenant.ledger.cancel(call.path["key"]))
        return wire.Nothing()

    async def has_tree(self, call: Call) -> wire.Nothing:
        with self._house.tree(call.tenant, call.path["sha256"]):
            return wire.Nothing()

    async def put_tree(self, call: Call) -> wire.Nothing:
        tenant, sha256 = call.tenant, call.path["sha256"]
        if len(sha256) != 64 or not _SHA256.issuperset(sha256):
            raise wire.Malformed("a tree is named by the SHA-256 of its bytes, 64 hexadecimal digits")
        if sha256 in tenant.trees:
            await call.drain()
            return wire.Nothing()
        size = call.integer("size", None, tenant.limits.tree_bytes)
        name = f"{sha256[:32]}.{secrets.token_hex(4)}"
        path = tenant.folder / name
        with tenant.reserving("tree", tenant.trees, tenant.limits.trees, name), tenant.reserving_bytes(size):
            try:
                found, received = await _receive(call, path, size)
                if received > size:  # of files that are empty, the names alone
                    raise wire.TooLarge(f"the body has {received} bytes, and its `size` says {size}")
                if found != sha256:
                    raise wire.Malformed("the tree does not have the hash in its name")
                if path.is_symlink():  # an engine follows the path that it is given: into this machine's own files
                    raise wire.Malformed("a tree that is a symbolic link itself is nothing to start from")
            except BaseException:
                await shielded(asyncio.to_thread(remove, path))
                raise
        kept = KeptTree(path, size, tenant.limits.idle_s)
        if sha256 in tenant.trees:  # by another upload meanwhile
            await kept.close()
        else:
            tenant.trees[sha256] = kept
            self._house.note(kept)
        return wire.Nothing()

    # -- life

    async def start(self, call: Call) -> wire.SandboxInfo:
        return await self._house.start(call.tenant, call.path["name"], call.body)

    async def list(self, call: Call) -> wire.Sandboxes:
        """Without their events, of which there may be megabytes: each sandbox's own status has them."""
        return wire.Sandboxes(sandboxes=tuple(box.info(MAX_EVENTS) for box in call.tenant.boxes.values()))

    async def status(self, call: Call) -> wire.SandboxInfo:
        box = call.tenant.boxes.get(call.path["name"])  # looking is no use that keeps it open
        if box is None or box.closed:
            raise wire.UnknownName(f"there is no sandbox {call.path['name']}: it is closed or was never here")
        return box.info(call.integer("since", 0, 1 << 31))

    async def stop(self, call: Call) -> wire.Nothing:
        await call.tenant.discard(call.tenant.boxes, call.path["name"])
        return wire.Nothing()

    async def exec(self, call: Call) -> wire.Ran:
        since = call.integer("since", 0, 1 << 31)
        with self._box(call) as box:
            completed = await box.exec(call.body, call.query.get("session"))
            return wire.Ran(completed=completed, seen=box.seen(since))

    async def run(self, call: Call) -> Completed:
        with self._house.spec(call.tenant, call.body.spec) as spec:
            return await self._house.engine.run(spec, call.body.command)

    async def log(self, call: Call) -> wire.Log:
        with self._box(call) as box:
            return wire.Log(
                commands=tuple(box.log), events=tuple(box.sandbox.audit()), alarms=tuple(box.sandbox.alarms())
            )

    async def snapshot(self, call: Call) -> wire.Snapshotted:
        with self._box(call) as box:
            name, snapshot = await self._house.snapshot(call.tenant, box)
            return wire.Snapshotted(
                snapshot=name,
                workdir=snapshot.workdir,
                sessions=dict(snapshot.sessions),
                seen=box.seen(call.integer("since", 0, 1 << 31)),
            )

    async def release(self, call: Call) -> wire.Nothing:
        await call.tenant.discard(call.tenant.snapshots, call.path["snapshot"])
        return wire.Nothing()

    async def commit(self, call: Call) -> wire.Committed:
        with self._box(call) as box:
            entry = await self._house.commit(box, call.body.template)
        return wire.Committed(template=entry.name, sha256=entry.sha256)

    async def fork(self, call: Call) -> wire.Sandboxes:
        with self._box(call) as box:
            return wire.Sandboxes(sandboxes=await self._house.fork(call.tenant, box, call.body.names))

    async def lock_network(self, call: Call) -> wire.Nothing:
        with self._box(call) as box:
            await box.sandbox.lock_network()
        return wire.Nothing()

    async def ping(self, call: Call) -> wire.Nothing:
        with self._box(call) as box:
            await box.sandbox.ping(deadline_s=call.number("deadline_s", 5.0, 0.0, MAX_WAIT_S))
        return wire.Nothing()

    async def label(self, call: Call) -> wire.SandboxInfo:
        with self._box(call) as box:
            box.sandbox.assign(call.body.label)
            box.label = call.body.label
        return box.info()

    # -- files

    async def read(self, call: Call) -> Response:
        limit = call.integer("max_bytes", 1 << 20, MAX_FILE_BYTES)
        with self._box(call) as box:
            data = await box.sandbox.read_file(call.text("path"), max_bytes=limit)
        return Response(data, media_type=BYTES)

    async def write(self, call: Call) -> wire.Nothing:
        with self._box(call) as box:
            await box.sandbox.write_file(call.text("path"), call.body, mode=call.integer("mode", 0o644, 0o777))
        return wire.Nothing()

    async def list_files(self, call: Call) -> wire.Files:
        with self._box(call) as box:
            found = await box.sandbox.list_files(call.query.get("path") or ".")
        return wire.Files(files=tuple(map(wire.WireFile.of, found)))

    async def stat(self, call: Call) -> wire.WireFile:
        with self._box(call) as box:
            return wire.WireFile.of(await box.sandbox.stat(call.text("path")))

    async def upload(self, call: Call) -> wire.Nothing:
        limit = call.tenant.limits.tree_bytes
        max_bytes = call.integer("max_bytes", limit, 1 << 62)
        with self._box(call) as box, call.tenant.transferring():
            async with self._scratch() as folder:
                await _receive(call, folder / "tree", min(limit, max_bytes))
                await box.sandbox.upload(folder / "tree", call.text("path"))
        return wire.Nothing()

    async def download(self, call: Call) -> Response:
        limit = call.tenant.limits.tree_bytes
        path, max_bytes = call.text("path"), call.integer("max_bytes", limit, 1 << 62)
        entered = Held(self._fetched(call, path, min(limit, max_bytes)))
        try:
            tree, left_out = await entered.value()
        except BaseException:
            await shielded(entered.close())
            raise
        headers = {wire.LEFT_OUT_HEADER: str(left_out)}
        return _TreeResponse(tree, entered, headers)

    @asynccontextmanager
    async def _fetched(self, call: Call, path: str, max_bytes: int) -> AsyncIterator[tuple[Path, int]]:
        with self._box(call) as box, call.tenant.transferring():
            async with self._scratch() as folder:
                yield folder / "tree", await box.sandbox.download(path, folder / "tree", max_bytes=max_bytes)

    @asynccontextmanager
    async def _scratch(self) -> AsyncIterator[Path]:
        scratch = self._house.engine.scratch
        folder = Path(
            tempfile.mkdtemp(prefix="transfer-", dir=scratch)
        )  # no thread, which would outlive a cancelled caller
        try:
            yield folder
        finally:
            await shielded(asyncio.to_thread(remove_tree, folder))

    # -- terminals

    async def open_terminal(self, call: Call) -> wire.Terminal:
        wanted: wire.OpenTerminal = call.body
        with self._box(call) as box:
            if len(box.terminals) >= call.tenant.limits.terminals:
                raise wire.TooMany(f"{box.name} has {len(box.terminals)} terminals: close some")
            name = secrets.token_hex(8)
            held = Held(box.sandbox.terminal(wanted.command, rows=wanted.rows, columns=wanted.columns))
            box.terminals[name] = held
            try:
                await held.value()
            except BaseException:
                del box.terminals[name]
                await shielded(held.close())
                raise
            return wire.Terminal(terminal=name)

    async def send_keys(self, call: Call) -> wire.Nothing:
        with self._terminal(call) as held:
            await (await held.value()).send(call.body.keys)
        return wire.Nothing()

    async def read_terminal(self, call: Call) -> wire.Printed:
        with self._terminal(call) as held:
            return wire.Printed(data=await (await held.value()).read(deadline_s=_deadline(call.body)))

    async def wait_terminal(self, call: Call) -> wire.Ended:
        with self._terminal(call) as held:
            return wire.Ended(status=await (await held.value()).wait(deadline_s=_deadline(call.body)))

    async def screen(self, call: Call) -> wire.Screen:
        with self._terminal(call) as held:
            return wire.Screen(rows=tuple(map(wire.printable, await (await held.value()).screen())))

    async def resize(self, call: Call) -> wire.Nothing:
        with self._terminal(call) as held:
            await (await held.value()).resize(call.body.rows, call.body.columns)
        return wire.Nothing()

    async def close_terminal(self, call: Call) -> wire.Nothing:
        box = call.tenant.boxes.get(call.path["name"])
        held = None if box is None else box.terminals.pop(call.path["terminal"], None)
        if held is not None:
            await shielded(held.close())
        return wire.Nothing()

    def _terminal(self, call: Call) -> AbstractContextManager[Held[Terminal]]:
        return call.tenant.terminal(call.path["name"], call.path["terminal"])

    def _box(self, call: Call) -> AbstractContextManager[Box]:
        return call.tenant.box(call.path["name"])

    def operations(self) -> tuple[Operation, ...]:
        box, terminal = "/v1/sandboxes/{name}", "/v1/sandboxes/{name}/terminals/{terminal}"

        def line(
            method: str,
            path: str,
            do: Callable[[Call], Awaitable[Any]],
            summary: str,
            *,
            body: Any = None,
            reply: Any = wire.Nothing,
            query: tuple[str, ...] = (),
            once: bool = False,
        ) -> Operation:
            return Operation(
                method=method, path=path, do=do, summary=summary, body=body, reply=reply, query=query, once=once
            )

        return (
            line("GET", "/v1/service", self.info, "What the service and its machine offer", reply=wire.ServiceInfo),
            line("GET", "/v1/requests/{key}", self.ask, "What became of a request", reply=Any, query=("wait_s",)),
            line("DELETE", "/v1/requests/{key}", self.cancel, "End a request, or keep it from beginning"),
            line("GET", "/v1/trees/{sha256}", self.has_tree, "Whether a tree was uploaded"),
            line("PUT", "/v1/trees/{sha256}", self.put_tree, "Upload a tree to start sandboxes on", body=Tree,
                 query=("size",)),
            line("POST", "/v1/run", self.run, "One command in a sandbox of its own", body=wire.Run, reply=Completed,
                 once=True),
            line("GET", "/v1/sandboxes", self.list, "The sandboxes of this token", reply=wire.Sandboxes),
            line("PUT", box, self.start, "Start a sandbox", body=wire.Start, reply=wire.SandboxInfo, once=True),
            line("GET", box, self.status, "Status and statistics", reply=wire.SandboxInfo, query=("since",)),
            line("DELETE", box, self.stop, "Stop it; nothing of it is left"),
            line("POST", f"{box}/exec", self.exec, "Run a command, in a session where one is named", body=Command,
                 reply=wire.Ran, query=("session", "since"), once=True),
            line("GET", f"{box}/log", self.log, "Its commands, events and alarms", reply=wire.Log),
            line("POST", f"{box}/snapshot", self.snapshot, "Freeze its workspace", reply=wire.Snapshotted, once=True),
            line("DELETE", "/v1/snapshots/{snapshot}", self.release, "Release a snapshot"),
            line("POST", f"{box}/commit", self.commit, "Keep its workspace as a template of the hub",
                 body=wire.Commit, reply=wire.Committed, once=True),
            line("POST", f"{box}/fork", self.fork, "Start copies of it", body=wire.Fork, reply=wire.Sandboxes,
                 once=True),
            line("POST", f"{box}/lock-network", self.lock_network, "Cut its network for good", once=True),
            line("GET", f"{box}/ping", self.ping, "Whether it takes commands", query=("deadline_s",)),
            line("PUT", f"{box}/label", self.label, "Name what it belongs to", body=wire.Label,
                 reply=wire.SandboxInfo),
            line("GET", f"{box}/file", self.read, "Read a file", reply=bytes, query=("path", "max_bytes")),
            line("PUT", f"{box}/file", self.write, "Write a file", body=bytes, query=("path", "mode"), once=True),
            line("GET", f"{box}/list", self.list_files, "List a directory", reply=wire.Files, query=("path",)),
            line("GET", f"{box}/stat", self.stat, "Describe a file", reply=wire.WireFile, query=("path",)),
            line("GET", f"{box}/tree", self.download, "Download a file or tree", reply=Tree,
                 query=("path", "max_bytes")),
            line("PUT", f"{box}/tree", self.upload, "Upload a file or tree", body=Tree, query=("path", "max_bytes")),
            line("POST", f"{box}/terminals", self.open_terminal, "Run a command on a terminal",
                 body=wire.OpenTerminal, reply=wire.Terminal, once=True),
            line("POST", f"{terminal}/keys", self.send_keys, "Type", body=wire.Keys, once=True),
            line("POST", f"{terminal}/read", self.read_terminal, "What was printed since the last read",
                 body=wire.Wait, reply=wire.Printed, once=True),
            line("POST", f"{terminal}/wait", self.wait_terminal, "Wait for its end", body=wire.Wait,
                 reply=wire.Ended, once=True),
            line("GET", f"{terminal}/screen", self.screen, "The screen as a person sees it", reply=wire.Screen),
            line("POST", f"{terminal}/resize", self.resize, "Resize it", body=wire.Size, once=True),
            line("DELETE", terminal, self.close_terminal, "Close it and end its command"),
        )  # fmt: skip


def _deadline(wait: wire.Wait) -> float:
    if not 0 <= wait.deadline_s < 1e9:
        raise wire.Malformed(f"deadline_s must be at least 0 and finite, got {wait.deadline_s}")
    return wait.deadline_s


async def _receive(call: Call, target: Path, max_bytes: int) -> tuple[str, int]:
    """Lays the tree of a body out at `target`; the hash and number of its bytes. Raises OSError, EFBIG when its files
    have more than `max_bytes`."""
    writer, digest, received = TreeWriter(os.fsencode(target), max_bytes, fresh=True), hashlib.sha256(), 0

    def take(data: bytes) -> None:
        nonlocal received
        received += len(data)
        digest.update(data)
        writer.feed(data)

    try:
        async for data in call.stream():
            await shielded(asyncio.to_thread(take, data))
        await shielded(asyncio.to_thread(writer.finish))
    except ValueError as error:
        raise wire.Malformed(f"the body is no tree: {error}") from error
    finally:
        writer.close()
    return digest.hexdigest(), received


class _TreeResponse(StreamingResponse):
    """Sends a tree in bounded memory, and lets go of it however the answer ends."""

    def __init__(self, tree: Path, entered: Held[Any], headers: dict[str, str]) -> None:
        super().__init__(packed(tree), media_type=wire.TREE_TYPE, headers=headers)
        self._entered = entered

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await shielded(self._entered.close())
