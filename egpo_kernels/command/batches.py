"""Batches over logits and hidden states that kernels are checked on, and the sizes of terms that the accuracy rule asks
for. Those of log-probs and of groups: `egpo_kernels.command.scores`.

Numbers are drawn on the CPU and moved, so that a seed means the same on every device. Log-ratios keep away from the
bounds of every clip, where the gradient jumps and rounding may fall on either side.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import SamplingSupport
from egpo_kernels.rollouts.kept import pack_support

SEQUENCES = 8
ADVANTAGES = (-1.5, -1.0, -0.5, 0.0, 0.75, 1.0, 1.25, 2.0)
LOG_RATIOS = (0.6, -0.5, 0.02, 0.02, -0.5, -0.5, 0.02, 0.6)
"""Of the sequences: for either sign of the advantage below, between and above a clip by 0.2."""
AROUND = (-0.06, 0.06, 0.0)
"""What is added to the log-ratio of one token after the other."""
KL_STEPS = (-0.15, -1.0, 0.1, 0.4, 0.8)
"""Of log-probs to those of the reference, one token after the other; `egpo_kernels.command.variants` clamps some."""
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
"""Of a group that differs and one that is all wrong."""
CORRECT = (False, True, False, True, False, False, False, False)
"""What a caller may say of them."""
TEMPERATURES = (0.6, 1.0, 1.7)
ROLLOUT_WEIGHTS = (0.5, 1.5, torch.nan, 0.0, 2.0)
EMPTY, DEAD, LAST_MASKED = 5, 2, (2, 3, 6)
"""Sequences: without a token in the mask; whose first token is impossible; whose last position is not in the mask."""
HIDDEN = 24
"""Width of hidden states."""


class Case(NamedTuple):
    """What a batch is like. A packed one is given all that a caller may leave out, and a temperature for each token; of
    a ``kept`` one a sampler kept some tokens for most rows.
    """

    dtype: torch.dtype
    vocab: int
    length: int
    packed: bool = False
    temperature: float = 1.0
    kept: bool = False


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
    temperature: Tensor | float = 1.0
    rollout_weights: Tensor | None = None
    entropy_mask: Tensor | None = None
    correct: Tensor | None = None
    num_tokens: float | None = None
    num_sequences: float | None = None
    support: SamplingSupport | None = None

    def double(self) -> "Batch":
        """The same numbers in float64."""
        given: dict[str, Any] = {
            name: it.double() if isinstance(it, Tensor) and it.is_floating_point() else it
            for name, it in self._asdict().items()
        }
        return Batch(**given)


class Problem(NamedTuple):
    """A batch, the same in float64, and sizes of terms.

    ``spread [N, V]``: those of each element of a row's gradient whose coefficient is 1, ``(onehot + p (2 + |log p|))
    / temperature``. ``entropy``: those of the entropies, like tokens. ``doubt``: the largest of a log-ratio, ``1 + |l|
    + |l_old|``, and of logits that are sums of products.
    """

    title: str
    given: Batch
    exact: Batch
    spread: Tensor
    entropy: Tensor
    doubt: float


def title_of(shape: list[int], dtype: torch.dtype) -> str:
    """A batch's name."""
    return f"{shape} {str(dtype).removeprefix('torch.')}"


def cycled(values: tuple[float, ...], count: int, every: int = 1) -> Tensor:
    """``values`` over and over, each for ``every`` positions, ``[count]``."""
    return torch.tensor(values)[torch.arange(count) // every % len(values)]


class Places(NamedTuple):
    """Where sequences lie: shape of what is per token, ends of sequences ``[S]``, and the sequence of each row."""

    shape: tuple[int, ...]
    ends: Tensor
    sequence: Tensor

    @property
    def rows(self) -> int:
        """N."""
        return self.sequence.shape[0]

    def cu_seqlens(self) -> Tensor:
        """Where packed sequences begin and end."""
        return torch.cat([self.ends.new_zeros(1), self.ends])


def places_of(lengths: Tensor, packed: bool) -> Places:
    """Sequences of ``lengths [S]`` behind each other; padded ones are all as long."""
    ends = lengths.cumsum(0)
    shape = (int(ends[-1]),) if packed else (lengths.shape[0], int(lengths[0]))
    return Places(shape, ends, torch.repeat_interleave(torch.arange(lengths.shape[0]), lengths))


def make_problem(device: torch.device, case: Case, linear: bool = False) -> Problem:
    """Sequences of up to ``case.length`` tokens, over logits or hidden states."""
    generator = torch.Generator().manual_seed(case.vocab + case.length)
    lengths = torch.full((SEQUENCES,), case.length)
    if case.packed:
        lengths = lengths - (torch.arange(SEQUENCES) + 1) % 3
        lengths[EMPTY] = 0
    places = places_of(lengths, case.packed)
    mask = places.sequence != EMPTY
    mask[places.ends[list(LAST_MASKED)] - 1] = False
    tokens = torch.randint(case.vocab, (places.rows,), generator=generator)
    logits = hidden = weight = None
    if linear:
        hidden = torch.randn(*places.shape, HIDDEN, generator=generator).to(device, case.dtype)
        weight = (0.6 * torch.randn(case.vocab, HIDDEN, generator=generator)).to(device, case.dtype)
        exact = hidden.double() @ weight.double().t()
    else:
        drawn = 3 * torch.randn(places.rows, case.vocab, generator=generator)
        drawn[impossible(tokens, places, case.vocab)] = -torch.inf
        logits = drawn.view(*places.shape, case.vocab).to(device, case.dtype)
        exact = logits.double()
        logits[~mask.view(places.shape).to(device)] = torch.nan
    mask, tokens = mask.view(places.shape).to(device), tokens.view(places.shape).to(device)
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
        advantages=torch.tensor(ADVANTAGES, device=device),
        groups=torch.arange(SEQUENCES, device=device) // (SEQUENCES // 2),
        rewards=torch.tensor(REWARDS, device=device),
        cu_seqlens=places.cu_seqlens().to(device) if case.packed else None,
        temperature=case.temperature,
    )
    if case.packed:
        given = with_options(given, places)
    if case.kept:
        given, exact = _kept(given, exact, tokens)
    size = [*places.shape, HIDDEN, case.vocab] if linear else [*places.shape, case.vocab]
    return _scored(title_of(size, case.dtype), given, exact, tokens[..., None], places)


def _kept(given: Batch, exact: Tensor, tokens: Tensor) -> tuple[Batch, Tensor]:
    """With a record for two of three rows: the token alone, or others too; and logits that are -inf outside of it."""
    vocab, count = exact.shape[-1], tokens.numel()
    row, step = torch.arange(count, device=tokens.device)[:, None], torch.arange(6, device=tokens.device)
    ids = (tokens.reshape(-1, 1) + step * 37) % vocab
    ids = torch.where((row % 3 == 0) | ((row % 3 == 2) & (step > 0)), -1, ids)
    support = pack_support(ids)
    keep = torch.zeros(count, vocab, dtype=torch.bool, device=tokens.device).scatter_(1, ids.clamp(min=0), ids >= 0)
    keep = (keep | (row % 3 == 0)).scatter_(1, tokens.reshape(-1, 1), True)
    return given._replace(support=support), torch.where(keep.view(exact.shape), exact, -torch.inf)


def impossible(tokens: Tensor, places: Places, vocab: int) -> Tensor:
    """Which logits ``[N, V]`` are -inf: of every other row some, scattered or a leading block; one token's own."""
    column, row = torch.arange(vocab)[None], torch.arange(places.rows)[:, None]
    found = ((row % 4 == 1) & (column % 7 == 3)) | ((row % 4 == 3) & (column <= vocab // 2))
    found &= column != tokens[:, None]
    dead = int((places.sequence == DEAD).nonzero()[0])
    found[dead, tokens[dead]] = True
    return found


def with_options(given: Batch, places: Places) -> Batch:
    """With everything that a caller may leave out; the counts are those of a larger batch."""
    rows = torch.arange(places.rows, device=given.mask.device)

    def per_token(values: tuple[float, ...]) -> Tensor:
        return cycled(values, places.rows).view(places.shape).to(given.mask.device)

    return given._replace(
        temperature=per_token(TEMPERATURES),
        rollout_weights=per_token(ROLLOUT_WEIGHTS),
        entropy_mask=(rows % 3 != 1).view(places.shape),
        correct=torch.tensor(CORRECT, device=given.mask.device),
        num_tokens=float(2 * given.mask.sum() + 1),
        num_sequences=float(2 * SEQUENCES + 1),
    )


def _scored(title: str, given: Batch, exact: Tensor, tokens: Tensor, places: Places) -> Problem:
    """With log-probs of ``tokens [..., 1]`` under the ``exact`` logits, what is near them, and sizes of terms."""
    heat = given.temperature[..., None].double() if isinstance(given.temperature, Tensor) else given.temperature
    log_softmax = (exact / heat).log_softmax(-1)
    own, chances = log_softmax.gather(-1, tokens)[..., 0], log_softmax.exp()
    # Where a probability is 0 its term is 0.
    surprisal = torch.where(chances > 0, -log_softmax, 0.0)
    steps = torch.tensor(LOG_RATIOS)[places.sequence] + cycled(AROUND, places.rows)
    near = torch.where(own.isfinite(), own, -3.0)
    old = near - steps.view(places.shape).to(own)
    ref = near + cycled(KL_STEPS, places.rows).view(places.shape).to(own)
    given = given._replace(
        log_probs=own.float(),
        entropy=(chances * surprisal).sum(-1).float(),
        old_log_probs=old.float(),
        ref_log_probs=ref.float(),
    )
    products = 0.0
    if given.hidden is not None and given.weight is not None:
        sums = given.hidden.double().abs() @ given.weight.double().abs().t()
        products = float((sums / heat).max())
    doubt = 1 + float((near.abs() + old.abs()).max()) + products
    spread = (chances * (2 + surprisal)).scatter_add(-1, tokens, torch.ones_like(own)[..., None]) / heat
    entropy = 1 + (chances * surprisal * (1 + surprisal + products)).sum(-1)
    return Problem(title, given, given.double(), spread.flatten(0, -2), entropy, doubt)
