"""The demo's sampler draws from the fewest tokens that hold top-p, and records them; with top-p 1 it does neither."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

from demo.model import MAX_NEW_TOKENS
from tests.demo.tiny import make_policy
from tests.support.accuracy import assert_rounding

PROMPTS = ["9 10", "11 12 13 14", "15"]
GROUP_SIZE = 8
TEMPERATURE = 0.7


def sampled(policy, top_p):
    generator = torch.Generator().manual_seed(0)
    return policy.sample(policy.encode(PROMPTS), GROUP_SIZE, TEMPERATURE, top_p, generator)


@torch.no_grad()
def probabilities(policy, prompt, tokens):
    """Of every token after a prompt, [T, V]: the model's own forward over all, unpadded and without a cache."""
    ids = torch.tensor([*map(int, prompt.split()), *tokens])[None]
    logits = policy.model(ids).logits[0, -len(tokens) - 1 :]
    return (logits / TEMPERATURE).softmax(-1)


def fewest(shares, top_p):
    """Add the largest shares up until they hold top-p."""
    kept, total = [], 0.0
    for token in shares.argsort(descending=True).tolist():
        kept.append(token)
        total += shares[token].item()
        if total >= top_p:
            return kept
    return kept


@pytest.mark.parametrize("top_p", [0.3, 0.9])
@pytest.mark.parametrize("fused_linear", [False, True])
def test_what_is_recorded_is_what_was_sampled_from(fused_linear, top_p):
    policy = make_policy(fused_linear)
    answers = sampled(policy, top_p)
    asked = [prompt for prompt in PROMPTS for _ in range(GROUP_SIZE)]
    sizes = []
    for index, (prompt, kept) in enumerate(zip(asked, answers.kept, strict=True)):
        mask = answers.mask[index]
        tokens = answers.tokens[index][mask].tolist()
        shares = probabilities(policy, prompt, tokens)[:-1]
        assert [set(ids) for ids in kept] == [set(fewest(row, top_p)) for row in shares]
        assert all(token in ids for token, ids in zip(tokens, kept, strict=True))
        held = [row[ids] / row[ids].sum() for row, ids in zip(shares, kept, strict=True)]
        own = [row[ids.index(token)] for row, token, ids in zip(held, tokens, kept, strict=True)]
        assert_rounding(answers.log_probs[index][mask], torch.stack(own).log())
        assert_rounding(answers.entropies[index][mask], torch.stack([-(row * row.log()).sum() for row in held]))
        sizes += map(len, kept)
    assert 1 in sizes and 1 < max(sizes) < policy.model.config.vocab_size
    assert not answers.mask.all()  # some ended early: what is behind has no record


def test_a_record_goes_to_the_rows_of_its_answers():
    answers = sampled(make_policy(), 0.9)
    chosen = slice(5, 12)
    support = answers.support(chosen)
    rows = [ids.tolist() for ids in support.ids.split(support.offsets.diff().tolist())]
    length = answers.tokens.shape[1]
    assert rows == [ids for kept in answers.kept[chosen] for ids in [*kept, *[[]] * (length - len(kept))]]


@torch.no_grad()
def test_all_of_the_probability_is_sampled_as_ever_and_leaves_no_record():
    policy = make_policy()
    answers = sampled(policy, 1.0)
    assert answers.kept is None and answers.support(slice(None)) is None
    generator = torch.Generator().manual_seed(0)
    asked = [prompt for prompt in PROMPTS for _ in range(GROUP_SIZE)]
    tokens = [[] for _ in asked]
    for _ in range(answers.tokens.shape[1]):
        last = torch.stack([probabilities(policy, *each)[-1] for each in zip(asked, tokens, strict=True)])
        for own, token in zip(tokens, torch.multinomial(last, 1, generator=generator).tolist(), strict=True):
            own += token
    assert answers.tokens.tolist() == tokens
    assert answers.tokens.shape[1] == MAX_NEW_TOKENS


def test_where_every_token_is_needed_none_is_left_out_or_recorded():
    policy = make_policy()
    policy.model.lm_head.weight.data.zero_()  # equal logits: all but one of them hold less than top-p
    answers = sampled(policy, 0.999)
    assert not any(ids for kept in answers.kept for ids in kept)
    assert set(map(len, answers.kept)) == set(answers.mask.sum(1).tolist())
    every = torch.tensor(float(policy.model.config.vocab_size), dtype=torch.float64)
    assert_rounding(answers.log_probs[answers.mask], -every.log().expand(int(answers.mask.sum())))
