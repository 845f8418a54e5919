"""Four real processes: starting them takes longer than all they do, so that they do it together."""

import torch

from tests.parallel.batch import RANKS
from tests.parallel.processes import WAYS, start


def test_four_processes(tmp_path):
    """Every way of `processes`, on all ranks; what went wrong on any is said."""
    torch.multiprocessing.spawn(start, (tmp_path,), nprocs=RANKS)
    wrong = sorted(path for path in tmp_path.iterdir() if path.name.split(".")[0] in WAYS)
    assert not wrong, "\n".join(f"{path.name}: {path.read_text()}" for path in wrong)
