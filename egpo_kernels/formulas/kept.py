"""The tokens that a sampler kept for each row, with the sampled token among them, one after the other."""

from typing import NamedTuple

import torch
from torch import Tensor

from egpo_kernels.formulas.tables import NOTHING
from egpo_kernels.inputs.segments import counts_per_sequence


class Grouped(NamedTuple):
    """Entries by their keys: group g is ``order[offsets[g] : offsets[g + 1]]``, ``keys`` are sorted, and as many as
    there are groups, or more, behind the last.
    """

    keys: Tensor
    order: Tensor
    offsets: Tensor


class Entries(NamedTuple):
    """Rows of kept tokens: row r owns ``ids[offsets[r] : offsets[r + 1]]``, its own token first.

    ``ids``, ``rows`` and ``alive`` are ``[E]``, as many as were given and one more for each of ``[N]`` rows, so that
    nobody has to ask a device how many. Alive is not what repeats the row's token, nor what is in no row that counts.
    ``mask [N]`` says which rows count and have a record, ``broken [N]`` which of these hold an id outside the
    vocabulary.
    """

    ids: Tensor
    rows: Tensor
    alive: Tensor
    offsets: Tensor
    mask: Tensor
    broken: Tensor

    def columns(self, vocab: int) -> Tensor:
        """Ids ``[E]`` that may be used as indices."""
        return self.ids.clamp(0, vocab - 1)

    def row_places(self) -> Tensor:
        """Rows ``[E]`` that may be used as indices."""
        return self.rows.clamp(max=max(self.mask.shape[0] - 1, 0))

    def by_row(self) -> Grouped:
        """Those that are alive, row by row."""
        return self._grouped(self.rows, self.mask.shape[0])

    def by_id(self, vocab: int) -> Grouped:
        """Those that are alive, token by token, in the order of rows: a sum over them has one order."""
        return self._grouped(self.columns(vocab), vocab)

    def _grouped(self, keys: Tensor, count: int) -> Grouped:
        found = torch.where(self.alive, keys, count).sort(stable=True)
        bounds = torch.arange(count + 1, device=keys.device)
        return Grouped(found.values, found.indices, torch.searchsorted(found.values, bounds))


def has_record(offsets: Tensor) -> Tensor:
    """Rows ``[N]`` for which something was kept."""
    return offsets[1:] > offsets[:-1]


def row_of_id(offsets: Tensor, count: int) -> Tensor:
    """The row ``[M]`` of each of so many ids, N behind the last row's."""
    return torch.searchsorted(offsets[1:], torch.arange(count, device=offsets.device), right=True)


def entries_of(ids: Tensor, offsets: Tensor, tokens: Tensor, mask: Tensor, vocab: int) -> Entries:
    """Put ``tokens [N]`` before the ``ids [M]`` of their rows, of which ``mask [N]`` says which count."""
    num_rows, count, ids = tokens.shape[0], ids.shape[0], ids.long()
    rows, own = row_of_id(offsets, count), torch.arange(num_rows, device=ids.device)
    mask = mask & has_record(offsets)
    place, first = torch.arange(count, device=ids.device) + (rows + 1).clamp(max=num_rows), offsets[:-1] + own
    behind = torch.nn.functional.pad(tokens, (0, 1), value=-1), torch.nn.functional.pad(mask, (0, 1))
    kept = behind[1][rows] & (ids != behind[0][rows])

    def laid(of_ids: Tensor, of_tokens: Tensor) -> Tensor:
        return of_ids.new_empty(count + num_rows).scatter(0, place, of_ids).scatter(0, first, of_tokens)

    ids, rows, alive = laid(ids, tokens), laid(rows, own), laid(kept, mask)
    offsets = offsets + torch.arange(num_rows + 1, device=ids.device)
    broken = counts_per_sequence(alive & ((ids < 0) | (ids >= vocab)), offsets) > 0
    return Entries(ids, rows, alive, offsets, mask, broken)


def kept_metrics(ids: Tensor, offsets: Tensor, tokens: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Fill the slots of `egpo_kernels.formulas.metrics.SUPPORT`, in its order, over rows of ``mask [N]``."""
    # Every id below 2^63 is one here: what lies outside a vocabulary is reported elsewhere.
    entries = entries_of(ids, offsets, tokens, mask, torch.iinfo(torch.long).max)
    kept = counts_per_sequence(entries.alive, entries.offsets)
    missing = entries.mask & (kept == entries.offsets.diff())
    largest = torch.nn.functional.pad(torch.where(entries.mask, kept, 0), (0, 1)).amax()
    sums = (entries.mask.sum(), kept.sum(), (entries.mask & (kept == 1)).sum(), missing.sum())
    largest = torch.where(sums[0] > 0, largest.to(dtype), NOTHING)
    return torch.stack([*(value.to(dtype) for value in sums), largest])
