"""What of a sandbox lies outside it: its egress proxy and its watch, attached to one namespace after another."""

from __future__ import annotations

import socket

from ale.sandbox.audit_log import AuditLog
from ale.sandbox.egress import EgressProxy
from ale.sandbox.namespace import Namespace
from ale.sandbox.network import NO_NETWORK, Network
from ale.sandbox.watch import Watch


class Outside:
    def __init__(self, network: Network, log: AuditLog) -> None:
        self._network, self._log = network, log
        self._proxy: EgressProxy | None = None
        self._watch: Watch | None = None

    async def attach(self, namespace: Namespace) -> None:
        """Takes over what the gate of a namespace that has just started handed out."""
        await self.detach()  # of the last one, when it ended by itself
        self._watch = Watch(namespace.handed_over.pop(), self._log.attempt)
        if namespace.handed_over:
            self._proxy = EgressProxy(self._network, self._log.request, self._log.asker)
            await self._proxy.start(socket.socket(fileno=namespace.handed_over.pop()))

    async def lock(self) -> None:
        self._network = NO_NETWORK
        if self._proxy is not None:
            await self._proxy.lock()

    async def detach(self) -> None:
        proxy, watch, self._proxy, self._watch = self._proxy, self._watch, None, None
        if proxy is not None:
            await proxy.close()
        if watch is not None:
            watch.close()
