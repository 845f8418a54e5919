"""Vocabulary-parallel parts of Megatron, verl, torchtitan and torch beside ours, on two processes; it runs in an
environment of its own (make apart).
"""

import pytest
import torch

pytest.importorskip("megatron", reason="megatron-core is not installed (make apart runs this)")
pytest.importorskip("torchtitan", reason="torchtitan is not installed (make apart runs this)")

from tests.integrations.megatron_ranks import WAYS, start
from tests.integrations.ranks import RANKS


def test_parts_of_others_beside_ours(tmp_path):
    torch.multiprocessing.spawn(start, (tmp_path, list(WAYS)), nprocs=RANKS)
