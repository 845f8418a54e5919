"""The code of pages that need another package runs, and leaves gradients."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

from tests.integrations.models import make_batch, make_model
from tests.support.accuracy import assert_bits
from tests.support.page import blocks, run


def test_transformers():
    model = make_model()
    batch = make_batch(model)
    names = {"torch": torch, "model": model, "input_ids": batch.ids, "attention_mask": batch.attention}
    names |= {"response_mask": batch.attention.bool(), "advantages": batch.policy["advantages"]}
    names = run("docs/transformers.md", names)
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    assert_bits(names["metrics"]["policy/tokens/sum"].long(), names["mask"].sum(), "tokens")
    assert names["logits"].shape == (*batch.ids.shape, model.config.vocab_size)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trl(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed (make parity installs it)")
    from tests.integrations.trl_runs import tokenizer

    model = make_model()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (block,) = blocks("docs/trl.md")
    for text, here in {"HuggingFaceTB/SmolLM2-135M-Instruct": f"{tmp_path}", "egpo-out": f"{tmp_path}/out"}.items():
        assert text in block
        block = block.replace(text, here)
    names = {}
    exec(block, names)
    trainer = names["trainer"]
    assert trainer.recipe.loss.clip_high == 0.28 and trainer.state.global_step == 2
    # Nobody answers right: that teaches too.
    assert not torch.equal(trainer.model.lm_head.weight, model.lm_head.weight)
