"""Models whose weights are elsewhere until a module's forward."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import assert_same, differentiated, fused, make_batch, make_model
from tests.integrations.ranks import RANKS, WAYS, start


def test_ranks_together_compute_the_same(tmp_path):
    torch.multiprocessing.spawn(start, (tmp_path, list(WAYS)), nprocs=RANKS)


def keep_apart(module):
    """Gather a module's weights in its own forward and backward only, as ZeRO-3's hooks do."""
    kept = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def gather(*_):
        for name, parameter in module.named_parameters():
            parameter.data = kept[name].clone()

    def release(*_):
        for parameter in module.parameters():
            parameter.data = parameter.new_empty(0)

    def after(module, inputs, output):
        release()
        if output.requires_grad:
            output.register_hook(gather)

    release()
    module.register_forward_pre_hook(gather)
    module.register_forward_hook(after)


def test_weights_gathered_module_by_module():
    model, other = make_model().double(), make_model().double()
    batch = make_batch(make_model()).double()
    expected = fused(model, batch)
    keep_apart(other.lm_head)
    fuse_policy_loss(other)
    output = other(batch.ids, attention_mask=batch.attention, policy=batch.policy)
    assert other.lm_head.weight.numel() == 0
    assert_same(differentiated(other, output), expected)
