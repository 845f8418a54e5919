"""What the caller gave per token or per sequence, checked, and the rows that are made of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.settings import PolicyLossConfig, Rows
from egpo_kernels.engine import row_ops
from egpo_kernels.formulas.rows import Counts, Wanted, token_rows
from egpo_kernels.inputs.layout import Field, Kind, Layout
from egpo_kernels.inputs.segments import Segments, counted_rows


class Given(NamedTuple):
    """The fields of `egpo_kernels.config.settings.Rows`, as far as they were given."""

    mask: Field = Field()
    tokens: Field = Field()
    temperature: Field = Field()
    advantages: Field = Field()
    factor: Field = Field()
    old_log_probs: Field = Field()
    ref_log_probs: Field = Field()
    rollout_weights: Field = Field()

    def counted(self, layout: Layout) -> Tensor:
        """Rows ``[N]`` that count."""
        mask, tokens = self.mask.values, self.tokens.values
        return counted_rows(mask, tokens, layout.known_offsets, layout.num_rows, layout.device)


NO_COUNTS = Counts()


def per_token(values: Tensor | None) -> Field:
    """A field of flat values."""
    return Field() if values is None else Field(values, Kind.PER_TOKEN)


def segments_of(layout: Layout) -> Segments:
    """How rows belong to sequences."""
    return Segments(layout.num_rows, layout.num_sequences, layout.known_offsets)


def make_rows(
    given: Given,
    layout: Layout,
    dtype: torch.dtype,
    backend: str,
    config: PolicyLossConfig | None = None,
    counts: Counts = NO_COUNTS,
    poison: Tensor | None = None,
    only_active: bool = False,
) -> Rows:
    """Rows for a loss, or without a ``config`` for log-probs; one operator, or none where all is there already."""
    tensors = tuple(_constant(field.values) for field in given)
    kinds = [int(field.kind) for field in given]
    wanted = Wanted(config, dtype, only_active)
    if backend == "reference":
        return token_rows(tensors, kinds, segments_of(layout), poison, counts, wanted, layout.device)
    made = wanted.made(tensors, kinds, layout.known_offsets is not None)
    if not any(made):
        return Rows(*tensors)  # type: ignore[arg-type]
    device_counts = [_constant(count) if isinstance(count, Tensor) else None for count in counts]
    numbers = [torch.nan if count is None or isinstance(count, Tensor) else float(count) for count in counts]
    found = row_ops.token_rows(
        list(tensors),
        kinds,
        [layout.known_offsets, poison],
        [layout.num_rows, layout.num_sequences],
        device_counts,
        numbers,
        "" if config is None else config.json,
        dtype,
        only_active,
        backend,
    )
    new = iter(found)
    mask, *others = (next(new) if fresh else tensor for fresh, tensor in zip(made, tensors, strict=True))
    assert mask is not None
    return Rows(mask, *others)


def _constant(values: Tensor | None) -> Tensor | None:
    return values.detach() if values is not None and values.requires_grad else values
