"""One batch of a test: the arguments of the public functions, and what a test needs beside them."""

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from egpo_kernels.config.results import SamplingSupport
from egpo_kernels.config.settings import Recipe
from egpo_kernels.recipes import EGPO
from tests.support.device import DEVICE

PER_TOKEN = ("tokens", "mask", "old_log_probs", "ref_log_probs", "entropy_mask")
PER_EITHER = ("advantages", "rollout_weights", "temperature")


@dataclasses.dataclass(frozen=True, repr=False)
class Case:
    """One batch: the arguments of the public functions under their names, and what a test needs beside them.

    `advantages` serve the loss functions when they are called alone; `upstream` is the gradient given to `backward`.
    """

    logits: Tensor
    tokens: Tensor
    groups: Any
    rewards: Tensor
    advantages: Tensor
    upstream: Tensor
    recipe: Recipe = EGPO
    mask: Tensor | None = None
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    rollout_weights: Tensor | None = None
    entropy_mask: Tensor | None = None
    correct: Tensor | None = None
    cu_seqlens: Tensor | None = None
    temperature: float | Tensor = 1.0
    support: SamplingSupport | None = None
    num_tokens: Any = None
    num_sequences: Any = None
    grad_scale: float = 1.0

    def __repr__(self) -> str:
        def brief(value):
            if isinstance(value, Tensor) and value.dim():
                return f"{value.dtype} {list(value.shape)} strides {value.stride()}"
            return repr(value)

        return "Case(" + ", ".join(f"{name}={brief(value)}" for name, value in vars(self).items()) + ")"

    def replace(self, **changes) -> "Case":
        return dataclasses.replace(self, **changes)

    def double(self) -> "Case":
        """The same numbers in float64: what exact results are computed from."""
        changed = {
            name: value.double()
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return self.replace(**changed)

    @property
    def num_rewards(self) -> int:
        return self.rewards.shape[0]

    @property
    def offsets(self) -> list[int]:
        """Row i belongs to sequence s when offsets[s] <= i < offsets[s + 1]."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.tolist()
        return [number * self.tokens.shape[1] for number in range(self.num_rewards + 1)]

    @property
    def index(self) -> Tensor:
        """The sequence [N] of each row; rows past the last sequence say the last."""
        index = torch.full((self.tokens.numel(),), self.num_rewards - 1)
        for number, (start, stop) in enumerate(itertools.pairwise(self.offsets)):
            index[start:stop] = number
        return index.to(self.tokens.device)

    @property
    def counted(self) -> Tensor:
        """Which rows [N] count."""
        counts = (self.tokens != -100 if self.mask is None else self.mask != 0).reshape(-1).clone()
        counts[self.offsets[-1] :] = False
        return counts

    @property
    def group_numbers(self) -> Tensor:
        """The group [S] of each sequence, numbered from 0."""
        if isinstance(self.groups, int):
            return torch.arange(self.num_rewards) // self.groups
        names = self.groups.tolist() if isinstance(self.groups, Tensor) else list(self.groups)
        numbers: dict[Any, int] = {}
        return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])

    def rows(self, value: Any) -> Tensor:
        """A value given per sequence, per token or as a float, as [N]."""
        if not isinstance(value, Tensor):
            return torch.full((self.tokens.numel(),), float(value), dtype=torch.float64, device=self.tokens.device)
        per_sequence = value.shape in ((self.num_rewards,), (self.num_rewards, 1))
        return value.reshape(-1)[self.index] if per_sequence else value.reshape(-1)

    @property
    def recorded(self) -> Tensor:
        """Which rows [N] count and have a record of what was kept."""
        return self.counted & (self.support.offsets.diff() > 0) if self.support is not None else self.counted & False

    @property
    def keeps(self) -> Tensor:
        """Which tokens [N, V] each row keeps, row by row; everything where it does not count."""
        keeps = torch.ones(self.tokens.numel(), self.logits.shape[-1], dtype=torch.bool)
        if self.support is not None:
            ids, offsets = (each.tolist() for each in self.support)
            for row in self.counted.nonzero()[:, 0].tolist():
                kept = ids[offsets[row] : offsets[row + 1]]
                if kept:
                    keeps[row] = False
                    keeps[row, [*kept, int(self.tokens.reshape(-1)[row])]] = True
        return keeps.to(self.tokens.device)

    def log_softmax(self) -> Tensor:
        """Tempered log-probabilities [N, V] in float64 of what is kept, uniform where a row does not count."""
        logits = self.logits.reshape(-1, self.logits.shape[-1]).double()
        logits = torch.where(self.keeps, logits, -torch.inf)
        logits = torch.where(self.counted[:, None], logits, 0.0)
        heat = torch.where(self.counted, self.rows(self.temperature).double(), 1.0)
        return torch.log_softmax(logits / heat[:, None], -1)

    def log_probs(self) -> Tensor:
        """Log-probs of the tokens [N] in float64, 0 where a row does not count."""
        column = torch.where(self.counted, self.tokens.reshape(-1), 0)
        return torch.where(self.counted, self.log_softmax().gather(-1, column[:, None])[:, 0], 0.0)

    def take(self, first: int, last: int) -> "Case":
        """Sequences first to last - 1 as a micro-batch; views, nothing is copied."""
        rows, packed = slice(self.offsets[first], self.offsets[last]), self.cu_seqlens is not None
        sequences = slice(first, last)
        changes: dict[str, Any] = {"groups": 1, "rewards": self.rewards[sequences]}
        changes["logits"] = self.logits[rows] if packed else self.logits[sequences]
        if packed:
            changes["cu_seqlens"] = self.cu_seqlens[first : last + 1] - self.cu_seqlens[first]
        for name in (*PER_TOKEN, *PER_EITHER, "upstream"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.dim():
                per_sequence = name in PER_EITHER and value.shape[0] == self.num_rewards
                changes[name] = value[sequences] if per_sequence or not packed else value[rows]
        if self.support is not None:
            ids, offsets = self.support
            offsets = offsets[rows.start : rows.stop + 1]
            changes["support"] = SamplingSupport(ids[offsets[0] : offsets[-1]], offsets - offsets[0])
        return self.replace(**changes)

    def loss_arguments(self) -> dict[str, Any]:
        """What every loss function takes under the same name."""
        names = ("old_log_probs", "ref_log_probs", "rollout_weights", "cu_seqlens", "num_tokens", "num_sequences")
        return {name: getattr(self, name) for name in names}


def strided(values: Tensor, kind: str) -> Tensor:
    """The same values behind other strides; what lies between is NaN, so that reading it shows."""
    values = values.to(DEVICE)
    shape, vocab = values.shape, values.shape[-1]
    if kind == "contiguous":
        return values.contiguous()
    if kind == "transposed" and len(shape) == 3:
        view = values.new_full((shape[1], shape[0], vocab), torch.nan).transpose(0, 1)
    elif kind == "transposed":
        view = values.new_full((2 * shape[0], vocab), torch.nan)[::2]
    elif kind == "padded rows":
        view = values.new_full((*shape[:-1], vocab + 5), torch.nan)[..., :vocab]
    else:
        view = values.new_full((*shape[:-1], vocab + 16), torch.nan)[..., 3 : 3 + vocab]
    view.copy_(values)
    return view


STRIDES = ("contiguous", "padded rows", "transposed", "wider vocabulary")
