"""What a sandbox stands on: the layers of its workspace, from host directories or a snapshot, and its mounts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ale.errors import SandboxError
from ale.sandbox.bwrap import Bind, Overlay
from ale.sandbox.layers import Layer, LayerStore
from ale.sandbox.port import SandboxSpec
from ale.sandbox.shielded import shielded

# Layers of snapshots that a workspace stands on before they are merged into one: a lookup may have to try them all.
MAX_CHAIN = 50
# mount(2) takes one page of options, into which the paths of all layers have to fit, as bwrap spells them.
_MAX_LAYER_PATHS = 3800
_OLD_ROOT = len("/oldroot:")


def _fits(lowers: Sequence[Path]) -> bool:
    """Whether the mount options of one overlay can name them."""
    return sum(len(str(path)) + _OLD_ROOT for path in lowers) <= _MAX_LAYER_PATHS


class LocalSnapshot:
    def __init__(
        self, store: LayerStore, layers: tuple[Layer, ...], workdir: str, sessions: Mapping[str, bytes]
    ) -> None:
        self.store, self.layers = store, layers
        self.workdir, self.sessions = workdir, sessions
        self._held = True

    def check(self, store: LayerStore) -> None:
        if store is not self.store:
            raise SandboxError("a snapshot stands on the layers of the engine that made it, and this is another engine")
        if not self._held:
            raise SandboxError("this snapshot was released")

    async def release(self) -> None:
        if self._held:
            self._held = False
            await shielded(self.store.let_go(self.layers))


class Foundation:
    """What a spec stands on: held layers of the workspace and the binds of its mounts. Give back with `release`."""

    def __init__(self, store: LayerStore) -> None:
        self.store = store
        self.layers: list[Layer] = []
        self._mounted: list[Layer] = []
        self.binds: list[Bind] = []

    async def gather(self, spec: SandboxSpec) -> None:
        if isinstance(spec.base, tuple):
            for source in spec.base:
                self.layers.append(await self.store.import_tree(source, directory=True))
        elif isinstance(spec.base, LocalSnapshot):
            spec.base.check(self.store)
            self.layers += map(self.store.hold, spec.base.layers)
        else:
            raise SandboxError(f"SandboxSpec.base: {spec.base!r} is not a snapshot of this engine")
        for mount in spec.mounts:
            if mount.writable:
                self.binds.append(Bind(Path(mount.source), mount.target, True))
            else:
                self._mounted.append(await self.store.import_tree(mount.source))
                self.binds.append(Bind(self._mounted[-1].path, mount.target))

    def overlay(self, bottom: Path, upper: Path | None, work: Path | None) -> Overlay:
        lowers = (bottom, *(layer.path for layer in self.layers))
        if not _fits(lowers):
            raise SandboxError(f"SandboxSpec.base: {len(lowers)} directories are more than one overlay can hold")
        return Overlay(lowers, upper, work)

    async def flatten(self, bottom: Path) -> None:
        """Merges the layers of snapshots into one when they have become many."""
        chain = [layer for layer in self.layers if layer.frozen]
        if len(chain) <= MAX_CHAIN and _fits([bottom, *(layer.path for layer in self.layers)]):
            return
        merged = await self.store.merge(chain)
        self.layers = [*(layer for layer in self.layers if not layer.frozen), merged]
        await self.store.let_go(chain)

    async def release(self) -> None:
        held, self.layers, self._mounted = [*self.layers, *self._mounted], [], []
        await self.store.let_go(held)
