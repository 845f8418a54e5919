"""The code of pages that need another package runs, and leaves gradients."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

from tests.integrations.kept_sets import sets_with
from tests.integrations.models import VOCAB, make_batch, make_model
from tests.integrations.stand_ins import stand_in
from tests.support.accuracy import assert_bits
from tests.support.page import blocks


def test_transformers():
    model = make_model()
    batch = make_batch(model)
    names = {"torch": torch, "model": model, "input_ids": batch.ids, "attention_mask": batch.attention}
    names |= {"response_mask": batch.attention.bool(), "advantages": batch.policy["advantages"]}
    alone, _ = blocks("docs/transformers.md")  # the other is of tensor parallelism: tensor_parallel_ranks
    exec(alone, names)
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
    block, _ = blocks("docs/trl.md")
    for text, here in {"HuggingFaceTB/SmolLM2-135M-Instruct": f"{tmp_path}", "egpo-out": f"{tmp_path}/out"}.items():
        assert text in block
        block = block.replace(text, here)
    names = {}
    exec(block, names)
    trainer = names["trainer"]
    assert trainer.recipe.loss.clip_high == 0.28 and trainer.state.global_step == 2
    # Nobody answers right: that teaches too.
    assert not torch.equal(trainer.model.lm_head.weight, model.lm_head.weight)


class Engine:
    """In place of vLLM's, which needs a GPU: random answers of four tokens, and what was kept for each."""

    def __init__(self, model, return_sampling_mask, logprobs_mode):
        assert (model, return_sampling_mask, logprobs_mode) == ("here", True, "processed_logprobs")

    def generate(self, prompts, params):
        generator = torch.Generator().manual_seed(0)
        return [self.answer(torch.randint(3, VOCAB, (4,), generator=generator).tolist()) for _ in prompts]

    def answer(self, ids):
        mask = SimpleNamespace(token_ids=sets_with(ids, VOCAB))
        scores = [{token: SimpleNamespace(logprob=-1.0)} for token in ids]
        output = SimpleNamespace(token_ids=ids, logprobs=scores, sampling_mask=mask)
        return SimpleNamespace(prompt_token_ids=[1, 5], outputs=[output])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_engine_inside_trl(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed (make parity installs it)")
    from egpo_kernels.integrations.trl import EGPOTrainer
    from tests.integrations.trl_runs import run, steps

    stand_in(monkeypatch, "vllm", LLM=Engine, SamplingParams=SimpleNamespace)
    names = {"name": "here"}
    exec(blocks("docs/trl.md")[1], names)
    trainer = run(EGPOTrainer, tmp_path, max_steps=1, rollout_func=names["rollout"], top_p=0.95)
    (step,) = steps(trainer)
    assert (step["egpo/support/rows/sum"], step["egpo/support/missing_tokens/sum"]) == (32, 0)
    assert step["egpo/support/singletons/sum"] == 8 and step["grad_norm"] > 0
