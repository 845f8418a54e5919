"""Hooks on a model, its head and its parts: those that look are gone through, those that change something refused."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

from egpo_kernels.integrations.transformers import fuse_policy_loss
from tests.integrations.models import (
    assert_same,
    from_logits,
    fused,
    fused_already,
    make_batch,
    make_model,
)
from tests.integrations.wrappers import halved, pair, patch
from tests.support.accuracy import assert_rounding


def test_a_hook_that_looks():
    """It sees a tensor, and changes nothing."""
    model, batch = pair()
    expected = from_logits(model, batch)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model.lm_head.register_forward_pre_hook(lambda module, inputs: None)
    fuse_policy_loss(model)
    shapes.clear()
    assert_same(fused_already(model, batch), expected)
    assert shapes == [(1, 1, 1)]
    with torch.no_grad():
        model(batch.ids, policy={"tokens": batch.policy["tokens"], "return_entropy": True})
    assert shapes[1:] == [(*batch.ids.shape, 1)]


HOOKS = {
    "output": lambda module, inputs, output: output * 2,
    "output in place": lambda module, inputs, output: output.mul_(2) and None,
    "input": lambda module, inputs: (inputs[0] + 1,),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_changes_something_is_refused_by_name(kind, when):
    model, batch = pair()
    register = "register_forward_pre_hook" if kind == "input" else "register_forward_hook"
    if when == "before":
        getattr(model.lm_head, register)(HOOKS[kind])
        with pytest.raises(ValueError, match=r"a forward (pre-)?hook tests.integrations.test_wrappers_hooks.<lambda>"):
            fuse_policy_loss(model)
    else:
        fuse_policy_loss(model)
        getattr(model.lm_head, register)(HOOKS[kind])
        with pytest.raises(ValueError, match=r"a forward (pre-)?hook tests.integrations.test_wrappers_hooks.<lambda>"):
            model(batch.ids, policy=batch.policy)


CHANGES = {
    "in training": lambda module, inputs, output: output * 0.5 if module.training else None,
    "with a gradient": lambda module, inputs, output: output * 0.5 if output.requires_grad and output.dim() else None,
    "narrower": lambda module, inputs, output: output.bfloat16() if output.numel() == 1 else None,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_hook_that_changes_something_now_and_then(name):
    """Where it was not seen when it was tried, it is in the call."""
    model, batch = pair()
    exact = from_logits(model, batch).loss
    model.lm_head.register_forward_hook(CHANGES[name])
    if name == "narrower":  # a dtype alone is taken back
        assert_rounding(fused(model, batch).loss, exact)
        return
    with pytest.raises(ValueError, match=r"changes what the head returns|came back with other numbers"):
        fuse_policy_loss(model)
        model.train()
        model(batch.ids, policy=batch.policy)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_on_the_model_that_changes_its_logits_is_refused(when):
    model, batch = pair()

    def scale(module, inputs, output):
        if hasattr(output, "logits"):
            output.logits = output.logits * 0.5

    def register():
        model.register_forward_hook(scale)

    if when == "before":
        register()
    with pytest.raises(
        ValueError, match=r"test_wrappers_hooks\.test_a_hook_on_the_model.* changes what the model returns"
    ):
        fuse_policy_loss(model)
        register()
        model(batch.ids, policy=batch.policy)


@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_backward_hooks_of_the_head_are_refused(kind):
    model, _ = pair()
    getattr(model.lm_head, f"register_{kind}")(lambda *_: None)
    with pytest.raises(ValueError, match=r"the head has a backward hook tests\.integrations"):
        fuse_policy_loss(model)


def test_inside_of_adapters():
    """Parts of peft's layers are read, and never called."""
    peft = pytest.importorskip("peft", reason="peft is not installed (make parity installs it)")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    for part in ("base_layer", "lora_A", "lora_B"):
        for late in (False, True):
            model = peft.get_peft_model(make_model(), config)
            batch = make_batch(model)
            head = model.get_base_model().lm_head
            inner = head.base_layer if part == "base_layer" else getattr(head, part)["default"]
            if late:
                fuse_policy_loss(model)
            patch(inner, halved)
            with pytest.raises(ValueError, match=r"within the head, around Linear, stands tests\.integrations"):
                fuse_policy_loss(model) if not late else model(batch.ids, policy=batch.policy)


def test_around_one_of_several_heads():
    peft = pytest.importorskip("peft", reason="peft is not installed (make parity installs it)")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    for late in (False, True):
        model = peft.get_peft_model(make_model(), config)
        batch = make_batch(model)
        head = model.get_base_model().lm_head
        if late:
            fuse_policy_loss(model)
        head.modules_to_save["default"].register_forward_hook(lambda *given: given[2] * 2)
        with pytest.raises(ValueError, match="within the head, around Linear, stands"):
            fuse_policy_loss(model) if not late else model(batch.ids, policy=batch.policy)
