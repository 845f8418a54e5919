"""What the caller gave per token or per sequence, checked, and the rows that are made of it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.engine import row_ops
from egpo_kernels.formulas.rows import NO_COUNTS, Counts, Material, Purpose, token_rows
from egpo_kernels.inputs.layout import PER_TOKEN, Layout
from egpo_kernels.inputs.segments import counted_rows, flat

MASK, TOKENS, TEMPERATURE, ADVANTAGES, _, OLD_LOG_PROBS, REF_LOG_PROBS, ROLLOUT_WEIGHTS = range(len(Rows._fields))
FREE = (OLD_LOG_PROBS, REF_LOG_PROBS, ROLLOUT_WEIGHTS)
"""What may not be given."""


class Given(NamedTuple):
    """Tensors in the order of `egpo_kernels.config.results.Rows`, None where not given, and the kind of each.

    One of a number for each token has the tokens' shape.
    """

    tensors: list[Tensor | None]
    kinds: list[int]

    @classmethod
    def nothing(cls) -> "Given":
        """To be filled."""
        return cls([None] * len(Rows._fields), [0] * len(Rows._fields))

    def copy(self) -> "Given":
        """Another, to be filled further."""
        return Given(list(self.tensors), list(self.kinds))

    def put(self, place: int, values: Tensor, kind: int = PER_TOKEN) -> None:
        """Fill in a tensor, which is a constant to every loss."""
        self.tensors[place] = values.detach() if values.requires_grad else values
        self.kinds[place] = kind

    def counted(self, layout: Layout) -> Tensor:
        """Rows ``[N]`` that count."""
        mask, tokens = self.tensors[MASK], self.tensors[TOKENS]
        return counted_rows(flat(mask), flat(tokens), layout.known_offsets, layout.num_rows, layout.device)


def operands(
    tensors: Sequence[Tensor | None],
    kinds: list[int],
    size: tuple[int, int],
    counts: Counts,
    config: str,
    only_active: bool,
    offsets: Tensor | None = None,
    poison: Tensor | None = None,
) -> tuple[list[Tensor | None], row_ops.How]:
    """What operators that make rows are given: their argument ``given``, and those beside tensors."""
    numbers, counted = counts.apart()
    return [*tensors, offsets, poison, *counted], (kinds, [*size], numbers, config, only_active)


class Unmade(NamedTuple):
    """What rows are made of, for an operator that makes them on its way; without a ``config`` for log-probs alone."""

    given: Given
    layout: Layout
    dtype: torch.dtype
    config: PolicyLossConfig | None = None
    counts: Counts = NO_COUNTS
    poison: Tensor | None = None
    only_active: bool = False

    def operands(self) -> tuple[list[Tensor | None], row_ops.How]:
        """See `operands`."""
        (tensors, kinds), layout, _, config, counts, poison, only_active = self
        size = (layout.num_rows, layout.num_sequences)
        settings = "" if config is None else config.json
        return operands(tensors, kinds, size, counts, settings, only_active, layout.known_offsets, poison)

    @property
    def purpose(self) -> Purpose:
        """What the rows are made for."""
        return Purpose(self.config, self.dtype, self.only_active)

    def fresh(self) -> tuple[bool, ...]:
        """Which rows must be made; the others are there already."""
        return self.purpose.made(*self.given, self.layout.known_offsets is not None)

    def made(self, backend: str) -> Rows:
        """The rows, by one operator, or none where all is there already."""
        if backend == "reference":
            material = Material(*self.given, self.layout.segments, self.poison, self.counts, self.purpose)
            return token_rows(material)
        fresh, rows = self.fresh(), self.given.tensors
        if any(fresh):
            tensors, how = self.operands()
            new = iter(row_ops.token_rows(tensors, *how, self.dtype, backend))
            rows = [next(new) if own else old for own, old in zip(fresh, rows, strict=True)]
        mask, *others = rows
        assert mask is not None
        return Rows(mask, *others)
