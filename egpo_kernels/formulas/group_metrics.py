"""The metrics of the group level, from sequences and groups in a few whole matrices."""

import functools

from egpo_kernels.formulas.arrays import Array, floating, isfinite, joined, largest, picked, where
from egpo_kernels.formulas.groups import Groups, Known, Rules
from egpo_kernels.formulas.tables import GROUP, NOTHING

# Whose values are summed up: sequences whose correctness, 1 or 0, is not the place in this list.
_OF = ("correct", "incorrect", "")
_VALUES = ("advantage", "weight", "uncertainty")
# As `_count_groups` numbers them.
_KINDS = ("single", "unusable", "all_wrong", "all_correct", "no_correct", "mixed")


@functools.cache
def _found() -> tuple[int, ...]:
    """Where each slot of `GROUP` lies in the vector that `raw` puts together."""
    parts = [f"egpo/{value}/{of}".rstrip("/") for value in _VALUES for of in _OF]
    names = [f"{part}/count/sum" for part in parts]
    names += [f"egpo/weight/{bound}/mean" for bound in ("at_lower", "at_one", "at_upper")]
    names += ["egpo/empty_sequences/sum", "egpo/invalid_rewards/sum"]
    names += [f"egpo/groups/{kind}/sum" for kind in _KINDS]
    names += ["egpo/groups/sum", "egpo/incomplete_groups/sum"]
    names += [f"{part}/{what}" for what in ("total/sum", "max", "min") for part in parts]
    return tuple(names.index(slot) for slot in GROUP.slots)


def raw(
    results: list[Array],
    correct: Array,
    counts: Array | None,
    rewards: Known,
    rules: Rules,
    incomplete: Array | None,
    groups: Groups,
    bounds: tuple[float, float],
) -> Array:
    """Fill the slots of `GROUP`, in its order.

    Args:
        results: Advantages, weights, base advantages, uncertainty: sorted, ``[S]``, as they are reported.
        correct: Sorted ``[S]`` bool.
        counts: Counted tokens ``[S]`` in any order; None: not known.
        rewards: Which of them are usable.
        rules: Rules that groups fall under.
        incomplete: Groups ``[P]`` without the members they must have; None: none.
        groups: Who is in which group.
        bounds: Of the weights.
    """
    advantages, weights, _, uncertainty = results
    values = joined((advantages, weights, uncertainty)).reshape(3, 1, -1)
    among = correct != groups.column((0, 1, 2))
    nobody = ~among[2:]
    at_bounds = weights == groups.column((bounds[0], 1.0, bounds[1]), weights)
    empty = nobody if counts is None else (counts == 0)[None]
    invalid = nobody if rewards.finite is None else ~rewards.finite[None]
    flags = joined((among, among, among & isfinite(uncertainty), at_bounds, empty, invalid))
    counted = flags[:9].reshape(3, 3, -1)
    totals = floating(where(counted, values, 0.0), groups.sizes).sum(2)
    extremes = joined((values, -values)).reshape(2, 3, 1, -1)
    extremes = largest(where(counted, extremes, NOTHING)) if len(correct) else extremes.new_full((2, 3, 3), NOTHING)
    parts = flags.sum(1), _count_groups(rules, incomplete, groups), totals.reshape(-1), extremes.reshape(-1)
    return floating(picked(joined(parts), _found()), weights)


def _count_groups(rules: Rules, incomplete: Array | None, groups: Groups) -> Array:
    """How many groups are of each of `_KINDS`, how many there are, how many incomplete: ``[8]``."""
    kind, exists = where(rules.collapsed, 3, 5) - 1 * rules.unsolved, groups.sizes > 0
    if rules.enough is not None:
        kind = where(rules.enough, kind, where(groups.others == 0, 0, 1))
    if not groups.at_hand:
        kind = where(exists, kind, -1)
    missing = exists & (~exists if incomplete is None else incomplete)
    return joined((kind == groups.column((0, 1, 2, 3, 4, 5)), exists[None], missing[None])).sum(1)
