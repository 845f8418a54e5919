"""The recipe of docs/cuda_graphs.md: loss, gradient and metrics of every replay are those of a plain call, bit for bit.

Where there is no GPU its operations are recorded and run again: see `tests.support.graphs`.
"""

import pytest
import torch

import egpo_kernels as ek
from tests.support.accuracy import assert_bits
from tests.support.batches import EVERY_LAYOUT, differentiate, make_batch, one_pass, two_pass, whole_groups
from tests.support.device import DEVICE
from tests.support.graphs import without_a_gpu
from tests.support.page import at_hand, blocks, run

pytestmark = pytest.mark.gpu

PAGE = "docs/cuda_graphs.md"


@pytest.fixture
def capture(monkeypatch):
    """The page's function."""
    without_a_gpu(monkeypatch)
    space = {"torch": torch}
    exec(blocks(PAGE)[1], space)
    return space["capture"]


def groups_in_a_row(batch, backend, **options):
    """Off-policy `egpo_loss` of groups that need no tensor."""
    options |= {"mask": batch.mask, "old_log_probs": batch.old_log_probs, "cu_seqlens": batch.cu_seqlens}
    return ek.egpo_loss(batch.logits, batch.tokens, 2, batch.rewards, backend=backend, **options)


def in_place(batch, backend, **options):
    """The next batch is copied over the gradient."""
    return one_pass(batch, backend, inplace_grad=True, **options)


PATHS = [one_pass, in_place, two_pass, groups_in_a_row, whole_groups]


def two_batches(layout):
    """Of the same shapes, and nothing else the same."""
    first, second = make_batch(layout), make_batch(layout, seed=1)
    mask = torch.rand(second.mask.shape, generator=torch.Generator().manual_seed(2)) > 0.3
    offsets = None
    if layout == "packed":
        # Other lengths, an empty sequence, and more rows past the last.
        offsets = torch.tensor([0, 5, 9, 12, 12], dtype=torch.int32, device=DEVICE)
    # The two of a group change places, and with them right and wrong.
    advantages, rewards = -2 * second.advantages, 1 - second.rewards
    groups = 5 - second.groups
    changed = {"mask": mask.to(DEVICE), "advantages": advantages, "rewards": rewards, "groups": groups}
    return first, second._replace(cu_seqlens=offsets, **changed)


def numbers(*values):
    """Temperature and global count of tokens."""
    temperature, count = (torch.tensor(value, device=DEVICE) for value in values)
    return {"temperature": temperature, "num_tokens": count}


def fill(held, given):
    """What the page does before a replay."""
    with torch.no_grad():
        for mine, new in zip(held, given, strict=True):
            if mine is not None:
                mine.copy_(new)


def step_of(path, held, **options):
    """The page's step."""
    held.logits.requires_grad_()

    def step():
        held.logits.grad = None
        loss, metrics = path(held, "triton", **options)
        loss.backward()
        return loss.detach(), metrics

    return step


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
@EVERY_LAYOUT
def test_a_replay_is_a_plain_call(path, layout, capture):
    first, second = two_batches(layout)
    given = [(second, numbers(0.8, 5.0)), (first, numbers(1.0, 11.0)), (second, numbers(1.0, 11.0))]
    held, options = first.clone(), numbers(1.0, 11.0)
    graph, (loss, metrics) = capture(step_of(path, held, **options))
    gradient, losses = held.logits.grad, []
    for batch, values in given:
        fill([*held, *options.values()], [*batch, *values.values()])
        graph.replay()
        wanted = differentiate(path, batch, "triton", **values)
        assert wanted.gradient.abs().sum() > 0
        assert_bits(loss, wanted.loss, "loss")
        assert_bits(gradient, wanted.gradient, "gradient")
        assert list(metrics) == list(wanted.metrics)
        for key, value in wanted.metrics.items():
            assert_bits(metrics[key], value, key)
        losses.append(loss.item())
    assert len(set(losses)) == len(given)


def test_metrics_are_the_newest_unless_they_were_copied(capture):
    first, second = two_batches("padded")
    held = first.clone()
    graph, (_, metrics) = capture(step_of(one_pass, held))
    graph.replay()
    named, copied = dict(metrics), torch.stack([*metrics.values()])
    fill(held, second)
    graph.replay()
    old, new = (differentiate(one_pass, batch, "triton").metrics for batch in (first, second))
    assert (torch.stack([*old.values()]) != torch.stack([*new.values()])).any()
    for key, kept in zip(metrics, copied, strict=True):
        assert_bits(named[key], new[key], key)
        assert_bits(metrics[key], new[key], key)
        assert_bits(kept, old[key], key)


def test_replays_add_to_a_gradient_that_was_there(capture):
    batch = make_batch()
    held = batch._replace(logits=batch.logits.clone().requires_grad_())
    held.logits.grad = torch.zeros_like(batch.logits)

    def step():
        one_pass(held, "triton").loss.backward()

    graph, _ = capture(step)
    held.logits.grad.zero_()
    graph.replay()
    graph.replay()
    wanted = differentiate(one_pass, batch, "triton").gradient
    assert wanted.abs().sum() > 0
    assert_bits(held.logits.grad, 2 * wanted, "gradient")


def test_numbers_are_those_of_the_capture(capture):
    first, second = two_batches("padded")
    held, options = first.clone(), {"num_tokens": 11, "temperature": 0.8, "grad_scale": 2.0}
    graph, (loss, _) = capture(step_of(one_pass, held, **options))
    wanted = differentiate(one_pass, second, "triton", **options)
    options |= {"num_tokens": 22, "temperature": 1.0, "grad_scale": 1.0}
    fill(held, second)
    graph.replay()
    assert_bits(loss, wanted.loss, "loss")
    assert_bits(held.logits.grad, wanted.gradient, "gradient")


def test_the_page(monkeypatch):
    """Its graph gives the model the gradient, and the caller the metrics, that plain calls give."""
    without_a_gpu(monkeypatch)
    names, plain = run(PAGE, at_hand(DEVICE)), run("docs/micro_batches.md", at_hand(DEVICE))
    assert names["metrics"].keys() == plain["metrics"].keys()
    for key, value in plain["metrics"].items():
        assert_bits(names["metrics"][key], value, key)
    assert plain["table"].grad.abs().sum() > 0
    assert_bits(names["table"].grad, plain["table"].grad, "gradient")
