"""What the sweep tries: the library's own kernels over logits, with other launch constants than its table has."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import egpo_kernels as ek
import egpo_kernels.triton as backend
from egpo_kernels.config.results import Rows
from egpo_kernels.triton import launch
from egpo_kernels.triton.launch import Constants, Ring

ITEMSIZE = 2
"""Of the bfloat16 that is swept."""
CONFIG = ek.PolicyLossConfig(reduction="sum")
NO_RING = Ring(0, 0, 0)
Outputs = dict[str, Tensor]


class Problem(NamedTuple):
    """Logits ``[1, N, V]``, their rows, and what the kernel for the gradient is given: statistics and upstream."""

    logits: Tensor
    rows: Rows
    statistics: list[Tensor]
    upstream: Tensor


def problem_of(logits: Tensor, rows: Rows, upstream: Tensor) -> Problem:
    """With the statistics that the table's constants give."""
    _, entropy, maximum, sum_exp = backend.row_statistics(logits, rows, 1.0, True)
    return Problem(logits, rows, [maximum, sum_exp, entropy], upstream)


class Kernel(NamedTuple):
    """A kernel, the passes over the logits that it must make, and how the library launches it."""

    name: str
    passes: int
    run: Callable[[Problem, Tensor], Outputs]


def _one_pass(problem: Problem, out: Tensor) -> Outputs:
    found = backend.logits_loss_gradient(problem.logits, problem.rows, CONFIG, 1.0, 1.0, True, out)
    return {"log_probs": found[0], "entropy": found[1], "loss gradient": out[0]}


def _values(problem: Problem, out: Tensor) -> Outputs:
    log_probs, entropy, _, _ = backend.row_statistics(problem.logits, problem.rows, 1.0, True)
    return {"log_probs": log_probs, "entropy": entropy}


def _gradient(problem: Problem, out: Tensor) -> Outputs:
    backend.logits_gradient(problem.logits, problem.rows, problem.statistics, [problem.upstream, None], 1.0, out)
    return {"gradient": out[0]}


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("logits_policy_loss_kernel", 2, _one_pass),
        Kernel("row_statistics_kernel", 1, _values),
        Kernel("logits_gradient_kernel", 2, _gradient),
    )
}


class Candidate(NamedTuple):
    """A kernel and the constants to launch it with."""

    kernel: str
    constants: Constants

    @property
    def title(self) -> str:
        """In words, for tables."""
        constants = self.constants._asdict()
        constants |= {f"ring {name}": value for name, value in (constants.pop("ring") or NO_RING)._asdict().items()}
        return ", ".join(f"{name} {value}" for name, value in constants.items() if value)


def candidates(device: torch.device, vocab: int) -> list[Candidate]:
    """The table's own constants first, then others; few on a CPU, which has no opinion."""
    own = {name: launch.constants_for(name, vocab, ITEMSIZE, device) for name in KERNELS}
    found = [Candidate(name, constants) for name, constants in own.items()]
    if device.type == "cpu":
        name = "logits_policy_loss_kernel"
        found.append(Candidate(name, own[name]._replace(num_warps=2)))
    else:
        found += _loss_candidates(own["logits_policy_loss_kernel"])
        if launch.architecture(device) == "sm_90":
            found += _ring_candidates(own["logits_policy_loss_kernel"])
        found += _value_candidates(own["row_statistics_kernel"])
        found += _gradient_candidates(own["logits_gradient_kernel"])
    return list(dict.fromkeys(found))


def _loss_candidates(own: Constants) -> Iterator[Candidate]:
    name = "logits_policy_loss_kernel"
    # From 4 KiB a block to 64, one block at a time and several on their way.
    blocks = [(4, 4), (4, 8), (8, 2), (8, 4), (8, 8), (16, 1), (16, 2), (16, 4), (32, 1), (32, 2)]
    for warps, strips in blocks:
        for stages in (1, 3, 4):
            yield Candidate(name, Constants(warps, strips, stages, min(2 * strips, 8), 1))
    for warps, strips, programs in ((4, 4, 2), (4, 8, 2), (4, 4, 4), (8, 4, 2)):
        yield Candidate(name, Constants(warps, strips, 3, strips, programs))
    for stages in (1, 2, 3, 4, 6):
        yield Candidate(name, own._replace(stages=stages))
    for strips in (1, 2, 4, 8):
        yield Candidate(name, own._replace(gradient_strips=strips))


def _ring_candidates(own: Constants) -> Iterator[Candidate]:
    # From 8 KiB a slot to 32, of 227 KiB; fewer slots leave more of the row to the cache.
    for warps, strips, slots in ((8, 4, 13), (8, 4, 10), (8, 2, 26), (4, 8, 13), (16, 2, 13), (16, 1, 26), (16, 4, 6)):
        yield Candidate("logits_policy_loss_kernel", own._replace(ring=Ring(warps, strips, slots)))


def _value_candidates(own: Constants) -> Iterator[Candidate]:
    for warps in (2, 4, 8, 16):
        for strips in (2, 4, 8):
            for stages in (1, 3):
                # As many warps to a processor as the table's, so that a thread has the registers it needs.
                changes = {"num_warps": warps, "strips": strips, "stages": stages, "programs": 16 // warps}
                yield Candidate("row_statistics_kernel", own._replace(**changes))
    for stages in (2, 4, 6):
        yield Candidate("row_statistics_kernel", own._replace(stages=stages))


def _gradient_candidates(own: Constants) -> Iterator[Candidate]:
    for warps in (4, 8, 16):
        for strips in (2, 4, 8):
            for programs in (1, 2, 4):
                if warps * programs <= 16:
                    constants = own._replace(num_warps=warps, gradient_strips=strips, programs=programs)
                    yield Candidate("logits_gradient_kernel", constants)


@contextlib.contextmanager
def using(candidate: Candidate) -> Iterator[None]:
    """Let its kernel be launched with its constants, whatever the table says."""
    rule = launch.Rule(candidate.kernel, "", launch.ANY, 0, candidate.constants)
    with mock.patch.object(launch, "TABLE", (rule, *launch.TABLE)):
        yield
