"""What the sampler of TRL's rollouts kept (top-p, top-k, min-p), from a ``rollout_func`` to the loss (TRL 1.16)."""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig

from egpo_kernels.config.results import Metrics, SamplingSupport
from egpo_kernels.engine import row_ops
from egpo_kernels.formulas import metrics
from egpo_kernels.rollouts.kept import support_from_lists

IDS, OFFSETS = "sampling_mask_ids", "sampling_mask_offsets"
"""What a ``rollout_func`` returns them as: the arguments of `support_from_lists`."""
RECORDS = "sampling_masks"
"""A batch's records: a list, which TRL shuffles and splits with the tensors beside it, each as long as it is."""


def take_records(fields: dict[str, Any], completions: Sequence[Sequence[int]]) -> list[SamplingSupport] | None:
    """Take from a rollout's extra fields what was kept for each token of its completions; None: nothing is said of it.

    Raises:
        ValueError: A record that does not fit its completion.
        TypeError: A wrong type.
    """
    ids, offsets = fields.pop(IDS, None), fields.pop(OFFSETS, None)
    if ids is None and offsets is None:
        return None
    if ids is None:
        raise ValueError(f"rollout_func returned {OFFSETS} without {IDS}; it must return the kept ids too")
    for name, values in ((IDS, ids), (OFFSETS, offsets)):
        if isinstance(values, (list, tuple)) and len(values) != len(completions):
            raise ValueError(
                f"rollout_func returned {name} with {len(values)} entries; it must have one for each of "
                f"{len(completions)} completions, None where nothing was recorded"
            )
    bounds = torch.tensor([0, *map(len, completions)]).cumsum(0)
    try:
        whole = support_from_lists(ids, offsets, cu_seqlens=bounds)
    except (ValueError, TypeError) as error:
        names = str(error).replace("offsets[", f"{OFFSETS}[").replace("token_ids", IDS)
        raise type(error)(f"rollout_func returned what does not fit its completions: {names}") from error
    for number, tokens in enumerate(completions):
        kept, ends = ids[number], None if offsets is None else offsets[number]
        recorded = None if kept is None else len(kept) if ends is None else len(ends) - 1
        if recorded not in (None, len(tokens)):
            raise ValueError(
                f"rollout_func returned a record of {recorded} tokens for completion {number}, which has {len(tokens)}"
                "; it must have a set for each, an empty one for what was not sampled"
            )
    edges = whole.offsets[bounds].tolist()
    return [
        SamplingSupport(whole.ids[low:high], whole.offsets[first : last + 1] - low)
        for (low, high), (first, last) in zip(pairwise(edges), pairwise(bounds.tolist()), strict=True)
    ]


def padded(records: Sequence[SamplingSupport], width: int) -> SamplingSupport:
    """Records of completions, for the rows of ``[B, width]``."""
    return support_from_lists([each.ids for each in records], [each.offsets for each in records], length=width)


def truncating(args: GRPOConfig) -> dict[str, Any]:
    """The options by which TRL's samplers draw from less than the vocabulary."""
    whole = {"top_p": 1, "top_k": 0, "min_p": 0}
    given = {name: getattr(args, name) for name in whole} | (args.generation_kwargs or {})
    found = {name: value for name in whole if (value := given[name]) is not None}
    return {name: value for name, value in found.items() if (value < 1 if name == "top_p" else value > whole[name])}


def warn_of_truncation(options: dict[str, Any]) -> None:
    """Say that no record came of a sampler that truncates, which TRL passes over."""
    given = ", ".join(f"{name}={value}" for name, value in options.items())
    warnings.warn(
        f"the sampler draws from a part of the vocabulary ({given}), and no record of the kept tokens came with its "
        "completions: log-probs and ratios are over the whole vocabulary, another distribution than was sampled from. "
        f"Return {IDS} and {OFFSETS} from a rollout_func, or sample with top_p=1, without top_k and min_p",
        stacklevel=2,
    )


def kept_metrics(records: Sequence[SamplingSupport], tokens: Tensor, mask: Tensor) -> Metrics:
    """What was kept for the tokens ``[B, T]`` in the mask, as ``support/...``."""
    ids, offsets = (each.to(tokens.device) for each in padded(records, tokens.shape[1]))
    vector = row_ops.support_metrics(ids, offsets, tokens.flatten(), mask.flatten().bool(), torch.float32, "portable")
    return metrics.named(vector, metrics.SUPPORT)
