"""The public group level: validate, and ask the engine for advantages."""

from typing import Any

from torch import Tensor

from egpo_kernels.config import recipes
from egpo_kernels.config.results import GroupAdvantages
from egpo_kernels.config.settings import AdvantageConfig
from egpo_kernels.engine.dispatch import choose_backend
from egpo_kernels.engine.groups import PerToken, advantages_of_groups
from egpo_kernels.inputs.layout import make_layout
from egpo_kernels.inputs.validation import check_choice, check_instance, check_rewards, check_tensor


def group_advantages(
    groups: Any,
    rewards: Tensor,
    old_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    correct: Tensor | None = None,
    config: AdvantageConfig = recipes.EGPO.advantage,
    group_size: int | None = None,
    metrics: str = "all",
    backend: str = "auto",
) -> GroupAdvantages:
    """Advantages of whole groups (EGPO, arXiv 2602.22751, Eq. 2, 5-11, 13); call it before any micro-batching.

    Args:
        groups: Group of each sequence: integer tensor ``[S]`` (any ids, any order), list of names, numpy array, or an
            int G for G consecutive sequences.
        rewards: ``[S]``; a non-finite one gives advantage 0 and is left out of its group's reward statistics.
        old_log_probs: Log-probs of the sampled tokens in nats, ``[S, T]`` or packed ``[N]``; their negative mean is the
            uncertainty.
        mask: Shaped like old_log_probs, nonzero where a token is in the mask; None: everywhere. Without log-probs,
            ``scale="batch_whiten"`` needs it, since it whitens over the tokens in the mask.
        cu_seqlens: ``[S + 1]`` integer, for the packed layout.
        entropy: Shannon entropy of each position in nats, for ``statistic="shannon"``.
        entropy_mask: Which tokens in the mask the uncertainty averages over, shaped like mask; None: all of them.
        correct: ``[S]`` bool; None: ``reward > config.correct_threshold``.
        config: Settings of the advantages.
        group_size: Members that every group must have. If ids are on the host (list, numpy, int, CPU tensor), another
            number raises an error; if they are on a device, the group's advantages are NaN and a metric counts it.
        metrics: ``all`` or ``none``, which saves their computing.
        backend: ``auto``, ``triton``, ``portable`` or ``reference``.

    Returns:
        ``(advantages, weights, base, uncertainty, metrics)``, ``[S]`` each, float32 (float64), without gradient.

    Raises:
        ValueError: A wrong shape, device, value or combination; a weight without log-probs or entropies.
        TypeError: A wrong type or dtype.
    """
    check_instance("config", config, AdvantageConfig)
    rewards = check_rewards(rewards)
    sequences, device = rewards.shape[0], rewards.device
    layout = None
    shaping = {"old_log_probs": old_log_probs, "entropy": entropy, "mask": mask}
    name = next((name for name, given in shaping.items() if given is not None), None)
    if name is not None:
        shaped = check_tensor(name, shaping[name], "real" if name == "mask" else "floating", {}, device)
        layout = make_layout(name, tuple(shaped.shape), cu_seqlens, device)
        if layout.num_sequences != sequences:
            raise ValueError(
                f"rewards has {sequences} entries; {name} holds {layout.num_sequences} sequences; they must be as many"
            )
        mask = None if mask is None else layout.shaped("mask", mask, "real")
    for name, given in (("entropy_mask", entropy_mask), ("cu_seqlens", cu_seqlens)):
        if given is not None:
            check_instance(name, given, Tensor)
    reported = check_choice("metrics", metrics, ("all", "none")) == "all"
    per_token = PerToken(old_log_probs, entropy, entropy_mask, mask)
    backend = choose_backend(backend, device)
    return advantages_of_groups(groups, rewards, per_token, correct, layout, config, group_size, reported, backend)
