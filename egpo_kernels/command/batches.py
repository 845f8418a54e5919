"""The batches that kernels are checked on, and the sizes of terms that the accuracy rule asks for.

Numbers are drawn on the CPU and moved, so that a seed means the same on every device. Log-ratios keep away from the
bounds of every clip, where the gradient jumps and rounding may fall on either side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SEQUENCES = 8
HIDDEN = 24
"""Width of hidden states."""
LOG_RATIOS = (-0.35, -0.1, 0.05, 0.3)
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
"""Of a group that differs and one that is all wrong."""


class Batch(NamedTuple):
    """Inputs of the public functions, padded ``[S, T, ...]`` or packed ``[N, ...]``.

    A position that does not count holds NaN logits and token -100. The logits are those of hidden states where these
    are given, and None.
    """

    logits: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None
    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    entropy: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    advantages: Tensor
    groups: Tensor
    rewards: Tensor
    cu_seqlens: Tensor | None

    def double(self) -> "Batch":
        """The same numbers in float64."""
        given = {name: it for name, it in self._asdict().items() if it is not None and it.is_floating_point()}
        return self._replace(**{name: it.double() for name, it in given.items()})


class Problem(NamedTuple):
    """A batch, the same in float64, and sizes of terms.

    ``spread [N, V]``: those of each element of a row's gradient whose coefficient is 1, ``onehot + p (2 + |log p|)``.
    ``entropy``: those of the entropies, like tokens. ``doubt``: the largest of a log-ratio, ``1 + |l| + |l_old|``, and
    of logits that are sums of products.
    """

    title: str
    given: Batch
    exact: Batch
    spread: Tensor
    entropy: Tensor
    doubt: float

    def of_log_probs(self) -> "Problem":
        """The same, named as what it is to functions that are given log-probs."""
        return self._replace(title=f"{list(self.given.tokens.shape)} {_name(self.given.log_probs.dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_problem(
    device: torch.device, dtype: torch.dtype, vocab: int, length: int, packed: bool, linear: bool = False
) -> Problem:
    """Sequences of up to ``length`` tokens, each with its last position masked, over logits or hidden states."""
    generator = torch.Generator().manual_seed(vocab + length)
    lengths = length - torch.arange(SEQUENCES) % 3 if packed else torch.full((SEQUENCES,), length)
    ends = lengths.cumsum(0)
    shape = (int(ends[-1]),) if packed else (SEQUENCES, length)
    mask = torch.ones(int(ends[-1]), dtype=torch.bool)
    mask[ends - 1] = False
    mask = mask.view(shape).to(device)
    tokens = torch.randint(vocab, shape, generator=generator).to(device)
    logits = hidden = weight = None
    if linear:
        hidden = torch.randn(*shape, HIDDEN, generator=generator).to(device, dtype)
        weight = (0.6 * torch.randn(vocab, HIDDEN, generator=generator)).to(device, dtype)
        exact = hidden.double() @ weight.double().t()
    else:
        logits = (3 * torch.randn(*shape, vocab, generator=generator)).to(device, dtype)
        exact = logits.double()
        logits[~mask] = torch.nan
    given = Batch(
        logits=logits,
        hidden=hidden,
        weight=weight,
        tokens=torch.where(mask, tokens, -100),
        mask=mask,
        log_probs=torch.empty(0),
        entropy=torch.empty(0),
        old_log_probs=torch.empty(0),
        ref_log_probs=torch.empty(0),
        advantages=torch.linspace(-1.5, 2.0, SEQUENCES, device=device),
        groups=torch.arange(SEQUENCES, device=device) // (SEQUENCES // 2),
        rewards=torch.tensor(REWARDS, device=device),
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(device) if packed else None,
    )
    size = [*shape, HIDDEN, vocab] if linear else [*shape, vocab]
    return _scored(f"{size} {_name(dtype)}", given, exact.log_softmax(-1), tokens[..., None], generator)


def _scored(title: str, given: Batch, log_softmax: Tensor, tokens: Tensor, generator: torch.Generator) -> Problem:
    """With log-probs of ``tokens [..., 1]``, what is near them, and sizes of terms."""
    surprisal, chances = -log_softmax, log_softmax.exp()
    own, shape = log_softmax.gather(-1, tokens)[..., 0], tokens.shape[:-1]
    steps = torch.tensor(LOG_RATIOS)[torch.randint(len(LOG_RATIOS), shape, generator=generator)]
    old, ref = own - steps.to(own), own + 0.3 * torch.randn(shape, generator=generator).to(own)
    given = given._replace(
        log_probs=own.float(),
        entropy=(chances * surprisal).sum(-1).float(),
        old_log_probs=old.float(),
        ref_log_probs=ref.float(),
    )
    products = 0.0
    if given.hidden is not None and given.weight is not None:
        products = float((given.hidden.double().abs() @ given.weight.double().abs().t()).max())
    doubt = 1 + float((own.abs() + old.abs()).max()) + products
    spread = (chances * (2 + surprisal)).scatter_add(-1, tokens, torch.ones_like(own)[..., None])
    entropy = 1 + (chances * surprisal * (1 + surprisal + products)).sum(-1)
    return Problem(title, given, given.double(), spread.flatten(0, -2), entropy, doubt)
