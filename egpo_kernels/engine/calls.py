"""What is computed of what: checked inputs, and where log-probs come from."""

from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from egpo_kernels.config.fields import check_positive
from egpo_kernels.config.results import Rows, TokenLogProbs
from egpo_kernels.config.settings import PolicyLossConfig, compute_dtype
from egpo_kernels.engine import rows
from egpo_kernels.engine.dispatch import choose_backend
from egpo_kernels.engine.rows import Given, Unmade
from egpo_kernels.inputs import layout as layouts
from egpo_kernels.inputs.layout import Layout
from egpo_kernels.parallel.reading import check_alike
from egpo_kernels.parallel.shard import Shard


class Source(Protocol):
    """What log-probs are computed from: logits, or hidden states and an output layer."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""

    @property
    def vocab(self) -> int:
        """Vocabulary size."""

    @property
    def requires_grad(self) -> bool:
        """Whether anything in it is differentiated."""

    @property
    def late(self) -> bool:
        """Whether its gradient can only be made in backward."""

    @property
    def shard(self) -> Shard | None:
        """Which columns of the vocabulary it has, None for all."""

    @property
    def statuses(self) -> list[Tensor]:
        """Of exchanges with other ranks, see `egpo_kernels.parallel.sharded.Sharded`; whoever has one adds to them."""

    def log_probs(self, call: "Call", rows: Rows, want_entropy: bool, entropy_gradient: bool) -> TokenLogProbs:
        """Log-probs ``[N]`` and entropy of the counted rows; ``entropy_gradient``: it will be differentiated too."""

    def loss(
        self, call: "Call", unmade: Unmade, config: PolicyLossConfig, scale: float, want_entropy: bool, reported: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss and metrics vector; the gradient is made on the way, expecting ``scale`` from upstream."""


class Call(NamedTuple):
    """Checked inputs, ``given`` what is per token or per sequence; ``source`` is None where log-probs were given,
    ``kind`` where the way of this call is not to be remembered, see `egpo_kernels.engine.kinds`. ``support`` is empty,
    or what a sampler kept: ids, sound offsets.
    """

    source: Source | None
    given: Given
    layout: Layout
    temperature: float
    dtype: torch.dtype
    backend: str
    kind: Hashable | None = None
    support: tuple[Tensor, ...] = ()

    @property
    def vocab(self) -> int:
        """Vocabulary size, 0 where there are no logits."""
        return 0 if self.source is None else self.source.vocab

    def unmade(self) -> Unmade:
        """What rows for log-probs alone are made of."""
        return Unmade(self.given, self.layout, self.dtype)


class Grouping(NamedTuple):
    """What `egpo_loss` needs of whole groups, as the caller gave it."""

    groups: Any
    rewards: Any
    entropy_mask: Any = None
    correct: Any = None
    group_size: Any = None


class Constants(NamedTuple):
    """What the loss needs beside the model's output, as the caller gave it; no gradient flows into any of it."""

    advantages: Any = None
    old_log_probs: Any = None
    ref_log_probs: Any = None
    rollout_weights: Any = None


class Options(NamedTuple):
    """How the loss is normalised, scaled and reported."""

    num_tokens: Any = None
    num_sequences: Any = None
    grad_scale: Any = 1.0
    metrics: Any = "all"


def read_tokens(
    source: Source, layout: Layout, tokens: Any, mask: Any, temperature: Any, backend: str, kind: Hashable | None = None
) -> Call:
    """Check tokens, mask and temperature; what the source holds was checked when it was made."""
    given = Given.nothing()
    if mask is not None:
        given.put(rows.MASK, layout.shaped("mask", mask, "real"))
    given.put(rows.TOKENS, layout.shaped("tokens", tokens, "integer"))
    heat = 1.0
    if isinstance(temperature, Tensor):
        given.put(rows.TEMPERATURE, *layouts.temperature_field(temperature, layout, lambda: given.counted(layout)))
    else:
        heat = check_positive("temperature", temperature)
    backend = choose_backend(backend, layout.device)
    named = {"tokens' shape": layout.shape, "dtype": source.dtype, "temperature": heat, "backend": backend}
    check_alike(source.shard, layout.device, named)
    return Call(source, given, layout, heat, compute_dtype(source.dtype), backend, kind)
