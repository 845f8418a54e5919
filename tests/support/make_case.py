"""Small random batches with every option a test may ask for.

The loss is continuous but its gradient is not: it jumps where a ratio meets a clip bound, where a log-ratio meets
`max_log_ratio`, where a reward meets the threshold. Rounding may fall on either side there, so `make_case` keeps log
ratios `MARGIN` away from every jump, and shaped rewards are drawn from a continuum, instead of loosening any tolerance.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egpo_kernels.config.results import SamplingSupport
from egpo_kernels.config.settings import PolicyLossConfig, Recipe
from egpo_kernels.recipes import DR_GRPO, EGPO, RECIPES
from tests.support.case import Case, strided
from tests.support.device import DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MARGIN = 0.01
"""Nats between a drawn log-ratio and the nearest jump of the gradient."""
PUBLISHED = {name: recipe for name, recipe in RECIPES.items() if name != "dr_grpo"}
PUBLISHED["dr_grpo"] = DR_GRPO.replace(norm_length=7)
"""Every recipe, as it can be run."""


def make_case(
    seed: int,
    *,
    group_sizes: tuple[int, ...] = (4, 3),
    length: int = 4,
    vocab: int = 33,
    dtype: torch.dtype = torch.float32,
    layout: str = "padded",
    strides: str = "contiguous",
    recipe: Recipe = EGPO,
    names: str = "tensor",
    mask: str = "bool",
    old: str = "near",
    temperature: str = "float",
    padded_vocab: bool = False,
    garbage: bool = False,
    support: str = "none",
) -> Case:
    """A batch with the groups of these sizes in shuffled order; equal settings give equal batches.

    `mask`: "none" (tokens -100 instead), "bool", "int", "float". `old`: "none", "near", "far". `temperature`: "one",
    "float", "sequence", "token". `garbage` puts NaN where nothing may be read. `support`: "none", "some" (rows without
    a record among the others), "all".
    """
    rng = np.random.default_rng(seed)
    sequences, wide = sum(group_sizes), torch.float64 if dtype == torch.float64 else torch.float32
    lengths = rng.integers(0, length + 1, sequences)
    if layout == "padded":
        shape, cu_seqlens = (sequences, length), None
        inside = np.arange(length)[None] < lengths[:, None]
    else:
        cu_seqlens = torch.tensor([0, *lengths.cumsum()], dtype=torch.int32 if seed % 2 else torch.int64)
        rows = int(lengths.sum() + rng.integers(1, 4))
        # With as many rows as sequences a per-token value would be read as one per sequence.
        shape = (rows + (rows == sequences),)
        inside = np.arange(shape[0]) < lengths.sum()
    counted = inside & (rng.random(shape) < 0.85)

    logits = rng.normal(size=(*shape, vocab)) * rng.choice([0.5, 2.0, 6.0]) + rng.choice([0.0, 0.0, 100.0, -1000.0])
    tokens = rng.integers(0, vocab, shape)
    if padded_vocab and vocab > 4:
        logits[..., -2:] = -np.inf
        tokens %= vocab - 2
    logits = torch.from_numpy(logits).to(dtype)
    tokens = torch.from_numpy(tokens)
    keep = torch.from_numpy(np.asarray(counted))
    if garbage or mask == "none":
        tokens[~keep] = -100
    if garbage:
        logits[~keep] = torch.nan
    kept = None if support == "none" else _support(np.random.default_rng(seed + 1), tokens, keep, vocab, support)
    kinds = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}
    given_mask = None if mask == "none" else keep.to(kinds[mask])

    def tensor(values: Any, hide: bool = False) -> Tensor:
        made = torch.as_tensor(np.asarray(values)).to(wide)
        return torch.where(keep, made, torch.nan) if hide and garbage else made

    numbers = np.repeat(np.arange(len(group_sizes)), group_sizes)
    if names != "int":
        numbers = rng.permutation(numbers)
    rewards = np.zeros(sequences)
    for group, size in enumerate(group_sizes):
        rewards[numbers == group] = _rewards(rng, size)

    heat: Any = 1.0 if temperature == "one" else float(rng.choice([1.0, 0.7, 1.6]))
    if temperature in ("sequence", "token"):
        heat = tensor(rng.uniform(0.5, 2.0, sequences if temperature == "sequence" else shape))
    per_token = rng.random() < 0.5
    advantages = rng.normal(size=shape if per_token else sequences) * (rng.random(shape if per_token else 1) < 0.8)
    weights = rng.uniform(0.3, 2.0, shape if rng.random() < 0.5 else (sequences, 1) if seed % 2 else sequences)
    weights[rng.random(weights.shape) < 0.1] = np.nan
    case = Case(
        logits=strided(logits, strides),
        tokens=tokens,
        groups=_names(rng, numbers, group_sizes, names),
        rewards=tensor(rewards),
        advantages=tensor(advantages, hide=per_token),
        upstream=tensor(rng.normal(size=shape) if recipe.loss.reduction == "none" else rng.choice([1.0, 0.5, -3.0])),
        recipe=recipe,
        mask=given_mask,
        rollout_weights=tensor(weights) if rng.random() < 0.4 else None,
        entropy_mask=torch.from_numpy(np.asarray(rng.random(shape) < 0.7)) if rng.random() < 0.3 else None,
        correct=torch.from_numpy(rng.random(sequences) < 0.5) if rng.random() < 0.2 else None,
        cu_seqlens=cu_seqlens,
        temperature=heat,
        support=kept,
        num_tokens=[None, 29, torch.tensor(17)][rng.integers(3)],
        num_sequences=[None, 11, torch.tensor(5.0)][rng.integers(3)],
    )
    case = _on_device(case)
    if garbage and case.support is not None:
        case.logits.masked_fill_(~case.keeps.view(case.logits.shape), torch.nan)
    changes: dict[str, Any] = {}
    if old != "none":
        log_ratio = _log_ratios(rng, case, far=old == "far", sequence=recipe.loss.ratio != "token")
        changes["old_log_probs"] = tensor((case.log_probs().cpu() - log_ratio).view(shape), hide=True)
    if recipe.loss.kl_coef or rng.random() < 0.3:
        drift = torch.from_numpy(rng.normal(size=shape) * 0.5).view(-1)
        drift = _away_from(drift, _ref_bounds(recipe.loss))
        changes["ref_log_probs"] = tensor((case.log_probs().cpu() + drift).view(shape), hide=True)
    return _on_device(case.replace(**changes))


def _on_device(case: Case) -> Case:
    moved: dict[str, Any] = {name: value.to(DEVICE) for name, value in vars(case).items() if isinstance(value, Tensor)}
    if case.support is not None:
        moved["support"] = SamplingSupport(*(value.to(DEVICE) for value in case.support))
    return case.replace(**{**moved, "logits": case.logits})


def _support(rng: np.random.Generator, tokens: Tensor, keep: Tensor, vocab: int, kind: str) -> SamplingSupport:
    """Sets with the row's token and without, of it alone, of everything; where a row does not count, of anything."""
    lists: list[np.ndarray] = []
    for token, counts in zip(tokens.reshape(-1).tolist(), keep.reshape(-1).tolist(), strict=True):
        size = min(vocab, int(rng.choice([1, 2, 3, 8, vocab])))
        kept = rng.choice(vocab, size, replace=False)
        drawn = rng.random()
        if not counts:
            kept = rng.integers(-3, vocab + 3, size)
        elif kind == "some" and drawn < 0.4:
            kept = kept[:0]
        elif drawn < 0.6:
            kept = np.array([token])
        elif drawn < 0.9:
            kept = np.union1d(kept, [token])
        lists.append(rng.permutation(kept))
    wide = torch.int32 if rng.random() < 0.5 else torch.int64
    ids = torch.from_numpy(np.concatenate([*lists, rng.integers(0, vocab, rng.integers(3))])).to(wide)
    return SamplingSupport(ids, torch.tensor(np.cumsum([0, *map(len, lists)])).to(wide))


def _rewards(rng: np.random.Generator, size: int) -> np.ndarray:
    kind = rng.choice(["binary", "binary", "shaped", "wrong", "right", "collapsed", "non-finite"])
    if kind == "shaped":
        return rng.normal(size=size)
    if kind in ("wrong", "right", "collapsed"):
        return np.full(size, {"wrong": 0.0, "right": 1.0, "collapsed": rng.normal()}[kind])
    rewards = rng.integers(0, 2, size).astype(float)
    if kind == "non-finite":
        rewards[rng.random(size) < 0.4] = rng.choice([np.nan, np.inf, -np.inf])
    return rewards


def _names(rng: np.random.Generator, numbers: np.ndarray, sizes: tuple[int, ...], kind: str) -> Any:
    if kind == "int":
        return sizes[0]
    ids = rng.choice(np.arange(-5, 50), len(sizes), replace=False)[numbers]
    if kind == "tensor":
        return torch.from_numpy(ids).to(torch.int32 if len(ids) % 2 else torch.int64)
    strings = [f"prompt-{number}" for number in ids]
    return strings if kind == "strings" else np.array(strings, dtype=object)


def _bounds(config: PolicyLossConfig) -> tuple[float, ...]:
    """Log-ratios at which the gradient jumps; of gmpo a token's own."""
    if config.surrogate == "gmpo":
        return (-config.clip_low, config.clip_high, -config.max_log_ratio, config.max_log_ratio)
    cap = 1 + config.clip_high if config.ratio_cap is None else config.ratio_cap
    ratios = (1 - config.clip_low, cap, config.dual_clip or 0.0)
    return (*(math.log(ratio) for ratio in ratios if ratio > 0), -config.max_log_ratio, config.max_log_ratio)


def _ref_bounds(config: PolicyLossConfig) -> tuple[float, ...]:
    """Log-ratios to the reference at which the gradient of the KL estimate jumps."""
    limit = config.max_log_ratio
    if config.kl_max is None:
        return (-limit, limit)
    if config.kl == "k3":
        # The two roots of e^x - x - 1 = kl_max.
        grid = np.linspace(-limit, limit, 200_001)
        above = np.exp(grid) - grid - 1 > config.kl_max
        roots = grid[1:][above[1:] != above[:-1]]
        return (-limit, *roots.tolist(), limit)
    root = config.kl_max if config.kl == "k1" else math.sqrt(2 * config.kl_max)
    return (-limit, -root, root, limit)


def _away_from(values: Tensor, bounds: tuple[float, ...]) -> Tensor:
    # Upwards, from the lowest bound to the highest: a value pushed past one bound is then tested against the next.
    for bound in sorted(bounds):
        values = torch.where((values - bound).abs() < MARGIN, bound + 1.5 * MARGIN, values)
    return values


def _log_ratios(rng: np.random.Generator, case: Case, far: bool, sequence: bool) -> Tensor:
    """Log-ratios [N] some of which are clipped; far ones lie beyond every bound, or at infinity."""
    config, index, counted = case.recipe.loss, case.index.cpu(), case.counted.cpu()
    log_ratio = torch.from_numpy(rng.normal(size=index.shape[0]) * 0.4)
    if far:
        beyond = config.max_log_ratio + 5.0
        chosen = torch.from_numpy(rng.choice([-2.5, 2.5, -beyond, beyond, np.inf], index.shape[0]))
        log_ratio = torch.where(torch.from_numpy(rng.random(index.shape[0]) < 0.2), chosen, log_ratio)
    limit = config.max_log_ratio
    log_ratio = _away_from(log_ratio, _bounds(config))
    for number in range(case.num_rewards if sequence else 0):
        own = counted & (index == number)
        for _ in range(20):
            mean = log_ratio[own].clamp(-limit, limit).mean()
            if not own.any() or all(abs(mean - bound) > MARGIN for bound in _bounds(config)):
                break
            log_ratio[own] = _away_from(log_ratio[own] + 2 * MARGIN, (-limit, limit))
    return log_ratio
