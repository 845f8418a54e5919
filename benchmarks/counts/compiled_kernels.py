"""Compile every kernel the library would launch, for a GPU that need not be there; print a JSON line for each.

    python -m benchmarks.counts.compiled_kernels sm_90            # every dtype and option
    python -m benchmarks.counts.compiled_kernels sm_90 values     # one of each, many values; specialised, not compiled
    python -m benchmarks.counts.compiled_kernels sm_90 hopper     # those over logits, as a Hopper is meant to run them
    python -m benchmarks.counts.compiled_kernels sm_90 sweep      # those over logits with every constant of the sweep
    python -m benchmarks.counts.compiled_kernels sm_90 ring       # the kernel that no rule of the table launches

The library's own host code runs on CPU tensors; where it would launch a kernel, the kernel is compiled for the very
arguments instead (types, divisibility, absent tensors), so that whatever is added to the library is covered.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.counts.h200 import resident
from benchmarks.counts.launches import (
    GROUP_CONFIGS,
    LOSS_CONFIGS,
    VOCAB,
    Size,
    launch_groups,
    launch_log_probs,
    launch_logits,
    launch_one_pass,
    make_rows,
)
from benchmarks.counts.offline import compile_source, gpu_target, resources_of
from benchmarks.counts.sass import sweeps
from benchmarks.gpu.candidates import KERNELS, candidates, problem_of, using
from benchmarks.ring import switched_on
from egpo_kernels import AdvantageConfig, PolicyLossConfig
from egpo_kernels.triton import launch

ODD_VOCAB = 151665


class Compiler:
    """Stands in for `JITFunction.run`: specialises as a launch does and compiles, once for each specialisation."""

    def __init__(self, target: str, compiles: bool = True) -> None:
        self.target, self.compiles, self.label = target, compiles, {}
        self.backend = make_backend(gpu_target(target))
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
        if largest.numel() < VOCAB:
            return resources_of(source, self.target, **options)._asdict()
        row = compile_source(source, self.target, **options)._asdict()
        sass = row.pop("sass")
        # From the load of 16 bits, the token's own logit, where there is one; else from the beginning.
        after = sass.partition("LDG.E.U16")[2] or sass
        row["fenced"] = "BAR.SYNC" in after.partition("STG.")[0]
        if self.target.startswith("sm_"):
            row["sweeps"] = [sweep._asdict() for sweep in sweeps(sass, largest.element_size())]
            warps = options.get("num_warps", 4)  # Triton's own default
            programs = resident(row["registers"], warps, row["shared"])
            for sweep in row["sweeps"]:
                block = sweep["loads"] * sweep["elements"] * sweep["load_width"] * 32 * warps
                sweep["in_flight"] = programs * (row["shared"] if sweep["ahead"] else round(block))
        return row


def source_of(kernel: JITFunction) -> type[ASTSource]:
    """What a kernel is compiled from; Gluon has its own."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def tensors(argument: Any) -> Iterator[torch.Tensor]:
    """The tensors among a kernel's arguments, through tuples."""
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, tuple):
        for member in argument:
            yield from tensors(member)


def every_option(compiler: Compiler) -> None:
    """Walk over dtypes and options."""
    bfloat16 = itertools.product((torch.bfloat16,), (False, True), (False, True))
    others = itertools.product((torch.float16, torch.float32, torch.float64), (True,), (False, True))
    for dtype, full, entropy in itertools.chain(bfloat16, others):
        compiler.label = {"dtype": str(dtype).removeprefix("torch."), "entropy": entropy}
        launch_logits(dtype, full, PolicyLossConfig(entropy_coef=0.1 if entropy else 0.0))
    for config in LOSS_CONFIGS:
        if not config.pools:
            compiler.label = {"dtype": "bfloat16", "surrogate": config.surrogate}
            launch_logits(torch.bfloat16, True, config)
    # Rows that start anywhere have a sum for each place in an access, in more registers.
    for dtype, entropy in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        compiler.label = {"dtype": f"unaligned {dtype}", "entropy": entropy}
        launch_logits(dtype, True, PolicyLossConfig(entropy_coef=0.1 if entropy else 0.0), vocab=ODD_VOCAB)
    for dtype in (torch.float32, torch.float64):
        compiler.label = {"dtype": str(dtype).removeprefix("torch.")}
        for full, config, kl in itertools.product((False, True), LOSS_CONFIGS, ("k1", "k2", "k3")):
            if kl == "k3" or (full and config.surrogate == "clip"):
                launch_log_probs(dtype, full, dataclasses.replace(config, kl=kl))
        for number, config in enumerate(GROUP_CONFIGS):
            launch_groups(dtype, config, full=number % 2 == 0)


def many_values(compiler: Compiler) -> None:
    """Change every number that is not an option: lengths, counts, coefficients, clips, scales; 0, 1 and absent."""
    sizes = (Size(1, 1), Size(2, 2), Size(16, 16), Size(3, 37), Size(33, 1))
    for number, size in enumerate(sizes, start=1):
        off = number == 2
        config = PolicyLossConfig(
            ratio="sequence", clip_low=0.1 * number, clip_high=0.2 * number, dual_clip=None if off else 1.0 + number,
            kl_coef=0.0 if off else number, entropy_coef=0.1 * number, max_log_ratio=10.0 * number,
            kl_max=None if off else number,
        )  # fmt: skip
        gate = PolicyLossConfig(surrogate="sapo", tau_positive=number, tau_negative=0.5 * number)
        bounds = (1 / (number + 1), 1.0 + number)
        scales = {"nsr_scale": number, "positive_scale": number, "negative_scale": 0.0 if off else 0.5 * number}
        small = {"std_eps": 1e-6 * number, "uncertainty_eps": 0.5 * number, "correct_threshold": number - 1}
        groups = AdvantageConfig(weight_bounds=bounds, **scales, **small)
        for logits, dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            compiler.label = {"number": number, "dtype": str(dtype).removeprefix("torch.")}
            launch_logits(logits, True, config, size, vocab=32000, scale=0.5 * number)
            launch_log_probs(dtype, True, gate, size)
            launch_log_probs(dtype, True, config, size)
            launch_groups(dtype, groups, True, size)


def hopper(compiler: Compiler) -> None:
    """The kernels over 16-bit logits, entropy reported or in the loss, rows of whole accesses and odd ones."""
    for dtype, vocab, entropy in itertools.product((torch.bfloat16, torch.float16), (VOCAB, ODD_VOCAB), (0.0, 0.1)):
        compiler.label = {"dtype": str(dtype).removeprefix("torch."), "vocab": vocab, "tilted": entropy != 0}
        launch_logits(dtype, True, PolicyLossConfig(entropy_coef=entropy), vocab=vocab, reported=True)


def every_candidate(compiler: Compiler) -> None:
    """What the sweep of `benchmarks.gpu` tries, the table's own constants among it."""
    logits = torch.zeros(1, 2, VOCAB, dtype=torch.bfloat16)
    rows = make_rows(torch.float32, False, Size(1, 2), "cpu")
    problem = problem_of(logits, rows, torch.ones(2))
    compiler.rows.clear()
    for number, candidate in enumerate(candidates(torch.device("cuda"), VOCAB)):
        # The table's come first, one a kernel.
        compiler.label = {"constants": candidate.title, "own": number < len(KERNELS)}
        with using(candidate):
            KERNELS[candidate.kernel].run(problem, torch.empty_like(logits))


@switched_on()
def through_ring(compiler: Compiler) -> None:
    """The ring in its dtypes and options."""
    for dtype, full, coefficient in itertools.product((torch.bfloat16, torch.float16), (False, True), (0.0, 0.1)):
        compiler.label = {"dtype": str(dtype).removeprefix("torch."), "entropy": coefficient != 0}
        launch_one_pass(dtype, full, PolicyLossConfig(entropy_coef=coefficient))
    for config in LOSS_CONFIGS:
        if not config.pools:
            compiler.label = {"dtype": "bfloat16", "surrogate": config.surrogate}
            launch_one_pass(torch.bfloat16, True, config)
    # Rows that end with a block, and rows that no 16 divides.
    for vocab in (16 * 8192, ODD_VOCAB // 16 * 16 + 8):
        compiler.label = {"dtype": "bfloat16", "vocab": vocab}
        launch_one_pass(torch.bfloat16, True, PolicyLossConfig(), vocab)


def main(target: str, what: str = "options") -> None:
    """Let the library launch its kernels into the compiler."""
    compiler = Compiler(target, compiles=what != "values")
    walks = {
        "options": every_option, "values": many_values, "hopper": hopper, "sweep": every_candidate, "ring": through_ring
    }  # fmt: skip
    with compiler.catching():
        walks[what](compiler)
    for row in compiler.rows.values():
        print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
