"""What DAPO does to a batch before the loss: prompts worth training on, and a price on length (arXiv 2503.14476)."""

from typing import Any

from torch import Tensor

from egpo_kernels.config.fields import check_number
from egpo_kernels.config.settings import compute_dtype
from egpo_kernels.formulas.advantages import collapse_tolerance, is_collapsed, make_groups, rewards_in
from egpo_kernels.inputs.layout import consecutive_ids, group_ids
from egpo_kernels.inputs.validation import check_dense, check_rewards


def informative_groups(groups: Any, rewards: Tensor) -> Tensor:
    """Sequences in groups whose rewards differ: dynamic sampling keeps those (DAPO, arXiv 2503.14476, Eq. 11).

    If all rewards of a group are equal, GRPO's advantages are 0. Recipes with ``all_wrong="negative"`` learn from
    all-wrong groups all the same: do not drop those groups there.

    Args:
        groups: Group of each sequence, as `group_advantages` takes them.
        rewards: ``[S]``; non-finite ones are left out.

    Returns:
        Bool ``[S]``: select sequences with it, or sample more until enough are left.

    Raises:
        ValueError: A wrong shape, device or value.
        TypeError: A wrong type or dtype.
    """
    check_rewards(rewards)
    ids, size = group_ids(groups, rewards.shape[0], rewards.device, None)
    members = make_groups(consecutive_ids(rewards.shape[0], size, rewards.device) if ids is None else ids)
    values = rewards_in(compute_dtype(rewards.dtype), rewards)
    return ~is_collapsed(values, members, collapse_tolerance(rewards.dtype))


def soft_overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """Length penalty, to be added to the rewards (DAPO, arXiv 2503.14476, Eq. 13).

    It is 0 up to ``max_length - buffer`` tokens, falls linearly to -1 at ``max_length``, and is -1 beyond.

    Args:
        lengths: Tokens of each response, ``[S]``, integer.
        max_length: Length from which the penalty is -1, in tokens, at least 1.
        buffer: Number of tokens before it over which the penalty grows, in (0, max_length].

    Returns:
        Float32 ``[S]`` in [-1, 0].

    Raises:
        ValueError: A wrong shape or value.
        TypeError: A wrong type or dtype.
    """
    if check_dense("lengths", lengths, "integer").dim() != 1:
        raise ValueError(f"lengths has shape {list(lengths.shape)}; it must be [S], tokens of each response")
    longest = check_number("max_length", max_length, low=1.0, high=2.0**53) or 1.0
    width = check_number("buffer", buffer, low=0.0, high=longest, open_low=True) or 1.0
    return ((longest - width - lengths.double()) / width).clamp(-1.0, 0.0).float()
