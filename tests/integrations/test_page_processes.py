"""The page of own loops under two processes: the same update as one process that has the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="accelerate is not installed (make parity installs it)")

import egpo_kernels as ek
from tests.integrations.ranks import RANKS, announce, free_port, leave
from tests.support.accuracy import assert_rounding
from tests.support.page import at_hand, blocks


class Table(nn.Module):
    """The model that readers have at hand, as a module."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def updated(first: int, last: int) -> Tensor:
    """The model's weights after the page's accelerate loop over some of the answers."""
    names = at_hand()
    model = Table(names["table"])
    per_answer = ("input_ids", "tokens", "mask", "old_log_probs", "rewards")
    names |= {name: names[name][first:last] for name in per_answer}
    names |= {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "recipe": ek.recipes.EGPO}
    names |= {
        "micro_batches": torch.arange(last - first).split(2),
        "group_advantages": ek.group_advantages,
        "logits_policy_loss": ek.logits_policy_loss,
    }
    _, spread = blocks("docs/pytorch.md")
    exec(spread, names)
    return model.table.detach()


def process(rank: int, port: int, folder: Path) -> None:
    """One of two, with half of the answers each."""
    announce(rank, port)
    torch.save(updated(8 * rank, 8 * rank + 8), folder / f"{rank}.pt")
    leave()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(process, (free_port(), tmp_path), nprocs=RANKS)
    expected = updated(0, 16)
    assert (expected - at_hand()["table"]).abs().max() > 0
    for rank in range(RANKS):
        assert_rounding(torch.load(tmp_path / f"{rank}.pt"), expected)
