"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU and keeps a table of what it costs.

    python -m bench.aot            compile, check, print
    python -m bench.aot --write    ... and write bench/results/kernels_aot.md
    python -m bench.aot --json     ... and print the rows as JSON (what the test reads)

A configuration is refused when it spills (stack or local memory), takes more shared memory than the chip has, lacks
the instructions it was written for, or adds atomically (the same input must give the same bits). Kernels checked here
have been compiled, and are not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "kernels_aot.md"

SHARED_PER_BLOCK = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_PER_PROCESSOR = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS_PER_PROCESSOR, WARPS_PER_PROCESSOR = 65536, 64
SHARED_RESERVED = 1024
"""Bytes of shared memory that the driver takes from each block on every chip here."""

MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
TMA = "cp.async.bulk.tensor"


@dataclass(frozen=True)
class Spec:
    """One configuration of one kernel for one chip. `arguments`: types of the run-time arguments, by name."""

    name: str
    chip: int
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    expects: tuple[str, ...] = ()
    """Instructions that the PTX must contain."""
    aligned: tuple[str, ...] = field(default=())
    """Integer arguments that are multiples of 16; pointers always are."""


@dataclass(frozen=True)
class Resources:
    name: str
    chip: int
    registers: int
    shared: int
    stack: int
    local: int
    occupancy: float
    """Share of the chip's warps that fit at once."""
    instructions: str
    missing: str
    """Expected instructions that are not there."""
    atomic: bool = False
    """Whether it adds to memory atomically, in an order that differs from run to run."""

    def faults(self) -> list[str]:
        """What makes the configuration unacceptable, in words."""
        found = []
        if self.stack or self.local:
            found.append(f"spills: {self.stack} bytes of stack, {self.local} of local memory")
        if self.shared > SHARED_PER_BLOCK[self.chip]:
            found.append(f"takes {self.shared} bytes of shared memory of {SHARED_PER_BLOCK[self.chip]}")
        if self.missing:
            found.append(f"lacks {self.missing}")
        if self.atomic:
            found.append("adds atomically")
        return found


def compile_spec(spec: Spec) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    unknown = set(spec.arguments) | set(spec.constants)
    if unknown != set(names):
        raise ValueError(f"{spec.name}: arguments differ from the kernel's: {sorted(unknown ^ set(names))}")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if spec.arguments.get(name, "").startswith("*") or (name in spec.aligned and name in spec.arguments)
    }
    source = ASTSource(
        spec.kernel,
        signature={name: spec.arguments.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in spec.constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": spec.warps, "num_stages": spec.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", spec.chip, 32), options=options)
    ptx = compiled.asm["ptx"]
    present = [word for word in ("mma.sync", "wgmma", "tcgen05", TMA, "cp.async.") if word in ptx]
    if TMA in present:
        present = [word for word in present if word != "cp.async."]
    usage = _usage(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    # warp specialisation and tensor memory add warps: the compiler reports what is launched
    warps = int(compiled.metadata.num_warps)
    return Resources(
        name=spec.name,
        chip=spec.chip,
        registers=usage["REG"],
        shared=shared,
        stack=usage["STACK"],
        local=usage["LOCAL"],
        occupancy=_occupancy(spec.chip, usage["REG"], shared, warps),
        instructions=" ".join(word.rstrip(".") for word in present),
        missing=" ".join(word for word in spec.expects if word not in ptx),
        atomic=re.search(r"\b(atom|red)\.", ptx) is not None,
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the one kernel in a cubin, read with the cuobjdump that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _occupancy(chip: int, registers: int, shared: int, warps: int) -> float:
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out to warps in steps of 256
    blocks = min(
        REGISTERS_PER_PROCESSOR // (per_warp * warps),
        SHARED_PER_PROCESSOR[chip] // (shared + SHARED_RESERVED),
        WARPS_PER_PROCESSOR // warps,
        32,
    )
    return blocks * warps / WARPS_PER_PROCESSOR


def specs() -> Iterator[Spec]:
    """Every configuration of every kernel."""
    from bench import aot_chunk_advantage, aot_grouped_gemm, aot_linear_logprob

    for module in (aot_chunk_advantage, aot_grouped_gemm, aot_linear_logprob):
        yield from module.specs()


def table(rows: list[Resources]) -> str:
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        "Written by `python -m bench.aot --write`; a test compares it. **Not yet run on a GPU.** Occupancy is the "
        "share of a multiprocessor's warps; a persistent kernel with its shared memory in flight wants little of it.",
        "",
        "| configuration | sm | registers | shared bytes | stack | local | occupancy | instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.name} | {r.chip} | {r.registers} | {r.shared} | {r.stack} | {r.local} | {r.occupancy:.0%} "
        f"| {r.instructions} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    rows = [compile_spec(spec) for spec in specs() if arguments.only in spec.name]
    print(json.dumps([asdict(row) for row in rows]) if arguments.json else table(rows))
    faults = [f"{row.name} on sm_{row.chip} {fault}" for row in rows for fault in row.faults()]
    if arguments.write and not faults:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(table(rows))
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
