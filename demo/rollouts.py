"""Saved answers as tensors, packed: what the records of `rollouts.jsonl` hold.

Shapes: S answers, N tokens of all answers one after the other, answer i owning `cu_seqlens[i] : cu_seqlens[i + 1]`.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from egpo_kernels import diagnostics

FILE = "rollouts.jsonl"


class Rollouts(NamedTuple):
    """S answers: names of their groups, `rewards` [S], whether they `ended` [S], and per-token tensors [N] in nats."""

    groups: list[str]
    rewards: torch.Tensor
    ended: torch.Tensor
    cu_seqlens: torch.Tensor
    log_probs: torch.Tensor
    entropies: torch.Tensor

    @property
    def correct(self) -> torch.Tensor:
        return self.rewards == 1

    @property
    def lengths(self) -> torch.Tensor:
        """Counted tokens of each answer, int64 [S]."""
        return self.cu_seqlens.diff()

    @property
    def uncertainty(self) -> torch.Tensor:
        """H of each answer [S], whatever statistic the run's recipe takes."""
        return diagnostics.span_uncertainty(self.log_probs, cu_seqlens=self.cu_seqlens)

    def spans(self) -> dict[str, torch.Tensor]:
        """Parts of every answer, bool [N] each; an answer that was cut off has no end token."""
        end = torch.zeros_like(self.log_probs, dtype=torch.bool)
        end[self.cu_seqlens[1:][self.ended] - 1] = True
        return {"whole answer": torch.ones_like(end), "without end token": ~end, "end token alone": end}

    def curves(self) -> dict[str, diagnostics.Roc]:
        """Uncertainty as a predictor of incorrectness, over each span."""
        return diagnostics.roc_of_spans(self.log_probs, self.spans(), self.correct, cu_seqlens=self.cu_seqlens)

    def mixed_groups(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each group with both kinds: H of its correct and of its incorrect answers."""
        kinds: dict[str, tuple[list[float], list[float]]] = {}
        for group, correct, uncertainty in zip(
            self.groups, self.correct.tolist(), self.uncertainty.tolist(), strict=True
        ):
            kinds.setdefault(group, ([], []))[0 if correct else 1].append(uncertainty)
        return [tuple(map(torch.tensor, both)) for both in kinds.values() if all(both)]


def auc_inside(groups: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share of correct-incorrect pairs of one group in which the incorrect answer is the more uncertain, ties half.

    NaN without a pair.
    """
    margins = torch.cat([(wrong[:, None] - right).flatten() for right, wrong in groups] or [torch.zeros(0)])
    return ((margins > 0).double() + (margins == 0) / 2).mean().item() if len(margins) else math.nan


def read_records(folder: Path) -> list[dict]:
    """The records of a run, in the order of sampling."""
    with (folder / FILE).open() as file:
        return [json.loads(line) for line in file]


def pack(records: list[dict]) -> Rollouts:
    """Records of answers, of memory or file, as tensors."""
    lengths = torch.tensor([len(record["log_probs"]) for record in records])
    return Rollouts(
        groups=[f"{record['step']}/{record['group']}" for record in records],
        rewards=torch.tensor([record["reward"] for record in records]),
        ended=torch.tensor([record["ended"] for record in records]),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        log_probs=torch.tensor([value for record in records for value in record["log_probs"]]),
        entropies=torch.tensor([value for record in records for value in record["entropies"]]),
    )
