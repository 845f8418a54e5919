"""The page's code runs, and leaves gradients."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

from tests.integrations.models import make_batch, make_model
from tests.support.accuracy import assert_bits

PAGE = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"


def test_every_block_runs():
    model = make_model()
    batch = make_batch(model)
    names = {"torch": torch, "model": model, "input_ids": batch.ids, "attention_mask": batch.attention}
    names |= {"response_mask": batch.attention.bool(), "advantages": batch.policy["advantages"]}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(block, names)
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    assert_bits(names["metrics"]["policy/tokens/sum"].long(), names["mask"].sum(), "tokens")
    assert names["logits"].shape == (*batch.ids.shape, model.config.vocab_size)
