"""Compile every kernel the library would launch, for a GPU that need not be there; print a JSON line for each.

    python -m tests.support.compiled_kernels sm_90

The library's own host code runs on CPU tensors; where it would launch a kernel, the kernel is compiled for the very
arguments instead (types, divisibility, absent tensors), so that whatever is added to the library is covered.
"""

import itertools
import json
import sys
from typing import Any

import torch
from triton.runtime.jit import JITFunction, type_canonicalisation_dict

import egpo_kernels.triton as backend
from egpo_kernels import AdvantageConfig, PolicyLossConfig
from egpo_kernels.types import Rows
from tests.support.offline import compile_kernel

VOCAB, SEQUENCES, LENGTH = 151936, 2, 2


def leaf(value: Any, specialised: bool = True) -> Any:
    """The type an argument has in a launch, as `compile_kernel` wants it; constants stay what they are."""
    if isinstance(value, tuple):
        members = [leaf(member) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    if isinstance(value, torch.Tensor):
        name = type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
        return f"*{name}" + (":16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int) and not isinstance(value, bool) and not (specialised and value == 1):
        name = "i32" if -(2**31) <= value < 2**31 else "i64"
        return name + (":16" if specialised and value % 16 == 0 else "")
    return value


class Compiler:
    """Stands in for `JITFunction.run`: compiles what would be launched, once for each set of types."""

    def __init__(self, target: str) -> None:
        self.target, self.seen, self.label = target, set(), {}

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """Compile ``kernel`` for these arguments and print what came of it."""
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constant = {p.name for p in kernel.params if p.is_constexpr}
        free = {p.name for p in kernel.params if p.do_not_specialize}
        constants = {name: given[name] for name in kernel.arg_names if name in constant}
        types = {name: leaf(given[name], name not in free) for name in kernel.arg_names if name not in constant}
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        key = repr((kernel.__name__, types, constants, options))
        if key not in self.seen:
            self.seen.add(key)
            found = compile_kernel(kernel, types, constants, self.target, **options)._asdict()
            del found["sass"]
            print(json.dumps({"kernel": kernel.__name__, **self.label, **found}), flush=True)


def make_rows(dtype: torch.dtype, full: bool) -> Rows:
    """Rows with every optional tensor, or with none."""
    count = SEQUENCES * LENGTH

    def vector() -> torch.Tensor:
        return torch.ones(count, dtype=dtype)

    optional = vector() if full else None
    mask, tokens = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.long)
    return Rows(mask, tokens, optional, vector(), vector(), optional, optional, optional)


def compile_logits(dtype: torch.dtype, full: bool, entropy: bool) -> None:
    """The kernels over logits, as `logits_policy_loss` and `token_log_probs` launch them."""
    logits = torch.zeros(SEQUENCES, LENGTH, VOCAB, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rows, config = make_rows(compute, full), PolicyLossConfig(entropy_coef=0.1 if entropy else 0.0)
    log_probs, bonus, maximum, sum_exp = backend.row_statistics(logits, rows, 1.0, entropy)
    upstream = [log_probs, log_probs.clone() if entropy else None]
    backend.logits_gradient(logits, rows, [maximum, sum_exp, bonus], upstream, 1.0, torch.zeros_like(logits))
    backend.logits_loss_gradient(logits, rows, config, 1.0, 1.0, entropy, torch.zeros_like(logits))
    backend.rescale_(logits, torch.ones(()), 2.0)


def compile_log_probs(dtype: torch.dtype, full: bool, ratio: str, kl: str) -> None:
    """The kernels of `policy_loss`."""
    rows, config = make_rows(dtype, full), PolicyLossConfig(ratio=ratio, kl=kl)
    log_probs, index = torch.zeros(SEQUENCES * LENGTH, dtype=dtype), torch.arange(SEQUENCES).repeat_interleave(LENGTH)
    segments = [torch.arange(SEQUENCES + 1) * LENGTH, index]
    entropy = log_probs.clone() if full else None
    backend.policy_loss(log_probs, entropy, rows, segments, config, VOCAB)
    backend.policy_loss_gradient(log_probs, entropy, rows, segments, config)


def compile_groups(dtype: torch.dtype, config: AdvantageConfig, full: bool) -> None:
    """The kernels of `group_advantages`."""
    ids, rewards = torch.zeros(SEQUENCES, dtype=torch.long), torch.ones(SEQUENCES, dtype=dtype)
    values = torch.zeros(SEQUENCES * LENGTH, dtype=dtype) if full else None
    mask = torch.ones(SEQUENCES * LENGTH, dtype=torch.bool) if full else None
    correct = torch.ones(SEQUENCES, dtype=torch.bool) if full else None
    offsets = torch.arange(SEQUENCES + 1) * LENGTH
    backend.group_advantages(ids, rewards, correct, values, mask, offsets, config, SEQUENCES if full else None)


GROUP_CONFIGS = (
    AdvantageConfig(),
    AdvantageConfig(weight="none", clamp="none", all_wrong="zero"),
    AdvantageConfig(clamp="symmetric", renorm="after", all_wrong="negative_no_correct", lock_all_wrong=True),
    AdvantageConfig(clamp="negative_only", renorm="before", scale="none", singleton="raw"),
)


def main(target: str) -> None:
    """Walk over dtypes and options."""
    compiler = Compiler(target)
    JITFunction.run = lambda kernel, *args, **kwargs: compiler.run(kernel, *args, **kwargs)
    bfloat16 = itertools.product((torch.bfloat16,), (False, True), (False, True))
    others = itertools.product((torch.float16, torch.float32, torch.float64), (True,), (False, True))
    for dtype, full, entropy in itertools.chain(bfloat16, others):
        compiler.label = {"dtype": str(dtype).removeprefix("torch."), "entropy": entropy}
        compile_logits(dtype, full, entropy)
    for dtype in (torch.float32, torch.float64):
        compiler.label = {"dtype": str(dtype).removeprefix("torch.")}
        for full, ratio, kl in itertools.product((False, True), ("token", "sequence"), ("k1", "k2", "k3")):
            if full or kl == "k3":
                compile_log_probs(dtype, full, ratio, kl)
        for number, config in enumerate(GROUP_CONFIGS):
            compile_groups(dtype, config, full=number % 2 == 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
