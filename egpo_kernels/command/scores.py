"""Batches of log-probs and of groups that kernels are checked on, without logits."""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels.command.batches import (
    KL_STEPS,
    ROLLOUT_WEIGHTS,
    Batch,
    Places,
    Problem,
    cycled,
    places_of,
    title_of,
)

LENGTH = 8
NO_TOKEN, NOT_COUNTED, INSIDE = 4, 7, 9
"""Sequences: an empty one (where they are packed), one with nothing in the mask, one whose ratio is all but 1."""
LOG_RATIOS = (-1.5, -0.9, -0.3, -0.1, 0.05, 0.215, 0.3, 0.8, 1.3, 1.9)
"""One token after the other: below, between and above the bounds of every recipe and option."""
ALL_BUT_1 = 1e-4
ADVANTAGES = (-1.5, 2.0, -0.5, 1.0, 0.75, -1.25, 0.0, 0.6, -0.8, 1.4, -1.1, 1.2)
GROUPS: tuple[tuple[float, ...], ...] = (
    (1.0, 0.0, 0.0, 1.0),
    (0.0, 0.0, 0.0),
    (1.0, 1.0),
    (1.0,),
    (0.0,),
    (1.0, torch.nan, 0.0, torch.inf, 0.0),
    (torch.nan, 1.0),
    (-0.5, 0.25, -0.2, 0.1),
    (0.6, 0.7, 0.9),
    (0.3, 0.3, 0.3),
)
"""Rewards: mixed, all wrong, all correct, of one (twice), not all finite, too few, shaped and wrong, alike, equal."""
CERTAIN = 2
"""The group whose tokens have log-prob 0."""
ROUNDED = 9
"""The group one of whose rewards is rounded differently, which makes them no less equal."""


def make_scores(device: torch.device, packed: bool, weighted: bool = False) -> Problem:
    """Log-probs, old ones beyond every bound, and entropies; packed with counts of a larger batch."""
    lengths = torch.full((len(ADVANTAGES),), LENGTH)
    if packed:
        lengths = lengths - torch.arange(len(ADVANTAGES)) % 3
        lengths[NO_TOKEN] = 0
    places = places_of(lengths, packed)
    mask = (places.sequence != NOT_COUNTED) & (places.sequence != NO_TOKEN)
    mask[places.ends[::3] - 1] = False
    steps = torch.where(places.sequence == INSIDE, ALL_BUT_1, cycled(LOG_RATIOS, places.rows))
    groups = torch.arange(len(ADVANTAGES)) // 4
    problem = _made(device, places, mask, steps, torch.tensor(ADVANTAGES), groups, groups.float(), packed)
    if weighted:
        weights = cycled(ROLLOUT_WEIGHTS, places.rows).view(places.shape).to(device)
        problem = _with(problem, rollout_weights=weights)
    if packed:
        problem = _with(problem, num_tokens=float(2 * mask.sum() + 1), num_sequences=float(2 * len(ADVANTAGES) + 1))
    return problem


def make_groups(device: torch.device, packed: bool, judged: bool = False) -> Problem:
    """Groups of every kind, their members in any order; packed with a mask for the uncertainty, or with ``correct``."""
    sizes = torch.tensor([len(rewards) for rewards in GROUPS])
    group = torch.repeat_interleave(torch.arange(len(GROUPS)), sizes)
    rewards = torch.tensor([reward for rewards in GROUPS for reward in rewards])
    rounded = rewards.clone()
    last = int(sizes[: ROUNDED + 1].sum()) - 1
    rounded[last] = torch.nextafter(rewards[last], torch.tensor(1.0))
    order = torch.randperm(group.shape[0], generator=torch.Generator().manual_seed(len(GROUPS)))
    group, rewards, rounded = group[order], rewards[order], rounded[order]
    lengths = torch.full((group.shape[0],), 4)
    if packed:
        lengths = torch.arange(group.shape[0]) % 5
    places = places_of(lengths, packed)
    mask = places.sequence % 6 != 5
    mask[::7] = False
    steps = cycled(LOG_RATIOS, places.rows)
    problem = _made(device, places, mask, steps, torch.zeros(group.shape[0]), 3 * group - 5, rounded, packed)
    certain = (group == CERTAIN)[places.sequence].view(places.shape).to(device)
    old = torch.where(certain & problem.given.mask, 0.0, problem.given.old_log_probs)
    old = torch.where(problem.given.log_probs == -torch.inf, -torch.inf, old)
    problem = _with(problem, old_log_probs=old)
    if packed:
        problem = _with(problem, entropy_mask=(torch.arange(places.rows) % 3 != 1).to(device))
    if judged:
        problem = _with(problem, correct=((rewards > 0.5) ^ (torch.arange(rewards.shape[0]) % 3 == 1)).to(device))
    return problem._replace(exact=problem.exact._replace(rewards=rewards.double().to(device)))


def _with(problem: Problem, **options: Any) -> Problem:
    given = problem.given._replace(**options)
    return problem._replace(given=given, exact=given.double())


def _made(
    device: torch.device,
    places: Places,
    mask: Tensor,
    steps: Tensor,
    advantages: Tensor,
    groups: Tensor,
    rewards: Tensor,
    packed: bool,
) -> Problem:
    """Log-probs and entropies at random; what does not count is NaN, and one counted token is impossible."""
    generator = torch.Generator().manual_seed(places.rows)
    log_probs = -8 * torch.rand(places.rows, generator=generator)
    entropy = 6 * torch.rand(places.rows, generator=generator)
    old, ref = log_probs - steps, log_probs + cycled(KL_STEPS, places.rows, every=2)
    doubt = 1 + float((log_probs.abs() + old.abs()).max())
    log_probs[mask.nonzero()[-1]] = -torch.inf
    scores: dict[str, Any] = {
        name: torch.where(mask, it, torch.nan).view(places.shape).to(device)
        for name, it in (("log_probs", log_probs), ("entropy", entropy), ("old_log_probs", old), ("ref_log_probs", ref))
    }
    mask = mask.view(places.shape).to(device)
    given = Batch(
        logits=None,
        hidden=None,
        weight=None,
        tokens=torch.zeros_like(mask, dtype=torch.long),
        mask=mask,
        **scores,
        advantages=advantages.to(device),
        groups=groups.to(device),
        rewards=rewards.to(device),
        cu_seqlens=places.cu_seqlens().to(device) if packed else None,
    )
    nothing = mask.new_empty(0, dtype=torch.float64)
    return Problem(title_of(list(places.shape), torch.float32), given, given.double(), nothing, nothing, doubt)
