"""The rocklet's interpreter: a copy of just those files that Python opens to run it, found by watching it start.

The interpreter of the host may lie where the sandbox's user cannot reach it (a root-only home), and its prefix holds
much that a sandbox should not see. The copy keeps Python's layout, so it finds its own library wherever it is mounted.
One that is to run beside another C library than its own (in an image, which may hold none) brings that along, with its
loader: `standalone`.
"""

from __future__ import annotations

import ast
import functools
import marshal
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from types import CodeType

from ale.errors import SandboxError
from ale.sandbox import gate, rocklet

MOUNT_POINT = "/.rocklet"
# In the order in which they need one another.
BUNDLED = ("__init__", "system", "wire", "commands", "files", "agent")
_START_S = 30.0

# Prints what the rocklet's imports loaded: module files, and every file mapped into the process.
_WATCH = """
import posix, sys, time, _ctypes, _signal, _socket, marshal, resource, select
files = [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
maps = {line.split(None, 5)[5].rstrip() for line in open("/proc/self/maps") if line.count("/")}
print(repr((sys.executable, files, sorted(maps))))
"""


class Interpreter:
    """Where the copy lies (`directory`) and how it is started inside, mounted at MOUNT_POINT."""

    def __init__(self, directory: Path, *, standalone: bool = False) -> None:
        self.directory = directory
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.argv: tuple[str, ...] = (
            f"{MOUNT_POINT}/bin/{version}", "-I", "-S", f"{MOUNT_POINT}/rocklet/start.pyc",
        )  # fmt: skip
        self.gate = f"{MOUNT_POINT}/gate.pyc"
        self.env = {"LD_LIBRARY_PATH": f"{MOUNT_POINT}/lib"}
        library = directory / sys.platlibdir / version
        (directory / "bin").mkdir(parents=True)
        (directory / "lib").mkdir()
        (library / "lib-dynload").mkdir(parents=True)
        executable, modules, mapped = _watch()
        shutil.copy(executable, directory / "bin" / version)
        (library / "os.py").touch()  # the landmark by which Python knows its prefix
        prefix = Path(sysconfig.get_path("stdlib")).resolve()
        for module in map(Path, modules):
            self._copy_module(module, prefix, library)
        for path in map(Path, mapped):
            # The system's own libraries are there already, as part of /usr, unless it stands alone.
            system = path.is_relative_to("/usr") or path.is_relative_to("/lib")
            if ".so" in path.name and (standalone or not system):
                if "lib-dynload" in path.parts:
                    shutil.copy(path, library / "lib-dynload")
                else:
                    _copy_library(path, directory / "lib")
        if standalone:
            loader = next((path.name for path in map(Path, mapped) if path.name.startswith("ld-")), None)
            if loader is None:
                raise SandboxError(f"the interpreter {executable} has no dynamic loader that could be brought along")
            self.argv = (f"{MOUNT_POINT}/lib/{loader}", "--library-path", f"{MOUNT_POINT}/lib", *self.argv)
        (directory / "gate.pyc").write_bytes(_compiled(Path(gate.__file__)))
        (directory / "rocklet").mkdir()
        package = Path(rocklet.__file__).parent
        for source in package.glob("*.py"):
            (directory / "rocklet" / f"{source.stem}.pyc").write_bytes(_compiled(source))
        (directory / "rocklet" / "bundle").write_bytes(bundle(package))

    @staticmethod
    def _copy_module(module: Path, prefix: Path, library: Path) -> None:
        real = module.resolve()
        if not real.is_relative_to(prefix):
            raise SandboxError(f"the interpreter loads {module} from outside its library {prefix}")
        target = library / real.relative_to(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        if real.suffix == ".py":  # compiled beside, so that no start compiles or checks a time stamp
            target.with_suffix(".pyc").write_bytes(_compiled(real))
        else:
            shutil.copy(real, target)


def _copy_library(path: Path, target: Path) -> None:
    """Under its own name (libffi.so.8.1.4) and the shorter ones: one is what programs ask for (libffi.so.8)."""
    shutil.copy(path, target)
    stem, _, version = path.name.partition(".so.")
    numbers = version.split(".") if version else []
    for count in range(1, len(numbers)):
        shorter = target / ".".join([f"{stem}.so", *numbers[:count]])
        if not shorter.exists():
            shorter.symlink_to(path.name)


@functools.cache  # for the next engine of this process
def _code(source: Path) -> CodeType:
    return compile(source.read_bytes(), str(source), "exec", dont_inherit=True, optimize=2)  # no docstrings to hold


def _compiled(source: Path) -> bytes:
    """What stands in a .pyc file that has no source beside it: such a one needs neither time nor size of the source."""
    return MAGIC_NUMBER + bytes(12) + marshal.dumps(_code(source))


def bundle(package: Path) -> bytes:
    """The modules that every rocklet starts with, for `start.py` to take out of one file, one after another: read at
    once, they would leave each sandbox with memory that it does not need again."""
    names = ["rocklet" if stem == "__init__" else f"rocklet.{stem}" for stem in BUNDLED]
    codes = [marshal.dumps(_code(package / f"{stem}.py")) for stem in BUNDLED]
    sizes = [f"{name}={len(code)}" for name, code in zip(names, codes, strict=True)]
    return " ".join(sizes).encode() + b"\n" + b"".join(codes)


@functools.cache
def _watch() -> tuple[str, list[str], list[str]]:
    base = Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()
    try:
        seen = subprocess.run(
            [base, "-I", "-S", "-c", _WATCH], capture_output=True, check=True, timeout=_START_S, env={}, text=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        raise SandboxError(f"cannot start the interpreter {base} for the rocklet: {detail}") from error

    executable, modules, mapped = ast.literal_eval(seen.stdout)
    return executable, modules, mapped
