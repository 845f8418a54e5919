"""Models whose output layer tensor parallelism splits over the vocabulary."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (make parity installs it)")

from tests.integrations.ranks import RANKS
from tests.integrations.tensor_parallel_ranks import WAYS, start


def test_ranks_compute_what_one_process_does(tmp_path):
    torch.multiprocessing.spawn(start, (tmp_path, list(WAYS)), nprocs=RANKS)
