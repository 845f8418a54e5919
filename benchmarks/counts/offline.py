"""What Triton kernels become on a GPU, found out without one: registers, spills, access widths, sweeps over a row.

    compiler = Compiler("sm_90")
    with compiler.catching():
        loss_and_gradient(logits)       # host code that launches any number of kernels, on CPU tensors

    compiler.launched[0]                # {"kernel": ..., "registers": 64, "load_widths": {16: 4, 2: 16}, ...}

Where a kernel would be launched it is compiled for the very arguments instead (types, divisibility, absent tensors).
The compilers and disassemblers come with the triton wheel.
"""

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.counts.h200 import resident
from benchmarks.counts.launches import VOCAB
from benchmarks.counts.sass import LOADS, Instruction, parse, sweeps
from benchmarks.counts.traffic import tensors
from egpo_kernels.triton import launch


class Compiler:
    """Stands in for `JITFunction.run`: specialises as a launch does and compiles, once for each specialisation.

    Kernels over logits are disassembled too, which takes ten times as long as the rest.
    """

    def __init__(self, target: str, compiles: bool = True, disassembles: bool = True) -> None:
        if triton.knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET is set: kernels compile only in a process started without it")
        self.target, self.label = target, {}
        self.compiles, self.disassembles = compiles, disassembles
        self.gpu = gpu_target(target)
        self.backend = make_backend(self.gpu)
        self.binders = {}
        self.rows: dict[tuple, dict[str, Any]] = {}
        """What came of each specialisation."""
        self.launched: list[dict[str, Any]] = []
        """The row of every launch, in order."""

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Let every kernel launched inside come here, whosever it is."""
        run = mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: self.run(kernel, *args, **kwargs))
        with run, mock.patch.object(launch, "architecture", lambda device: self.target):
            yield

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """Compile ``kernel`` for these arguments."""
        if kernel not in self.binders:
            self.binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialisation, options = self.binders[kernel](*args, **kwargs)
        key = (kernel, str(specialisation), str(options))
        if key not in self.rows:
            self.rows[key] = {"kernel": kernel.__name__, **self.label}
            if self.compiles:
                _, signature, constants, attributes = kernel._pack_args(
                    self.backend, kwargs, bound, specialisation, options
                )
                source = source_of(kernel)(kernel, signature, constants, attributes)
                largest = max(tensors((args, tuple(kwargs.values()))), key=torch.Tensor.numel)
                self.rows[key] |= self.read(source, options, largest)
        self.launched.append(self.rows[key])

    def read(self, source: ASTSource, options: dict[str, Any], largest: torch.Tensor) -> dict[str, Any]:
        """The figures of a kernel; its instructions too if its ``largest`` argument is as large as logits."""
        binary = triton.compile(source, target=self.gpu, options=options)
        row = {"target": self.target, **resources(binary)}
        if largest.numel() < VOCAB or not self.disassembles:
            return row
        if "cubin" not in binary.asm:
            return row | amd_accesses(binary.asm["amdgcn"])
        code = parse(_dump(binary.asm["cubin"], "-sass"))
        warps = options.get("num_warps", 4)  # Triton's own default
        programs = resident(row["registers"], warps, row["shared"])
        found = [sweep._asdict() for sweep in sweeps(code, largest.element_size())]
        for sweep in found:
            block = sweep["loads"] * sweep["elements"] * sweep["load_width"] * 32 * warps
            sweep["in_flight"] = programs * (row["shared"] if sweep["ahead"] else round(block))
        return row | nvidia_accesses(code) | {"fenced": fenced(code), "sweeps": found}


def gpu_target(target: str) -> GPUTarget:
    """The target triton knows by that name: "sm_80", "sm_90", "sm_100", "gfx942"."""
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def source_of(kernel: JITFunction) -> type[ASTSource]:
    """What a kernel is compiled from; Gluon has its own."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def resources(binary: CompiledKernel) -> dict[str, Any]:
    """Registers a thread (on AMD the vector registers), bytes of its stack, where Triton's kernels keep nothing but
    spills, shared memory of a program, and how many float32 instructions of NVIDIA's PTX round approximately.
    """
    if "cubin" in binary.asm:
        text, patterns = _dump(binary.asm["cubin"], "-res-usage"), (r"\bREG:(\d+)", r"\bSTACK:(\d+)")
    else:
        text, patterns = binary.asm["amdgcn"], (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
    registers, stack = (int(re.search(pattern, text)[1]) for pattern in patterns)
    approximate = Counter(re.findall(r"\b((?:div\.full|\w+\.approx)[\w.]*f32)\b", binary.asm.get("ptx", "")))
    return {
        "registers": registers, "stack": stack, "shared": binary.metadata.shared, "approximate": dict(approximate)
    }  # fmt: skip


def _dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def nvidia_accesses(code: list[Instruction]) -> dict[str, Any]:
    """Bytes a thread spills, as static instructions; bytes it moves in one instruction -> how many such there are."""
    return {
        "spill_stores": sum(one.width for one in code if one.name == "STL"),
        "spill_loads": sum(one.width for one in code if one.name == "LDL"),
        "load_widths": dict(Counter(one.width for one in code if one.name in LOADS)),
        "store_widths": dict(Counter(one.width for one in code if one.name == "STG")),
    }


def fenced(code: list[Instruction]) -> bool:
    """Whether a barrier stands between the load of the token's own logit, where there is one, and the first store."""
    own = next((place for place, one in enumerate(code) if one.name == "LDG" and "U16" in one.modifiers), 0)
    names = [one.name for one in code[own:]]
    return "BAR" in names[: names.index("STG") if "STG" in names else None]


def amd_accesses(text: str) -> dict[str, Any]:
    """As `nvidia_accesses`, from the assembly."""
    return {
        "spill_stores": sum(map(int, re.findall(r"(\d+)-byte Folded Spill", text))),
        "spill_loads": sum(map(int, re.findall(r"(\d+)-byte Folded Reload", text))),
        "load_widths": _amd_widths(text, "load"),
        "store_widths": _amd_widths(text, "store"),
    }


def _amd_widths(text: str, operation: str) -> Mapping[int, int]:
    mnemonic = rf"^\s+(?:global|buffer|flat)_{operation}_(?:[us]?(byte|short)|dword(?:x(\d))?)"
    found = re.findall(mnemonic, text, re.MULTILINE)
    return dict(Counter({"byte": 1, "short": 2}[small] if small else 4 * int(words or 1) for small, words in found))
