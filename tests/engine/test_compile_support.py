"""torch.compile(fullgraph=True, dynamic=True) of calls with what a sampler kept, whose sizes are in no graph."""

import pytest
import torch

import egpo_kernels as ek
from tests.engine.test_compile import assert_compiles_once, fresh_compiler, pytestmark  # noqa: F401
from tests.support.batches import (
    LAYOUTS,
    NEEDS_TRITON,
    frozen_head,
    one_pass,
    only_log_probs,
    trained_head,
    whole_groups,
)

PATHS = (one_pass, whole_groups, only_log_probs, frozen_head, trained_head)


def kept(path):
    """A path with sets of one to three tokens, packed on the way; every third row has no record."""

    def run(batch, backend):
        vocab, rows = batch.logits.shape[-1], torch.arange(batch.tokens.numel(), device=batch.tokens.device)
        rows = rows.view(batch.tokens.shape)
        ids = torch.stack([batch.tokens, (batch.tokens + rows) % vocab, (rows * rows) % vocab], -1)
        return path(batch, backend, support=ek.pack_support(torch.where((rows % 3 == 0)[..., None], -1, ids)))

    return run


# What is compiled is the graph around the operators, the same for both backends: one has the rest of the layouts.
CASES = [(path, LAYOUTS[number % 2], "portable") for number, path in enumerate(PATHS)]
CASES += [pytest.param(path, "padded", "triton", marks=NEEDS_TRITON) for path in (whole_groups, trained_head)]


@pytest.mark.parametrize("path, layout, backend", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_compiled_equals_eager_and_compiles_once(path, layout, backend):
    assert_compiles_once(kept(path), layout, backend)
