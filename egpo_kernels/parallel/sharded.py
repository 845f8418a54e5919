"""A backend over one rank's columns: the functions of its package that go over rows, with one exchange in the middle.

Local statistics, `exchange.gather`, merged statistics, gradient: all but the second are pure, and every rank does the
third with the same numbers, so that log-probs, entropies and losses are the same bits on all of them.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import PolicyLossConfig, compute_dtype
from egpo_kernels.formulas.kept import Entries
from egpo_kernels.formulas.shards import PRIME, SHIFT, Merged, told
from egpo_kernels.inputs.segments import Segments
from egpo_kernels.parallel.exchange import Pending, gather
from egpo_kernels.parallel.shard import Shard


class Begun(NamedTuple):
    """An exchange on its way, and the rows it is of."""

    pending: Pending
    rows: Rows
    temperature: float
    want_entropy: bool
    capacity: int


class Sharded:
    """The package's functions, over rows whose other columns other ranks have."""

    def __init__(self, package: ModuleType, shard: Shard) -> None:
        self.package, self.shard = package, shard
        self._status: Tensor | None = None
        self._begun: deque[Begun] = deque()

    def status(self, like: Tensor) -> Tensor:
        """``[2]``, of all exchanges: how many ranks do not fit the others, and NaN if any, else 1; of no rows none."""
        return torch.arange(2, dtype=like.dtype, device=like.device) if self._status is None else self._status

    def __getattr__(self, name: str) -> Any:
        return getattr(self.package, name)

    def ahead(
        self, chunks: Iterable[Any], alike: Rows, temperature: float, want_entropy: bool, capacity: int
    ) -> Iterator[Any]:
        """Chunks of logits, one late: the exchange of each is on its way while the next one's logits are made.

        ``alike`` are all rows ``[N]``, with all that ranks must have alike.
        """
        last = None
        for chunk in chunks:
            mask, *others = (None if field is None else field[chunk.place] for field in alike)
            told = Rows(chunk.rows.mask if mask is None else mask, *others)
            self._begin(chunk.logits[None], chunk.rows, told, temperature, want_entropy, capacity)
            if last is not None:
                yield last
            last = chunk
        if last is not None:
            yield last

    def _begin(
        self, logits: Tensor, rows: Rows, alike: Rows, temperature: float, want_entropy: bool, capacity: int
    ) -> None:
        seed, start = self.shard.seed(temperature, want_entropy), self.shard.start
        table = self.package.shard_statistics(
            self.shard.own(logits), rows, temperature, want_entropy, capacity, alike, seed, start
        )
        self._exchange(table, rows, temperature, want_entropy, capacity)

    def _exchange(self, table: Tensor, rows: Rows, temperature: float, want_entropy: bool, capacity: int) -> None:
        pending = gather(table, self.shard.group, self.shard.size)
        self._begun.append(Begun(pending, rows, temperature, want_entropy, capacity))

    def _merged(self) -> Merged:
        pending, rows, temperature, want_entropy, capacity = self._begun.popleft()
        found = self.package.merged_shards(
            pending.arrived(), rows, temperature, want_entropy, self.shard.vocab, capacity
        )
        status, before = found.status, self._status
        if before is not None:
            status = torch.stack([torch.maximum(before[0], status[0]), before[1] * status[1]])
        self._status = status
        return found

    def row_statistics(
        self, logits: Tensor, rows: Rows, temperature: float, want_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the package's own, of whole rows; of a chunk from `ahead`, whose exchange has begun, in their order."""
        if not self._begun:
            self._begin(logits, rows, rows, temperature, want_entropy, rows.mask.numel())
        log_probs, entropy, maximum, sum_exp, _ = self._merged()
        return log_probs, entropy, maximum, sum_exp

    def logits_gradient(
        self,
        logits: Tensor,
        rows: Rows,
        statistics: Sequence[Tensor],
        upstream: Sequence[Tensor | None],
        temperature: float,
        out: Tensor,
    ) -> None:
        """As the package's own, to this rank's columns; 0 behind them."""
        own = self.shard.own(logits)
        target = own if out is logits else self.shard.own(out)
        if self.shard.columns:
            self.package.logits_gradient(own, self.shard.here(rows), [*statistics], [*upstream], temperature, target)
        if target.shape != out.shape:
            out[..., self.shard.columns :].zero_()

    def logits_loss_gradient(
        self,
        logits: Tensor,
        rows: Rows,
        config: PolicyLossConfig,
        temperature: float,
        grad_scale: float,
        want_entropy: bool,
        out: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """As the package's own, in three steps: the gradient cannot be made before all ranks were heard."""
        log_probs, entropy, maximum, sum_exp = self.row_statistics(logits, rows, temperature, want_entropy)
        slope, bonus = self.package.policy_loss_gradient(
            log_probs,
            rows,
            Segments(log_probs.shape[0], 1),
            config,
            log_probs.new_full((), grad_scale),
            config.has_bonus,
        )
        upstream = [slope, bonus if config.has_bonus else None]
        self.logits_gradient(logits, rows, [maximum, sum_exp, entropy], upstream, temperature, out)
        return log_probs, entropy if want_entropy else None

    def kept_entries(self, ids: Tensor, offsets: Tensor, tokens: Tensor, mask: Tensor, vocab: int) -> Entries:
        """As the package's own; alive is only what lies in this rank's columns, as which ids are counted."""
        entries = self.package.kept_entries(ids, offsets, tokens, mask, self.shard.vocab)
        here = entries.ids - self.shard.start
        return entries._replace(ids=here, alive=entries.alive & (here >= 0) & (here < self.shard.columns))

    def kept_logits(self, logits: Tensor, entries: Entries) -> Tensor:
        """As the package's own, 0 of a token that another rank has."""
        if not self.shard.columns:
            return logits.new_zeros(entries.ids.shape, dtype=compute_dtype(logits.dtype))
        return self.kept_values(self.package.kept_logits(self.shard.own(logits), entries), entries)

    def kept_values(self, values: Tensor, entries: Entries) -> Tensor:
        """Kept logits ``[E]``, of rows' own tokens 0 where another rank has them: they would be taken for lost."""
        first = entries.offsets[:-1]
        return values.index_copy(0, first, torch.where(entries.alive[first], values[first], 0.0))

    def kept_statistics(
        self, values: Tensor, entries: Entries, rows: Rows, temperature: float, want_entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """As the package's own, of whole rows."""
        _, entropy, maximum, sum_exp = self.package.kept_statistics(values, entries, rows, temperature, want_entropy)
        lowest = torch.finfo(values.dtype).min
        # Of -inf alone, or of nothing, there is no maximum to subtract.
        empty = (maximum == -torch.inf) | (maximum == lowest)
        found = [torch.where(empty, lowest, maximum), torch.where(empty, 0.0, sum_exp), values[entries.offsets[:-1]]]
        if entropy is not None:
            found.append(torch.where(empty, 0.0, sum_exp * (sum_exp.log() - entropy)))
        capacity, seed = rows.mask.numel(), self.shard.seed(temperature, want_entropy)
        alike = rows._replace(tokens=self._with_ids(rows.tokens, entries))
        table = told(rows.mask, found, capacity, alike, seed, self.shard.start, self.shard.columns)
        self._exchange(table, rows, temperature, want_entropy, capacity)
        log_probs, entropies, maximum, sum_exp, _ = self._merged()
        log_probs = torch.where(entries.broken, torch.nan, log_probs)
        return log_probs, entropies if want_entropy else None, maximum, sum_exp

    def _with_ids(self, tokens: Tensor | None, entries: Entries) -> Tensor:
        """Tokens ``[N]`` mixed with the ids of their rows, of the whole vocabulary, which ranks must have alike."""
        assert tokens is not None
        mixed = (entries.ids + self.shard.start) * PRIME
        sums = torch.nn.functional.pad((mixed ^ (mixed >> SHIFT)).cumsum(0), (1, 0))[entries.offsets]
        return tokens + sums.diff()

    def put_kept_(self, gradient: Tensor, entries: Entries, values: Tensor) -> None:
        """As the package's own."""
        if self.shard.columns:
            self.package.put_kept_(self.shard.own(gradient), entries, values)
