"""Log-probs of a vocabulary in two parts, as two ranks have it, by the steps that they go: all but the exchange."""

import itertools

import torch

from egpo_kernels.command import calls
from egpo_kernels.command.batches import Batch
from egpo_kernels.config.results import Rows
from egpo_kernels.engine.dispatch import implementation
from egpo_kernels.formulas.shards import Merged


def token_log_probs(batch: Batch, backend: str) -> calls.Outputs:
    """As `calls.token_log_probs` with an entropy, which `reference` has of the whole."""
    if backend == calls.REFERENCE:
        return calls.token_log_probs(batch, backend, entropy=True)
    package, logits, heat = implementation(backend), batch.logits, batch.temperature
    assert logits is not None and isinstance(heat, float)
    rows, gradient = Rows(batch.mask.flatten(), batch.tokens.flatten().long()), torch.empty_like(logits)
    count, vocab = rows.mask.shape[0], logits.shape[-1]
    # Neither part is as long as the other.
    bounds = (0, vocab // 3, vocab)
    parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    told = [package.shard_statistics(logits[..., part], rows, heat, True, count, rows, 0, part.start) for part in parts]
    found = Merged(*package.merged_shards(torch.stack(told), rows, heat, True, vocab, count))
    slopes = calls.upstream(batch).to(found.log_probs.dtype).flatten()
    upstream = [slopes, torch.full_like(slopes, calls.ENTROPY_UPSTREAM)]
    live = rows.mask & (found.log_probs != -torch.inf)
    for part in parts:
        here = Rows(live, batch.tokens.flatten().long() - part.start)
        statistics = [found.maximum, found.sum_exp, found.entropy]
        package.logits_gradient(logits[..., part], here, statistics, upstream, heat, gradient[..., part])
    shape = batch.tokens.shape
    values = {"log_probs": found.log_probs.view(shape), "entropy": found.entropy.view(shape)}
    return {**values, "gradient of logits": gradient}
