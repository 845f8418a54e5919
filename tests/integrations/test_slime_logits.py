"""The adapter for slime on logits of the form that its source has, split over simulated ranks, against whole rows."""

import dataclasses
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch

from egpo_kernels import PolicyLossConfig, next_token_targets, policy_loss
from egpo_kernels.integrations.slime import samples_logits_policy_loss
from tests.integrations.kept_sets import joined, log_probs_over, sets_with
from tests.integrations.stand_ins import stand_in
from tests.support.accuracy import assert_bits, assert_rounding
from tests.support.page import run
from tests.support.ranks import in_ranks

VOCAB, COLUMNS = 29, 32
TOTAL, RESPONSE = [6, 4, 9, 3], [3, 2, 6, 0]
ROWS = sum(TOTAL) + 2  # slime pads what it packs
ENDS = list(itertools.accumulate(TOTAL))
SCORED = [row for end, count in zip(ENDS, RESPONSE, strict=True) for row in range(end - count - 1, end - 1)]
HEAT = 0.8
SETTINGS = [
    {},
    {"ratio": "sequence"},
    {"kl_coef": 0.1, "entropy_coef": 0.02},
    {"surrogate": "gmpo", "clip_low": 0.4, "clip_high": 0.4},
]


def made(dtype=torch.float64):
    """Logits ``[1, T, 32]`` of which 29 columns are tokens, and slime's micro-batch."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    tokens = [torch.randint(VOCAB, (count,), generator=generator) for count in TOTAL]
    now = whole_log_probs(logits, tokens)

    def near(spread):
        return list((now + spread * torch.randn(len(now), generator=generator, dtype=torch.float64)).split(RESPONSE))

    advantages = torch.tensor([1.2, -0.7, 0.9, 0.3], dtype=torch.float64)
    masks = [torch.ones(count, dtype=torch.long) for count in RESPONSE]
    masks[2][1:3] = 0  # a tool's output
    batch = {
        "unconcat_tokens": tokens,
        "total_lengths": TOTAL,
        "response_lengths": RESPONSE,
        "advantages": [each.expand(count) for each, count in zip(advantages, RESPONSE, strict=True)],
        "loss_masks": masks,
        "log_probs": near(0.3),
        "ref_log_probs": near(0.5),
    }
    return logits.to(dtype), {
        name: [each.to(dtype) if torch.is_tensor(each) and each.is_floating_point() else each for each in values]
        for name, values in batch.items()
    }


def sampled(tokens):
    return torch.cat([each[len(each) - count :] for each, count in zip(tokens, RESPONSE, strict=True)])


def whole_log_probs(logits, tokens, sets=None):
    """Those of the responses' tokens, row by row."""
    return log_probs_over(logits[0, SCORED] / HEAT, sampled(tokens), sets or [[]] * len(SCORED))


def reducer(batch):
    """What slime's `get_sum_of_sample_mean` returns without context parallelism."""

    def reduce(values):
        parts = zip(values.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
        return sum((part * mask).sum() / mask.sum().clamp(min=1) for part, mask in parts)

    return reduce


def by_whole_rows(logits, batch, config, columns=COLUMNS, sets=None):
    """Loss and gradient from log-probs and entropies of whole rows."""
    leaf = logits.clone().requires_grad_()
    own = leaf[..., :columns]
    log_softmax = (own[0, SCORED] / HEAT).log_softmax(-1)
    per_token = policy_loss(
        whole_log_probs(own, batch["unconcat_tokens"], sets),
        torch.cat(batch["log_probs"]),
        torch.cat(batch["advantages"]),
        torch.cat(batch["loss_masks"]),
        ref_log_probs=torch.cat(batch["ref_log_probs"]),
        entropy=-(log_softmax.exp() * log_softmax).sum(-1),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(RESPONSE)]),
        config=config,
    ).loss
    loss = reducer(batch)(per_token)
    loss.backward()
    return loss.detach(), leaf.grad


def over_ranks(size, logits, batch, config, **given):
    """Loss and gradient of all ranks together; what they sent."""

    def work(rank, group):
        leaf = logits.chunk(size, -1)[rank].clone().requires_grad_()
        output = leaf * 1.0
        loss, logged = samples_logits_policy_loss(
            output, batch["log_probs"], batch, reducer(batch), config, temperature=HEAT, vocab_group=group, **given
        )
        assert_bits(logged["loss"], loss.detach(), "logged loss")
        loss.backward()
        assert output.detach().equal(leaf.grad) == given.get("inplace_grad", False)
        return loss.detach(), leaf.grad

    found = in_ranks(size, work)
    for loss, _ in found.results:
        assert_bits(loss, found.results[0][0], "loss")
    return found.results[0][0], torch.cat([gradient for _, gradient in found.results], -1), found.calls


@pytest.mark.parametrize("inplace_grad", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("settings", SETTINGS)
def test_ranks_together_have_the_loss_of_whole_rows(settings, size, inplace_grad):
    """Padded columns count, as they do in slime's own log-probs."""
    logits, batch = made()
    config = PolicyLossConfig(reduction="none", **settings)
    loss, gradient, calls = over_ranks(size, logits, batch, config, inplace_grad=inplace_grad)
    expected, whole = by_whole_rows(logits, batch, config)
    assert_rounding(loss, expected)
    assert_rounding(gradient, whole)
    others = torch.ones(ROWS, dtype=torch.bool).index_fill_(0, torch.tensor(SCORED), False)
    assert others.sum() == ROWS - sum(RESPONSE) and (gradient[0, others] == 0).all()
    assert [kind for _, kind, _ in calls] == ["all_gather"] * (size if size > 1 else 0)


def test_with_the_true_size_padded_columns_are_not_there():
    logits, batch = made()
    config = PolicyLossConfig(reduction="none")
    expected, whole = by_whole_rows(logits, batch, config, VOCAB)
    logits[..., VOCAB:] = torch.nan
    loss, gradient, _ = over_ranks(2, logits, batch, config, vocab_size=VOCAB)
    assert_rounding(loss, expected)
    assert_rounding(gradient, whole)
    assert (gradient[..., VOCAB:] == 0).all()


def test_log_probs_are_over_the_sets_of_the_record():
    """One of the samples was not recorded."""
    logits, batch = made()
    tokens = sampled(batch["unconcat_tokens"]).split(RESPONSE)
    sets = [sets_with(each.tolist(), VOCAB) for each in tokens]
    sets[1] = [[], []]
    record = {
        "top_p_token_ids": [torch.tensor(joined(each), dtype=torch.int32) for each in sets],
        "top_p_token_offsets": [torch.tensor([0, *map(len, each)]).cumsum(0).int() for each in sets],
    }
    config = PolicyLossConfig(reduction="none")
    loss, gradient, _ = over_ranks(2, logits, batch, config, **record)
    expected, whole = by_whole_rows(logits, batch, config, sets=joined(sets))
    assert_rounding(loss, expected)
    assert_rounding(gradient, whole)
    for name in record:
        with pytest.raises((ValueError, TypeError), match=r"token_ids|offsets"):
            samples_logits_policy_loss(logits, None, batch, reducer(batch), config, **{name: record[name]})


def test_without_ranks_and_on_policy():
    logits, batch = made(torch.float32)
    leaf = logits.clone().requires_grad_()
    loss, _ = samples_logits_policy_loss(leaf, [], batch, reducer(batch), temperature=HEAT)
    loss.backward()
    now = whole_log_probs(logits, batch["unconcat_tokens"])
    expected, whole = by_whole_rows(
        logits, batch | {"log_probs": list(now.split(RESPONSE))}, PolicyLossConfig(reduction="none")
    )
    assert_rounding(loss.detach(), expected)
    assert_rounding(leaf.grad, whole)


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_the_page_takes_what_slime_gives(monkeypatch, top_p):
    here, record = threading.local(), {"top_p_token_ids": [[]] * 4, "top_p_token_offsets": [[0]] * 4}
    mpu = SimpleNamespace(get_tensor_model_parallel_group=lambda: here.group)
    stand_in(monkeypatch, "megatron.core", mpu=mpu)
    names = {
        "get_log_probs_and_entropy": None,
        "get_rollout_top_p_logprob_kwargs": lambda args, batch: {} if args.rollout_top_p == 1 else record,
    }
    stand_in(monkeypatch, "slime.backends.megatron_utils.loss", **names)
    page = run("docs/slime.md")
    logits, batch = made()
    args = SimpleNamespace(rollout_temperature=HEAT, rollout_top_p=top_p, use_rollout_logprobs=top_p < 1)
    given = {name: value for name, value in batch.items() if name != "log_probs"}
    given["rollout_log_probs" if args.use_rollout_logprobs else "log_probs"] = batch["log_probs"]

    def work(rank, group):
        here.group = group
        return page["egpo_loss"](args, given, logits.chunk(2, -1)[rank], reducer(batch))[0]

    expected, _ = by_whole_rows(logits, batch, dataclasses.replace(page["RECIPE"].loss, reduction="none"))
    for loss in in_ranks(2, work).results:
        assert_rounding(loss, expected)


def test_rows_are_those_of_next_token_targets():
    """A sample's response is scored by the rows before its tokens."""
    tokens = made()[1]["unconcat_tokens"]
    bounds = torch.tensor([0, *ENDS])
    targets, counts = next_token_targets(torch.cat(tokens), cu_seqlens=bounds)
    assert targets[SCORED].equal(sampled(tokens)) and counts[SCORED].all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logits": (1, 12, 8)}, r"logits has shape \[1, 12, 8\]; .* of the 22 tokens .* start slime without it"),
        ({"logits": (2, 24, 8)}, r"logits has shape \[2, 24, 8\]; it must be \[1, T, V\]"),
        ({"advantages": 2}, r"batch\['advantages'\] has tensors of lengths \[2, 1, 3, 0\]; .* context parallelism"),
        ({"unconcat_tokens": 2}, r"batch\['unconcat_tokens'\] has tensors .* batch\['total_lengths'\], \[6, 4, 9, 3\]"),
        ({"response_lengths": [3, 4, 6, 0]}, r"batch\['response_lengths'\]\[1\] is 4, of 4 tokens; it must be less"),
        ({"ref_log_probs": None}, r"batch\['ref_log_probs'\] is None with config\.kl_coef 0\.1"),
    ],
)
def test_samples_that_are_not_whole_are_refused(changes, message):
    """Under context parallelism a rank has every other piece of a sample, of which masks know nothing."""
    logits, batch = made()
    for name, change in changes.items():
        if name == "logits":
            logits = torch.zeros(change)
        else:
            batch[name] = [each[::change] for each in batch[name]] if isinstance(change, int) else change
    with pytest.raises(ValueError, match=message):
        samples_logits_policy_loss(logits, None, batch, reducer(batch), PolicyLossConfig(kl_coef=0.1))
