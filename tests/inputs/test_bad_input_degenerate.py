"""Batches with little or nothing in them, and logits that lie oddly in memory."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.accuracy import assert_rounding
from tests.support.batches import (
    BACKENDS,
    EVERY_BACKEND,
    EVERY_LAYOUT,
    EVERY_WAY,
    FAST,
    Result,
    assert_agree,
    differentiate,
    frozen_head,
    make_batch,
    one_pass,
    only_log_probs,
    two_pass,
    whole_groups,
)
from tests.support.device import DEVICE, size

REDUCTIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "sum"]


def assert_nothing(result):
    assert result.loss == 0
    assert (result.gradient == 0).all()
    for key, value in result.metrics.items():
        if key.startswith("policy/") and key.endswith("/sum"):
            assert value == 0, key


def cut(batch, sequences, tokens):
    """The first sequences and token positions only; packed: the first tokens, all in the last sequence."""
    offsets = batch.cu_seqlens
    if offsets is None:
        per_token = [tensor[:sequences, :tokens] for tensor in batch[:5]]
    else:
        per_token = [tensor[:tokens] for tensor in batch[:5]]
        offsets = torch.zeros(sequences + 1, dtype=torch.int32, device=DEVICE)
        offsets[-1] = tokens if sequences else 0
    return batch._replace(
        **dict(zip(batch._fields[:5], per_token, strict=True)),
        advantages=batch.advantages[:sequences],
        rewards=batch.rewards[:sequences],
        groups=batch.groups[:sequences],
        cu_seqlens=offsets,
    )


@pytest.mark.parametrize("sequences, tokens", [(0, 4), (4, 0), (0, 0)], ids=["no_sequences", "no_tokens", "nothing"])
@EVERY_WAY
@EVERY_LAYOUT
@EVERY_BACKEND
def test_nothing_in_the_batch(path, layout, backend, sequences, tokens):
    batch = cut(make_batch(layout), sequences, tokens)
    if path is only_log_probs and layout == "packed":
        batch = batch._replace(mask=batch.counts)
    assert_nothing(differentiate(path, batch, backend))


@pytest.mark.parametrize("config", [ek.PolicyLossConfig(ratio="sequence"), ek.recipes.GMPO.loss], ids=["gspo", "gmpo"])
@EVERY_LAYOUT
@EVERY_BACKEND
def test_no_sequences_to_share_a_ratio(config, layout, backend):
    """Without a KL term beside it, nothing else would tie the loss to the logits."""
    batch = cut(make_batch(layout), 0, 4)
    assert_nothing(differentiate(one_pass, batch, backend, config=config))
    assert_nothing(differentiate(frozen_head, batch, backend, config=config))


@EVERY_WAY
@EVERY_LAYOUT
@EVERY_BACKEND
def test_nothing_counts(path, layout, backend):
    batch = make_batch(layout)
    assert_nothing(differentiate(path, batch._replace(mask=torch.zeros_like(batch.mask)), backend))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@EVERY_BACKEND
def test_nothing_counts_in_any_reduction(reduction, backend):
    batch = make_batch()
    batch = batch._replace(mask=torch.zeros_like(batch.mask))
    config = ek.PolicyLossConfig(
        reduction=reduction, norm_length=8 if reduction == "seq_mean_token_sum_norm" else None, entropy_coef=0.1
    )
    assert_nothing(differentiate(one_pass, batch, backend, config=config))
    assert_nothing(differentiate(one_pass, batch, backend, config=config, num_tokens=0, num_sequences=0))


COUNTED_BY = {"num_tokens": "token_mean", "num_sequences": "seq_mean_token_mean"}


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
@pytest.mark.parametrize("name", COUNTED_BY)
@pytest.mark.parametrize("path", [one_pass, frozen_head])
@EVERY_BACKEND
def test_a_global_count_of_0_with_tokens_that_count(path, name, zero, backend, values_are_checked):
    config = ek.PolicyLossConfig(reduction=COUNTED_BY[name])
    zero = zero.to(DEVICE) if torch.is_tensor(zero) else zero
    with pytest.raises(ValueError, match=rf"{name} is .*, and \d+ tokens count here; it must be"):
        differentiate(path, make_batch(), backend, config=config, **{name: zero})


@pytest.mark.parametrize("count", [torch.tensor(0), torch.tensor(torch.inf), torch.tensor(torch.nan), torch.tensor(-1)])
@pytest.mark.parametrize("path", [one_pass, frozen_head])
@EVERY_BACKEND
def test_a_global_count_that_cannot_be_elsewhere(path, count, backend, monkeypatch):
    """On a GPU, where it is not looked at: NaN and a metric."""
    monkeypatch.setattr("egpo_kernels.inputs.validation.checks_values", lambda device: False)
    batch = make_batch()
    loss, metrics = path(batch, backend, ek.PolicyLossConfig(), num_tokens=count.to(DEVICE))
    assert loss.isnan() and metrics["policy/uncounted_tokens/sum"] == metrics["policy/tokens/sum"] > 0
    nothing = batch._replace(mask=torch.zeros_like(batch.mask))
    loss, metrics = path(nothing, backend, ek.PolicyLossConfig(), num_tokens=count.to(DEVICE))
    assert loss == 0 and metrics["policy/uncounted_tokens/sum"] == 0


@EVERY_WAY
@EVERY_LAYOUT
@EVERY_BACKEND
def test_empty_sequences(path, layout, backend):
    lengths = (0, 3, 0, 2, 0, 0)
    result = differentiate(path, make_batch(layout, lengths=lengths), backend)
    assert result.loss.isfinite() and result.gradient.isfinite().all()


@EVERY_LAYOUT
@EVERY_BACKEND
def test_empty_sequences_do_not_count(layout, backend):
    config = ek.PolicyLossConfig(reduction="seq_mean_token_mean")
    batch = make_batch(layout, lengths=(3, 0, 0, 2))
    loss, _ = one_pass(batch, backend, config)
    fewer, _ = one_pass(batch, backend, config, num_sequences=2)
    assert loss == fewer


@EVERY_LAYOUT
@EVERY_BACKEND
def test_groups_of_one(layout, backend):
    batch = make_batch(layout)
    batch = batch._replace(groups=["a", "b", "c", "d"])
    result = differentiate(whole_groups, batch, backend)
    assert_nothing(result._replace(metrics={}))
    assert result.metrics["egpo/groups/single/sum"] == 4
    raw = ek.group_advantages(
        batch.groups,
        batch.rewards,
        batch.old_log_probs,
        cu_seqlens=batch.cu_seqlens,
        config=ek.AdvantageConfig(singleton="raw"),
        backend=backend,
    )
    assert torch.equal(raw.advantages, batch.rewards) and (raw.weights == 1).all()


@pytest.mark.parametrize("reward", [0.0, 1.0], ids=["wrong", "right"])
@EVERY_LAYOUT
@EVERY_BACKEND
def test_everybody_the_same(reward, layout, backend):
    batch = make_batch(layout)
    result = differentiate(whole_groups, batch._replace(rewards=torch.full_like(batch.rewards, reward)), backend)
    assert result.loss.isfinite() and result.gradient.isfinite().all()
    assert (result.gradient[batch.counts].abs().sum() > 0) == (reward == 0)


@pytest.mark.parametrize("vocab", [1, 2, 3, 17, 1025])
@pytest.mark.parametrize("path", [one_pass, two_pass, only_log_probs])
@pytest.mark.parametrize("backend", FAST)
def test_any_vocabulary(path, vocab, backend):
    batch = make_batch("padded", vocab, lengths=(2, 1))
    found, wanted = differentiate(path, batch, backend), differentiate(path, batch, "reference")
    assert_rounding(found.loss, wanted.loss)
    assert_rounding(found.gradient, wanted.gradient)


@pytest.mark.parametrize("path", [one_pass, two_pass, whole_groups])
@EVERY_LAYOUT
@pytest.mark.parametrize("backend", size(["reference", "portable"], BACKENDS))  # interpreted kernels take minutes
def test_many_tokens(path, layout, backend):
    short, times = make_batch("padded", vocab=3, lengths=(4, 4)), 16400
    long = short._replace(**{name: getattr(short, name).repeat_interleave(times, 1) for name in short._fields[:5]})
    assert long.tokens.shape[1] > 65536
    if layout == "packed":
        flat = {name: getattr(long, name).flatten(0, 1) for name in long._fields[:5]}
        long = long._replace(**flat, cu_seqlens=torch.tensor([0, 4 * times, 8 * times], device=DEVICE))
    # Every row is there many times over, so a mean over tokens does not change.
    found, wanted = differentiate(path, long, backend), differentiate(path, short, backend)
    assert_rounding(found.loss, wanted.loss)
    gradient = found.gradient.view(-1, times, 3)[:, 0] * times
    assert_rounding(gradient, wanted.gradient.view(-1, 3))


def lying(logits, how):
    """The same logits, otherwise in memory."""
    if how == "transposed":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    wider = torch.zeros(*logits.shape[:-1], logits.shape[-1] + 5, device=DEVICE)
    if how == "columns":
        wider[..., 2:-3] = logits
        return wider[..., 2:-3]
    longer = torch.zeros(logits.shape[0], 2 * logits.shape[1] + 1, logits.shape[2], device=DEVICE)
    longer[:, 1::2] = logits
    return longer[:, 1::2]


@pytest.mark.parametrize("how", ["transposed", "columns", "rows"])
@pytest.mark.parametrize("path", [one_pass, two_pass, only_log_probs])
@EVERY_BACKEND
def test_views_are_read_where_they_lie(path, how, backend):
    batch = make_batch()
    wanted = differentiate(path, batch, backend)
    base = lying(batch.logits, how)
    assert not base.is_contiguous() and torch.equal(base, batch.logits)
    logits = base.detach().requires_grad_()
    loss, _ = path(batch._replace(logits=logits), backend)
    loss.backward()
    # Another alignment is another compiled kernel.
    assert_agree(Result(loss.detach(), logits.grad, {}), wanted)


@pytest.mark.parametrize("backend", FAST)
def test_packed_view_is_read_where_it_lies(backend):
    batch = make_batch("packed")
    wanted = differentiate(one_pass, batch, backend)
    wide = torch.nn.functional.pad(batch.logits, (3, 2))[:, 3:-2]
    assert wide.stride(0) == 42
    found = differentiate(one_pass, batch._replace(logits=wide), backend)
    assert_agree(found, wanted)
