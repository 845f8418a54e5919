"""The page on NeMo-RL, with stand-ins for what it imports."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad

from egpo_kernels import group_advantages, recipes
from tests.integrations.kept_sets import assert_over, sets_with
from tests.integrations.stand_ins import stand_in
from tests.parity.batch import assert_same, differentiated, make_batch, ours
from tests.support.accuracy import assert_rounding
from tests.support.page import run
from tests.support.ranks import in_ranks

BATCH = make_batch()
DATA = {
    "token_mask": pad(BATCH.mask.float(), (1, 0)),
    "sample_mask": torch.ones(8),
    "prev_logprobs": pad(BATCH.old_log_probs, (1, 0)),
    "advantages": pad(BATCH.advantages[:, None].expand(8, 24), (1, 0)),
}


@pytest.fixture
def page(monkeypatch):
    names = {
        "LossType": SimpleNamespace(TOKEN_LEVEL="token_level"),
        "LossInputType": SimpleNamespace(LOGPROB="logprob", LOGIT="logit"),
    }
    stand_in(monkeypatch, "nemo_rl.algorithms.loss.interfaces", **names)
    here = threading.local()
    parallel_state = SimpleNamespace(get_tensor_model_parallel_group=lambda: here.group)
    stand_in(monkeypatch, "megatron.core", parallel_state=parallel_state)
    found = run("docs/nemo_rl.md")
    found["here"] = here
    return found


@pytest.mark.parametrize("recipe", ["egpo", "grpo", "gspo"])
def test_micro_batches_add_up_to_the_step(page, recipe):
    page["RECIPE"] = recipes.get(recipe)
    counts = torch.tensor(8.0), BATCH.mask.sum()

    def step(log_probs):
        total = 0.0
        for rows in (slice(0, 3), slice(3, 8)):
            found, metrics = page["EGPOLoss"]()(
                log_probs[rows], {name: each[rows] for name, each in DATA.items()}, *counts
            )
            assert metrics == {"loss": found.item(), "num_valid_samples": len(log_probs[rows])}
            total = total + found
        return total

    expected = ours(BATCH, **page["RECIPE"].loss.to_dict())
    assert_same(expected, differentiated(step, BATCH.log_probs))


def test_a_sample_that_is_masked_does_not_count(page):
    data = DATA | {"sample_mask": torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1])}

    def loss(log_probs):
        return page["EGPOLoss"]()(log_probs, data, torch.tensor(7.0), BATCH.mask.sum())[0]

    gradient = differentiated(loss, BATCH.log_probs).gradient
    assert gradient[1].abs().sum() == 0 and gradient[0].abs().sum() > 0


def test_a_kl_is_multiplied_by_a_ratio_of_one(page):
    """`loss_functions.py`: k3, clamped, times ``exp(logp - sg(logp))``."""
    page["RECIPE"] = recipes.EGPO.replace(kl_coef=0.3, kl_max=10.0, kl_times_ratio="on_policy")
    data = DATA | {"reference_policy_logprobs": pad(BATCH.ref_log_probs, (1, 0))}
    counts = torch.tensor(8.0), BATCH.mask.sum()
    found = differentiated(lambda log_probs: page["EGPOLoss"]()(log_probs, data, *counts)[0], BATCH.log_probs)
    plain = ours(BATCH, **recipes.EGPO.loss.to_dict())

    def penalty(log_probs):
        x = BATCH.ref_log_probs - log_probs
        kl = (x.exp() - x - 1).clamp(max=10.0) * (log_probs - log_probs.detach()).exp()
        return 0.3 * torch.where(BATCH.mask, kl, 0.0).sum() / BATCH.mask.sum()

    kl = differentiated(penalty, BATCH.log_probs)
    assert_same(plain._replace(loss=plain.loss + kl.loss, gradient=plain.gradient + kl.gradient), found)


PROMPTS = torch.tensor([[5, 6, 0], [5, 6, 0], [5, 7, 1], [5, 6, 0], [5, 7, 1], [5, 7, 1], [5, 7, 1], [5, 6, 0]])
REWARDS = torch.tensor([0.0, 1, 0, 0, 0, 1, 1, 0])


def test_groups_are_equal_prompts(page):
    mask = DATA["token_mask"]
    found = page["EGPOEstimator"]().compute_advantage(
        PROMPTS, REWARDS, mask, logprobs_policy=DATA["prev_logprobs"], logprobs_reference=None, repeated_batch=None
    )
    expected = group_advantages((PROMPTS[:, 1] == 7).long(), REWARDS, BATCH.old_log_probs, BATCH.mask).advantages
    assert_rounding(found, expected[:, None] * mask)


def test_a_sample_that_is_not_valid_stays_out_of_its_group(page):
    """The right answer of the first group: without it the group is all wrong."""
    valid, mask = torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1]), DATA["token_mask"]
    found = page["EGPOEstimator"]().compute_advantage(
        PROMPTS, REWARDS, mask, logprobs_policy=DATA["prev_logprobs"], valid_mask=valid
    )
    kept = valid.bool()
    given = (PROMPTS[:, 1] == 7).long(), REWARDS, BATCH.old_log_probs, BATCH.mask
    expected = group_advantages(*(each[kept] for each in given)).advantages
    assert_rounding(found[kept], expected[:, None] * mask[kept])
    assert found[1].abs().sum() == 0


LOGITS = 2 * torch.randn(8, 25, 23, generator=torch.Generator().manual_seed(0))
IDS = LOGITS.argsort(dim=-1, descending=True, stable=True)[..., 1].roll(1, 1)  # the second of the row before


def nucleus(logits, top_p):
    """The fewest that hold so much, in float64."""
    shares, ids = logits.double().softmax(-1).sort(descending=True)
    return [row[: int((ends < top_p).sum()) + 1].tolist() for row, ends in zip(ids, shares.cumsum(-1), strict=True)]


@pytest.mark.parametrize("recorded", [False, True])
def test_log_probs_of_logits_are_over_kept_sets(page, recorded):
    scored = BATCH.mask.flatten()
    rows, tokens = LOGITS[:, :-1].flatten(0, 1)[scored], IDS[:, 1:].flatten()[scored]
    data = DATA | {"input_ids": IDS}
    sets = [sorted({*kept, token}) for kept, token in zip(nucleus(rows, 0.8), tokens.tolist(), strict=True)]
    if recorded:
        sets = sets_with(tokens.tolist(), 23)
        sets[5] = []  # a size of 0
        sizes, ids = torch.zeros(8, 25, dtype=torch.int32), torch.zeros(8, 25, 5, dtype=torch.int32)
        for place, kept in zip(pad(BATCH.mask, (1, 0)).nonzero().tolist(), sets, strict=True):
            sizes[tuple(place)] = len(kept)
            ids[tuple(place)][: len(kept)] = torch.tensor(kept, dtype=torch.int32)
        data |= {"sampling_mask_token_ids": ids, "sampling_mask_sizes": sizes}
    found = page["replayed_log_probs"](LOGITS, data, top_p=0.8)
    assert_over(found.flatten()[scored], rows, tokens, sets)


def test_the_loss_of_logits_is_the_loss_of_their_log_probs(page):
    data, counts = DATA | {"input_ids": IDS}, (torch.tensor(8.0), BATCH.mask.sum())
    loss = page["ReplayingLoss"]()
    assert (loss.input_type, page["EGPOLoss"].input_type) == ("logit", "logprob")
    log_probs = page["replayed_log_probs"](LOGITS, data, top_p=0.95)
    assert_rounding(loss(LOGITS, data, *counts)[0], page["EGPOLoss"]()(log_probs, data, *counts)[0])


@pytest.mark.parametrize("recipe", [recipes.EGPO, recipes.GSPO.replace(kl_coef=0.1)])
def test_the_loss_of_split_logits_is_that_of_log_probs(page, recipe):
    """In float64; NeMo-RL's own log-probs are of the same rows, without the last."""
    page["RECIPE"] = recipe
    data = {name: each.double() if each.is_floating_point() else each for name, each in DATA.items()}
    data |= {"input_ids": IDS, "reference_policy_logprobs": pad(BATCH.ref_log_probs, (1, 0)).double()}
    data["sample_mask"] = torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1])
    counts = (torch.tensor(7.0), BATCH.mask.sum())
    columns = pad(LOGITS, (0, 1), value=-1.0).double()  # a padded one, which counts

    def work(rank, group):
        page["here"].group = group
        shard = columns.chunk(2, -1)[rank].clone().requires_grad_()
        loss, metrics = page["VocabParallelLoss"]()(shard, data, *counts)
        assert metrics == {"loss": loss.item(), "num_valid_samples": 7.0}
        loss.backward()
        return loss.detach(), shard.grad

    def whole(logits):
        rows = logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
        return page["EGPOLoss"]()(rows, data, *counts)[0]

    expected, found = differentiated(whole, columns), in_ranks(2, work)
    for loss, _ in found.results:
        assert_rounding(loss, expected.loss)
    assert_rounding(torch.cat([gradient for _, gradient in found.results], -1), expected.gradient)
    assert [kind for _, kind, _ in found.calls] == ["all_gather"] * 2
