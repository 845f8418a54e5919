"""Every public function that computes, called once with stubbed launches: prints what it launches, a JSON line each.

python -m benchmarks.counts.calls
"""

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import egpo_kernels
from benchmarks.counts.launches import PADDING
from benchmarks.counts.operations import operations
from benchmarks.counts.stubbed import stubbed
from egpo_kernels import LossOutput, TokenLogProbs, pack_support

SEQUENCES, LENGTH, HIDDEN, VOCAB = 2, 4, 16, 128
LAYOUTS = ("padded", "packed")
Inputs = dict[str, Tensor]


def public() -> list[str]:
    """The public functions that compute: those with a backend."""
    found = {name: getattr(egpo_kernels, name) for name in egpo_kernels.__all__}
    functions = {name: one for name, one in found.items() if inspect.isfunction(one)}
    return [name for name, one in functions.items() if "backend" in inspect.signature(one).parameters]


def make_inputs(packed: bool) -> Inputs:
    """What the functions take, by their names for it: logits and hidden states in bfloat16, the rest as trainers give
    it; the last token of each sequence is masked.
    """
    generator = torch.Generator().manual_seed(0)
    rows = (SEQUENCES * LENGTH,) if packed else (SEQUENCES, LENGTH)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ends = torch.arange(SEQUENCES + 1) * LENGTH
    mask = (torch.arange(SEQUENCES * LENGTH) % LENGTH < LENGTH - 1).view(rows)
    return {
        "logits": drawn(*rows, VOCAB).bfloat16().requires_grad_(),
        "hidden": drawn(*rows, HIDDEN).bfloat16().requires_grad_(),
        "weight": drawn(VOCAB, HIDDEN).bfloat16().requires_grad_(),
        "log_probs": (-drawn(*rows).abs()).requires_grad_(),
        "old_log_probs": -drawn(*rows).abs(),
        "tokens": torch.randint(0, VOCAB, rows, generator=generator),
        "advantages": drawn(SEQUENCES),
        "groups": torch.zeros(SEQUENCES, dtype=torch.long),
        "rewards": torch.arange(SEQUENCES).float(),
        "mask": mask,
    } | ({"cu_seqlens": ends} if packed else {})


def call(name: str, inputs: Inputs, **options: Any) -> Callable[[], None]:
    """A public function on what it takes of ``inputs``, and backward from what it returns, where there is one."""
    function = getattr(egpo_kernels, name)
    given = {key: value for key, value in inputs.items() if key in inspect.signature(function).parameters}

    def run() -> None:
        for value in inputs.values():
            value.grad = None
        found = function(**given, **options, backend="triton")
        if isinstance(found, LossOutput):
            found.loss.backward()
        elif isinstance(found, TokenLogProbs):
            # An upstream gradient that is there already, so that no sum of the caller's is counted.
            found.log_probs.backward(upstream)

    upstream = torch.ones_like(inputs["old_log_probs"])
    return run


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Each function in each layout, and what is asked of it otherwise that costs other launches."""
    for layout in LAYOUTS:
        inputs = make_inputs(layout == "packed")
        for name in public():
            yield f"{name}, {layout}", call(name, inputs)
        for name in ("logits_policy_loss", "egpo_loss"):
            yield f"{name}, {layout}, no metrics", call(name, inputs, metrics="none")
    inputs = make_inputs(packed=False)
    support = pack_support(torch.stack([inputs["tokens"], inputs["tokens"].flip(-1)], -1))
    for name in ("token_log_probs", "logits_policy_loss", "linear_policy_loss"):
        yield f"{name}, padded, kept tokens", call(name, inputs, support=support)
    # A rank alone in its group: what is behind its columns is padding.
    inputs["tokens"] %= VOCAB - PADDING
    for name in ("token_log_probs", "logits_policy_loss", "linear_policy_loss"):
        yield f"{name}, padded, split", call(name, inputs, vocab_size=VOCAB - PADDING)


def count(run: Callable[[], None], launched: list[str]) -> dict[str, list[str]]:
    """Launches of the library's kernels and of torch's own, of a call that is not the first."""
    run()
    launched.clear()
    found = operations(run)
    return {"launches": list(launched), "operations": found}


def main() -> None:
    """Count all."""
    with stubbed() as launched:
        for name, run in cases():
            print(json.dumps({"name": name, **count(run, launched)}), flush=True)


if __name__ == "__main__":
    main()
