"""EGPOTrainer's update does not depend on how a batch is split over micro-batches, steps and processes."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed (make parity installs it)")

import trl.trainer.grpo_trainer

from egpo_kernels.integrations.trl import EGPOTrainer
from tests.integrations.ranks import RANKS, announce, free_port, leave
from tests.integrations.trl_runs import rollout, rollout_with_sets, run, steps
from tests.support.accuracy import assert_rounding

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

WAYS = {
    "the method": {},
    "mean of sequences": {"recipe": "grpo"},
    "constant length": {"recipe": "dr_grpo"},
    "a sequence's ratio": {"recipe": "gspo", "num_iterations": 2},
    "whitened": {"recipe": "reinforce_pp_baseline"},
    "iterations": {"num_iterations": 2},
    "sampler's log-probs": {"rollout_func": rollout},
    "kept sets": {"rollout_func": rollout_with_sets, "num_iterations": 2},
}
TWELVE = {"per_device_train_batch_size": 12}
# Groups of four: a micro-batch of two or of six rows cuts through them.
PAIRS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
HALVES = {"per_device_train_batch_size": 6}
REPORTED = (
    "loss",
    "grad_norm",
    "egpo/weight/mean",
    "egpo/groups/mixed/sum",
    "egpo/policy/tokens/sum",
    "egpo/policy/entropy/mean",
)


def in_order(rows):
    """In place of TRL's shuffling of a generation batch."""

    def ordered(batch):
        places = range(len(batch["advantages"])) if rows is ... else rows
        return {
            name: [value[place] for place in places] if isinstance(value, list) else value[rows if value.dim() else ...]
            for name, value in batch.items()
        }

    return ordered


def assert_same_updates(found, wanted):
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        for name, value in theirs.items():
            assert_rounding(ours[name.removeprefix("module.")], value)


def assert_same_reports(found, wanted):
    for name in REPORTED:
        # 1 is about the size of the terms that a loss sums.
        ours, theirs = ([1.0, *(step[name] for step in each if name in step)] for each in (found, wanted))
        assert_rounding(torch.tensor(ours), torch.tensor(theirs))


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_accumulation(options, tmp_path):
    whole, pairs = (run(EGPOTrainer, tmp_path, **split, **options) for split in (TWELVE, PAIRS))
    assert_same_updates(pairs.weights, whole.weights)
    assert_same_reports(steps(pairs), steps(whole))


def test_several_steps_a_generation(tmp_path, monkeypatch):
    monkeypatch.setattr(trl.trainer.grpo_trainer, "shuffle_sequence_dict", in_order(torch.arange(24)))
    whole = run(EGPOTrainer, tmp_path, steps_per_generation=2, max_steps=4, **TWELVE)
    pairs = run(EGPOTrainer, tmp_path, steps_per_generation=12, max_steps=4, **PAIRS)
    assert_same_updates(pairs.weights, whole.weights)


SPREAD = [
    WAYS["the method"],
    WAYS["mean of sequences"],
    {"num_iterations": 2, "steps_per_generation": 2},
    {"rollout_func": rollout_with_sets, "steps_per_generation": 2},
]


def process(rank, port, folder):
    """One of two processes; the first keeps the weights after each step, and what was logged."""
    announce(rank, port)
    trl.trainer.grpo_trainer.shuffle_sequence_dict = in_order(...)
    found = []
    for options in SPREAD:
        trainer = run(EGPOTrainer, folder, ddp_backend="gloo", **HALVES, **options)
        assert trainer.accelerator.num_processes == RANKS
        found.append((trainer.weights, steps(trainer)))
    if rank == 0:
        torch.save(found, folder / "found.pt")
    leave()


def test_two_processes(tmp_path, monkeypatch):
    torch.multiprocessing.spawn(process, (free_port(), tmp_path), nprocs=RANKS)
    for options, (weights, logged) in zip(SPREAD, torch.load(tmp_path / "found.pt"), strict=True):
        # A step takes half of what each process has.
        count = options.get("steps_per_generation", 1)
        places = torch.arange(12 * count).view(2, count, 6).transpose(0, 1).reshape(-1)
        monkeypatch.setattr(trl.trainer.grpo_trainer, "shuffle_sequence_dict", in_order(places))
        whole = run(EGPOTrainer, tmp_path, **TWELVE, **options)
        assert_same_updates(weights, whole.weights)
        assert_same_reports(logged, steps(whole))
