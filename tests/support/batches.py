"""Small batches in both layouts, and the ways from their logits to a loss that the tests walk one by one."""

import importlib.util
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import egpo_kernels as ek
from tests.support.accuracy import assert_alike
from tests.support.device import DEVICE

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton has no wheel here")
TRITON = pytest.param("triton", marks=NEEDS_TRITON)
FAST = ["portable", TRITON]
"""The backends with a gradient written by hand, behind opaque operators."""
BACKENDS = ["reference", *FAST]
LAYOUTS = ["padded", "packed"]

LENGTHS = (3, 4, 2, 4)
HOLE = (1, 2)
"""A position inside a sequence that does not count."""


class Batch(NamedTuple):
    """Two groups of two sequences; the same numbers in either layout, of which tokens past the last are padding."""

    logits: Tensor
    tokens: Tensor
    mask: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    advantages: Tensor
    rewards: Tensor
    groups: Tensor
    cu_seqlens: Tensor | None

    def at(self, sequence: int, position: int) -> tuple[int, ...]:
        """Index of a token in a per-token tensor."""
        if self.cu_seqlens is None:
            return sequence, position
        return (int(self.cu_seqlens[sequence]) + position,)

    def clone(self) -> "Batch":
        """A copy that may be written to."""
        return Batch(*(None if field is None else field.clone() for field in self))

    @property
    def counts(self) -> Tensor:
        """The mask, with what lies past the last sequence left out."""
        if self.cu_seqlens is None:
            return self.mask
        return self.mask & (torch.arange(self.mask.shape[0], device=self.mask.device) < self.cu_seqlens[-1])

    def per_token(self, per_sequence: Tensor) -> Tensor:
        """Spread numbers per sequence over a per-token tensor."""
        if self.cu_seqlens is None:
            return per_sequence[:, None].expand(self.mask.shape).contiguous()
        lengths = self.cu_seqlens.diff()
        lengths[-1] += self.mask.shape[0] - self.cu_seqlens[-1]
        return per_sequence.repeat_interleave(lengths)

    def sequence(self, number: int, per_token: Tensor) -> Tensor:
        """The rows of one sequence."""
        if self.cu_seqlens is None:
            return per_token[number]
        return per_token[self.cu_seqlens[number] : self.cu_seqlens[number + 1]]


def make_batch(layout="padded", vocab=37, dtype=torch.float32, lengths=LENGTHS, seed=0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    count, longest = len(lengths), max(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = (2 * normal(count, longest, vocab)).to(dtype)
    tokens = torch.randint(vocab, (count, longest), generator=generator)
    log_probs = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    old, ref = ((log_probs + 0.3 * normal(count, longest)).clamp(max=0).float() for _ in range(2))
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = inside.clone()
    mask[HOLE[0] :, HOLE[1] : HOLE[1] + 1][:1] = False
    tensors = [logits, tokens, mask, old, ref]
    offsets = None
    if layout == "packed":
        # Two rows past the last sequence, which must not count although their mask says so.
        tensors = [torch.cat([tensor[inside], tensor[inside][:2]]) for tensor in tensors]
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    number = torch.arange(count)
    advantages = torch.tensor([0.7, -0.6, 1.2, -0.9]).repeat(count // 4 + 1)[:count]
    fields = (*tensors, advantages, (number % 2 == 0).float(), number // 2, offsets)
    return Batch(*(None if field is None else field.to(DEVICE) for field in fields))


WITH_KL = ek.PolicyLossConfig(kl_coef=0.1)
BOTH_TERMS = ek.PolicyLossConfig(kl_coef=0.1, entropy_coef=0.02)
SEQUENCE = ek.PolicyLossConfig(ratio="sequence", kl_coef=0.1)


def one_pass(batch, backend, config=BOTH_TERMS, **options):
    """The gradient is made together with the loss."""
    return ek.logits_policy_loss(
        batch.logits,
        batch.tokens,
        batch.advantages,
        batch.mask,
        old_log_probs=batch.old_log_probs,
        ref_log_probs=batch.ref_log_probs,
        cu_seqlens=batch.cu_seqlens,
        config=config,
        backend=backend,
        **options,
    )


def two_pass(batch, backend, **options):
    """The coefficient of a row needs other rows: statistics, middle step, gradient."""
    return one_pass(batch, backend, SEQUENCE, **options)


def whole_groups(batch, backend, **options):
    """On-policy `egpo_loss`: the uncertainty comes from the logits themselves."""
    return ek.egpo_loss(
        batch.logits,
        batch.tokens,
        batch.groups,
        batch.rewards,
        mask=batch.mask,
        cu_seqlens=batch.cu_seqlens,
        backend=backend,
        **options,
    )


def only_log_probs(batch, backend, **options):
    """`token_log_probs`, log-probs and entropies summed with different weights."""
    found = ek.token_log_probs(
        batch.logits, batch.tokens, mask=batch.counts, return_entropy=True, backend=backend, **options
    )
    return ek.LossOutput(found.log_probs.sum() + 0.3 * found.entropy.sum(), {})


def from_log_probs(batch, backend, **options):
    """`policy_loss`; the log-probs are torch's own."""
    tokens = torch.where(batch.mask, batch.tokens, 0)
    log_probs = batch.logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return ek.policy_loss(
        log_probs,
        batch.old_log_probs,
        batch.advantages,
        batch.mask,
        ref_log_probs=batch.ref_log_probs,
        cu_seqlens=batch.cu_seqlens,
        config=WITH_KL,
        backend=backend,
        **options,
    )


def _of_hidden(batch, backend, hidden, weight, config, **options):
    return ek.linear_policy_loss(
        hidden,
        weight,
        batch.tokens,
        batch.advantages,
        batch.mask,
        old_log_probs=batch.old_log_probs,
        ref_log_probs=batch.ref_log_probs,
        cu_seqlens=batch.cu_seqlens,
        config=config,
        # Some rows at a time: a few chunks, the last of them smaller.
        max_chunk_bytes=5 * weight.shape[0] * weight.element_size(),
        backend=backend,
        **options,
    )


def frozen_head(batch, backend, config=SEQUENCE, **options):
    """`linear_policy_loss`: the logits are hidden states, and the weight turns none of them round; late coefficient."""
    weight = torch.eye(batch.logits.shape[-1], dtype=batch.logits.dtype, device=DEVICE)
    return _of_hidden(batch, backend, batch.logits, weight, config, **options)


def trained_head(batch, backend, config=BOTH_TERMS, **options):
    """`linear_policy_loss`: the logits are the weight's columns, and each row has a hidden state of its own."""
    weight = batch.logits.flatten(0, -2).t()
    count = weight.shape[1]
    hidden = torch.eye(count, dtype=weight.dtype, device=DEVICE).view(*batch.tokens.shape, count)
    return _of_hidden(batch, backend, hidden, weight, config, **options)


def every_helper(batch):
    """What the helpers of a rollout batch make of it, one tensor after the other."""
    shared = {"cu_seqlens": batch.cu_seqlens}
    pair = batch.old_log_probs, batch.ref_log_probs
    return [
        ek.rollout_weights(*pair, batch.mask, outside="mask", **shared),
        ek.rollout_weights(*pair, batch.mask, level="sequence", **shared),
        ek.off_policy_mask(*pair, batch.advantages, batch.mask, threshold=0.1, **shared),
        *ek.response_spans(batch.tokens, [3, 4], batch.mask, **shared),
        ek.top_entropy_mask(-batch.old_log_probs, batch.mask, fraction=0.3, **shared),
        ek.informative_groups(batch.groups, batch.rewards),
        ek.soft_overlong_penalty(batch.rewards.long(), 2, 1),
    ]


PATHS = {path.__name__: path for path in (one_pass, two_pass, whole_groups, only_log_probs)}
WAYS = PATHS | {way.__name__: way for way in (from_log_probs, frozen_head, trained_head)}

EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
EVERY_WAY = pytest.mark.parametrize("path", WAYS.values(), ids=WAYS)
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
FAST_BACKEND = pytest.mark.parametrize("backend", FAST)


class Result(NamedTuple):
    loss: Tensor
    gradient: Tensor
    metrics: dict


def differentiate(path, batch, backend, **options) -> Result:
    """Loss, gradient of the logits and metrics; the batch itself is left alone."""
    logits = batch.logits.clone().requires_grad_()
    loss, metrics = path(batch._replace(logits=logits), backend, **options)
    loss.backward()
    return Result(loss.detach(), logits.grad, metrics)


def assert_same(given: Result, wanted: Result) -> None:
    """Bit for bit."""
    assert torch.equal(given.loss, wanted.loss)
    assert torch.equal(given.gradient, wanted.gradient)


def assert_agree(given: Result, wanted: Result) -> None:
    """By different kernels: see `assert_alike`."""
    assert_alike(given.loss, wanted.loss, "loss")
    assert_alike(given.gradient, wanted.gradient, "gradient")
