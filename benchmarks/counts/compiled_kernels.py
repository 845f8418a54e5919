"""Compile every kernel the library would launch, for a GPU that need not be there; print a JSON line for each.

    python -m benchmarks.counts.compiled_kernels sm_90            # every dtype and option
    python -m benchmarks.counts.compiled_kernels sm_90 compiles   # the same without disassembly, which takes longest
    python -m benchmarks.counts.compiled_kernels sm_90 values     # one of each, many values; specialised, not compiled
    python -m benchmarks.counts.compiled_kernels sm_90 hopper     # those over logits, as a Hopper is meant to run them
    python -m benchmarks.counts.compiled_kernels sm_90 sweep      # with each constant of the sweep; no disassembly
    python -m benchmarks.counts.compiled_kernels sm_90 ring       # the kernel that no rule of the table launches

The library's own host code runs on CPU tensors, so that whatever is added to the library is covered.
"""

import dataclasses
import itertools
import json
import sys

import torch

from benchmarks.counts.launches import (
    GROUP_CONFIGS,
    LOSS_CONFIGS,
    ROW_CONFIGS,
    VOCAB,
    Size,
    launch_groups,
    launch_kept,
    launch_log_probs,
    launch_logits,
    launch_one_pass,
    launch_rows,
    launch_shards,
    make_rows,
)
from benchmarks.counts.offline import Compiler
from benchmarks.gpu.candidates import KERNELS, candidates, problem_of, using
from benchmarks.ring import switched_on
from egpo_kernels import AdvantageConfig, PolicyLossConfig

ODD_VOCAB = 151665


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
    for dtype, full in itertools.product((torch.bfloat16, torch.float16, torch.float32, torch.float64), (False, True)):
        compiler.label = {"dtype": str(dtype).removeprefix("torch."), "entropy": full}
        launch_kept(dtype, full)
        launch_shards(dtype, full)
    for dtype in (torch.float32, torch.float64):
        compiler.label = {"dtype": str(dtype).removeprefix("torch.")}
        for full, config, kl in itertools.product((False, True), LOSS_CONFIGS, ("k1", "k2", "k3")):
            if kl == "k3" or (full and config.surrogate == "clip"):
                launch_log_probs(dtype, full, dataclasses.replace(config, kl=kl))
        launch_rows(dtype, True, None)
        for full, config in itertools.product((False, True), ROW_CONFIGS):
            launch_rows(dtype, full, config)
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
            rows = PolicyLossConfig(reduction="seq_mean_token_sum_norm", norm_length=number)
            launch_rows(dtype, True, rows, size)
            launch_rows(dtype, False, rows, size)
            launch_kept(logits, True, size, scale=0.5 * number)
            launch_shards(logits, True, size, 32000 + 64 * number, 0.5 * number)
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
    compiler = Compiler(target, compiles=what != "values", disassembles=what not in ("compiles", "sweep"))
    walks = {
        "options": every_option, "compiles": every_option, "values": many_values, "hopper": hopper,
        "sweep": every_candidate, "ring": through_ring,
    }  # fmt: skip
    with compiler.catching():
        walks[what](compiler)
    for row in compiler.rows.values():
        print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
