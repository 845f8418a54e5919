"""What is reported: names that say how to merge, counts for every mean, exact merges of micro-batches."""

import pytest
import torch

import egpo_kernels as ek
from tests.support.accuracy import assert_rounding
from tests.support.batches import (
    BOTH_TERMS,
    EVERY_BACKEND,
    EVERY_LAYOUT,
    from_log_probs,
    make_batch,
    one_pass,
    two_pass,
    whole_groups,
)
from tests.support.device import DEVICE

LOSSES = pytest.mark.parametrize("path", [one_pass, two_pass, whole_groups, from_log_probs])

COUNTS = {"policy/": "policy/tokens/sum", "egpo/weight/at_": "egpo/sequences/sum"}
"""Keys that share a count; of every other key `x/mean`, `x/min` and `x/max` it is `x/count/sum`."""


def count_key(key):
    shared = [count for start, count in COUNTS.items() if key.startswith(start)]
    return shared[0] if shared else f"{key.rsplit('/', 1)[0]}/count/sum"


def assert_well_named(metrics):
    for key, value in metrics.items():
        kind = key.rsplit("/", 1)[1]
        assert kind in ("mean", "min", "max", "sum"), key
        assert value.shape == () and not value.requires_grad and value.dtype == torch.float32, key
        if kind != "sum" and "/gap/" not in key:
            assert count_key(key) in metrics, key
    gap = metrics.get("egpo/uncertainty/gap/mean")
    if gap is not None:
        both = [metrics[f"egpo/uncertainty/{kind}/mean"] for kind in ("incorrect", "correct")]
        torch.testing.assert_close(gap, both[0] - both[1], equal_nan=True)


@LOSSES
@EVERY_LAYOUT
@EVERY_BACKEND
def test_keys_say_how_they_merge(path, layout, backend):
    metrics = path(make_batch(layout), backend).metrics
    assert_well_named(metrics)
    groups = any(key.startswith("egpo/") for key in metrics)
    assert groups is (path is whole_groups)


@EVERY_BACKEND
def test_only_what_was_computed_is_reported(backend):
    batch = make_batch()
    every = set(one_pass(batch, backend).metrics)
    plain = set(one_pass(batch._replace(ref_log_probs=None), backend, ek.PolicyLossConfig()).metrics)
    assert every - plain == {"policy/ref_kl/mean", "policy/loss/kl/sum", "policy/loss/entropy/sum"}
    given = ek.policy_loss(batch.old_log_probs, None, batch.advantages, batch.mask, backend=backend).metrics
    assert plain - set(given) == {"policy/entropy/mean"}
    weightless = ek.group_advantages(2, batch.rewards, config=ek.recipes.GRPO.advantage, backend=backend).metrics
    assert not [key for key in weightless if key.startswith(("egpo/uncertainty", "egpo/empty"))]
    assert_well_named(weightless)
    assert (
        one_pass(batch, backend, metrics="none").metrics == {} == whole_groups(batch, backend, metrics="none").metrics
    )


@EVERY_BACKEND
def test_loss_parts_add_up(backend):
    loss, metrics = one_pass(make_batch(), backend)
    parts = [metrics[f"policy/loss/{part}/sum"] for part in ("surrogate", "kl", "entropy")]
    torch.testing.assert_close(sum(parts), loss)
    assert metrics["policy/loss/sum"] == loss
    assert metrics["policy/tokens/sum"] == make_batch().counts.sum()


@EVERY_BACKEND
def test_groups_by_kind(backend):
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0.1, 0.3, 1], device=DEVICE)
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4])
    log_probs = torch.full((9, 2), -0.5, device=DEVICE)
    found = ek.group_advantages(ids, rewards, log_probs, backend=backend).metrics
    kinds = {
        kind: int(found[f"egpo/groups/{kind}/sum"]) for kind in ("mixed", "all_wrong", "all_correct", "no_correct")
    }
    assert kinds == {"mixed": 1, "all_wrong": 1, "all_correct": 1, "no_correct": 1}
    assert found["egpo/groups/single/sum"] == 1 and found["egpo/groups/sum"] == 5
    assert found["egpo/correct/sum"] == 4 and found["egpo/incorrect/sum"] == 5 and found["egpo/sequences/sum"] == 9


# Merging.


def split(batch, *sizes):
    """Micro-batches of whole sequences (padded)."""
    parts = [torch.split(field, sizes) for field in batch[:-1]]
    return [batch._make([*fields, None]) for fields in zip(*parts, strict=True)]


def assert_merged(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_rounding(found[key], value)


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 3), (1, 1, 1, 1), (0, 3, 0, 1)], ids=str)
@pytest.mark.parametrize("path", [one_pass, from_log_probs])
@EVERY_BACKEND
def test_micro_batches_merge_exactly(path, sizes, backend):
    batch = make_batch()
    batch.mask[1] = False  # a micro-batch may count nothing
    options = {"num_tokens": batch.counts.sum(), "num_sequences": 3}
    wanted = path(batch, backend, **options).metrics
    parts = [path(part, backend, **options).metrics for part in split(batch, *sizes)]
    assert_merged(ek.combine_metrics(parts), wanted)
    assert_merged(ek.combine_metrics([ek.combine_metrics(parts[:1]), ek.combine_metrics(parts[1:])]), wanted)


@EVERY_BACKEND
def test_groups_merge_exactly(backend):
    batch = make_batch(lengths=(3, 4, 2, 4, 1, 2, 3, 3))
    batch = batch._replace(rewards=torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0.2], device=DEVICE))

    def metrics(part):
        return ek.group_advantages(part.groups, part.rewards, part.old_log_probs, part.mask, backend=backend).metrics

    parts = [metrics(part) for part in split(batch, 4, 0, 2, 2)]
    assert_merged(ek.combine_metrics(parts), metrics(batch))
    # Nobody is correct in the last part: its mean over correct answers is a mean over nothing.
    assert parts[3]["egpo/uncertainty/correct/mean"].isnan() and parts[3]["egpo/uncertainty/gap/mean"].isnan()


@EVERY_BACKEND
def test_mean_over_nothing_is_nan(backend):
    batch = make_batch()
    metrics = one_pass(batch._replace(mask=torch.zeros_like(batch.mask)), backend).metrics
    merged = ek.combine_metrics([metrics, metrics])
    for found in (metrics, merged):
        for key, value in found.items():
            assert value == 0 if key.endswith("/sum") else value.isnan(), key


def test_merge_keeps_keys_that_only_some_have():
    batch = make_batch()
    some = one_pass(batch, "portable", BOTH_TERMS).metrics
    other = from_log_probs(batch, "portable").metrics
    merged = ek.combine_metrics([other, some])
    assert merged.keys() == some.keys() | other.keys()
    torch.testing.assert_close(merged["policy/entropy/mean"], some["policy/entropy/mean"])
    assert merged["policy/tokens/sum"] == 2 * some["policy/tokens/sum"]
    assert ek.combine_metrics([]) == {}
    assert ek.combine_metrics([{}, {}]) == {}
    assert ek.combine_metrics(iter([some])).keys() == some.keys()


def test_nan_in_one_part_is_seen():
    batch = make_batch()
    sound = one_pass(batch, "portable").metrics
    batch.logits[0, 0, 0] = torch.nan
    merged = ek.combine_metrics([sound, one_pass(batch, "portable").metrics])
    assert merged["policy/loss/sum"].isnan() and merged["policy/nonfinite_rows/sum"] == 1


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="metrics has the key 'loss'"):
        ek.combine_metrics([{"loss": torch.tensor(1.0)}])


@pytest.mark.parametrize("wrong", [3, [3], {"policy/loss/sum": torch.ones(())}, [{"policy/loss/sum": 1.0}]])
def test_combining_what_is_no_list_of_dicts_of_tensors(wrong):
    with pytest.raises(TypeError, match="metrics"):
        ek.combine_metrics(wrong)


def test_combining_a_mean_without_its_count():
    with pytest.raises(ValueError, match="metrics has 'policy/ratio/mean' without its count 'policy/tokens/sum'"):
        ek.combine_metrics([{"policy/ratio/mean": torch.ones(())}])
