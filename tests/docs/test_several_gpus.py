"""The page of more than one GPU, started by torchrun with two processes, as it tells readers to."""

import os
import subprocess
import sys

import pytest
import torch

import egpo_kernels as ek
from tests.integrations.ranks import free_port
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.page import ROOT, blocks

pytestmark = pytest.mark.cpu
KEPT = """
import os
import torch.distributed as dist
names = ("loss", "logits", "weight", "leaf", "part", "spread", "head", "states", "hidden", "whole", "tokens",
    "advantages", "old_log_probs")
kept = {}
for name in names:
    value = globals()[name]
    kept[name] = value.detach().to_local() if hasattr(value, "to_local") else value.detach()
    if value.requires_grad and value.is_leaf:
        grad = value.grad
        kept["gradient of " + name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
torch.save(kept, f"{os.environ['KEPT_IN']}/{rank}.pt")
dist.barrier()
os._exit(0)
"""


def test_the_page_under_torchrun(tmp_path):
    script = tmp_path / "split.py"
    script.write_text("\n".join(blocks("docs/several_gpus.md")) + KEPT)
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), str(script)]
    added = {"KEPT_IN": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *launch], env=os.environ | added, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in ("loss", "old_log_probs"):
        assert_bits(ranks[1][name], ranks[0][name], name)
    hidden, head = (ranks[0][name].clone().requires_grad_() for name in ("hidden", "whole"))
    tokens, advantages, old = (ranks[0][name] for name in ("tokens", "advantages", "old_log_probs"))
    loss = ek.linear_policy_loss(hidden, head, tokens, advantages, old_log_probs=old).loss
    loss.backward()
    assert_rounding(ranks[0]["loss"], loss.detach())
    # Three losses went back into each rank's rows.
    assert_rounding(torch.cat([rank["gradient of weight"] for rank in ranks]), 3 * head.grad)
    assert_rounding(torch.cat([rank["gradient of part"] for rank in ranks], 1), hidden.grad)
    for rank in ranks:
        assert_rounding(rank["gradient of leaf"], hidden.grad)
        assert_rounding(rank["gradient of states"], hidden.grad)
        assert_rounding(rank["gradient of head"], head.grad)
