"""What a Triton kernel becomes on a GPU, found out without one: registers, spills, access widths, SASS.

    compiled = compile_kernel(
        softmax_kernel,
        signature={"rows": Rows("*bf16:16", None, "i64:16"), "vocab": "i32"},
        constants={"BLOCK_V": 4096},
        target="sm_90",
        num_warps=8,
    )
    compiled.registers, compiled.load_widths    # 32, {16: 4, 2: 16}: bytes -> instructions

The compilers and disassemblers come with the triton wheel. Kernels must be compiled, so this runs only where
TRITON_INTERPRET is not set: tests start a process of its own for it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_DIVISIBLE_BY_16 = [["tt.divisibility", 16]]


class Resources(NamedTuple):
    """What a compiled kernel occupies, known without disassembling it, which takes longest."""

    target: str
    registers: int
    """Per thread; on AMD the vector registers."""
    stack: int
    """Bytes per thread. Triton's kernels keep nothing but spills there."""
    shared: int
    """Bytes of shared memory per program."""
    approximate: dict[str, int]
    """Float32 instructions of NVIDIA that are not correctly rounded, as "div.full.f32": how many in the PTX."""


class Compiled(NamedTuple):
    """A compiled kernel. Spills are bytes per thread, as static instructions, not as executed."""

    target: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    approximate: dict[str, int]
    load_widths: dict[int, int]
    """Bytes one thread loads from global memory in one instruction -> how many such instructions."""
    store_widths: dict[int, int]
    sass: str
    """One instruction a line, after its address in hexadecimal; on AMD the compiler's assembly text."""


def compile_kernel(
    kernel, signature: Mapping[str, Any], constants: Mapping[str, Any], target: str, **options
) -> Compiled:
    """Compiles a @triton.jit function for a target ("sm_80", "sm_90", "sm_100", "gfx942").

    `signature` gives every run-time argument a type as in "*bf16" or "i32"; ":16" behind it says that the
    pointer or integer is divisible by 16, which a launch finds out by itself. Arguments grouped in a
    NamedTuple are that NamedTuple filled with types. A leaf that is no string is a constant: None for an
    absent tensor. `constants` holds the `tl.constexpr` arguments, strings included. `options` are those of a
    launch: num_warps, num_stages, maxnreg.
    """
    require_compiler()
    types, values, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name], values[(position,)] = "constexpr", constants[name]
        else:
            types[name] = _split(signature[name], (position,), values, attributes)
    return compile_source(ASTSource(kernel, types, values, attributes), target, **options)


def compile_source(source: ASTSource, target: str, **options) -> Compiled:
    """Compiles what is described already, as a launch describes it."""
    binary = triton.compile(source, target=gpu_target(target), options=options)
    read = _read_cubin if "cubin" in binary.asm else _read_amdgcn
    return Compiled(**_resources(binary, target)._asdict(), **read(binary.asm))


def resources_of(source: ASTSource, target: str, **options) -> Resources:
    """As `compile_source`, without a look at the instructions."""
    return _resources(triton.compile(source, target=gpu_target(target), options=options), target)


def require_compiler() -> None:
    """Raises if this process interprets kernels, which then cannot be compiled."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels compile only in a process started without it")


def gpu_target(target: str) -> GPUTarget:
    """The target triton knows by that name."""
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def _split(leaf, path: tuple[int, ...], values: dict, attributes: dict):
    """The type without its suffix; fills in the constants and the divisibility, which Triton keys by path."""
    if isinstance(leaf, tuple):
        members = [_split(member, (*path, index), values, attributes) for index, member in enumerate(leaf)]
        return type(leaf)(*members) if hasattr(leaf, "_fields") else tuple(members)
    if not isinstance(leaf, str):
        values[path] = leaf
        return "constexpr"
    plain, _, divisor = leaf.partition(":")
    if divisor not in ("", "16"):
        raise ValueError(f"{leaf!r}: Triton specialises on divisibility by 16 only")
    if divisor:
        attributes[path] = _DIVISIBLE_BY_16
    return plain


def _resources(binary, target: str) -> Resources:
    if "cubin" in binary.asm:
        text, registers, stack = _dump(binary.asm, "-res-usage"), r"\bREG:(\d+)", r"\bSTACK:(\d+)"
    else:
        text = binary.asm["amdgcn"]
        registers, stack = r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)"
    found = (int(re.search(pattern, text)[1]) for pattern in (registers, stack))
    approximate = Counter(re.findall(r"\b((?:div\.full|\w+\.approx)[\w.]*f32)\b", binary.asm.get("ptx", "")))
    return Resources(target, *found, shared=binary.metadata.shared, approximate=dict(approximate))


def _dump(asm: Mapping, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_cubin(asm: Mapping) -> dict:
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", _dump(asm, "-sass"))
    mnemonics = [_mnemonic(instruction) for _, instruction in instructions]
    return {
        "spill_stores": _total_bytes(_sass_widths(mnemonics, "STL")),
        "spill_loads": _total_bytes(_sass_widths(mnemonics, "LDL")),
        "load_widths": _sass_widths(mnemonics, "LDG", "LDGSTS"),
        "store_widths": _sass_widths(mnemonics, "STG"),
        "sass": "\n".join(f"{address}  {instruction}" for address, instruction in instructions),
    }


def _mnemonic(instruction: str) -> list[str]:
    """["LDG", "E", "128"] of "@!P0 LDG.E.128 R4, [R2.64]"."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split(maxsplit=1)[0].split(".")


def _sass_widths(mnemonics: list[list[str]], *operations: str) -> dict[int, int]:
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    widths = Counter()
    for operation, *modifiers in mnemonics:
        if operation in operations:
            # Without a width among the modifiers the access is 32 bits wide.
            widths[next((bits[modifier] for modifier in modifiers if modifier in bits), 32) // 8] += 1
    return dict(widths)


def _read_amdgcn(asm: Mapping) -> dict:
    text = asm["amdgcn"]
    return {
        "spill_stores": sum(map(int, re.findall(r"(\d+)-byte Folded Spill", text))),
        "spill_loads": sum(map(int, re.findall(r"(\d+)-byte Folded Reload", text))),
        "load_widths": _amdgcn_widths(text, "load"),
        "store_widths": _amdgcn_widths(text, "store"),
        "sass": text,
    }


def _amdgcn_widths(text: str, operation: str) -> dict[int, int]:
    mnemonic = rf"^\s+(?:global|buffer|flat)_{operation}_(?:[us]?(byte|short)|dword(?:x(\d))?)"
    widths = Counter()
    for small, words in re.findall(mnemonic, text, re.MULTILINE):
        widths[{"byte": 1, "short": 2}[small] if small else 4 * int(words or 1)] += 1
    return dict(widths)


def _total_bytes(widths: Mapping[int, int]) -> int:
    return sum(width * count for width, count in widths.items())
