"""The opaque operators: schemas, fakes and autograd registration, as torch itself checks them."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from egpo_kernels.config.results import Rows
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, compute_dtype
from egpo_kernels.engine import given_ops, ops, row_ops
from egpo_kernels.engine.operator import Operator
from egpo_kernels.formulas import metrics
from egpo_kernels.inputs.layout import FOR_ALL, PER_SEQUENCE, PER_TOKEN
from egpo_kernels.linear import ops as linear_ops
from egpo_kernels.parallel.shard import Shard
from tests.support.batches import FAST, WAYS, assert_same, differentiate, make_batch
from tests.support.device import DEVICE

CONFIG = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.02)
SEQUENCE = PolicyLossConfig(ratio="sequence")
OFFSETS = torch.arange(5, device=DEVICE) * 4
WHOLE = Shard("", 1, 0, 37, 37, "").text
SUPPORT = (torch.tensor([3, 1, 36, 0, 9, 8, 2], device=DEVICE), (2 * torch.arange(17, device=DEVICE)).clamp(max=6))


def padded_rows(dtype=torch.float32):
    """Logits ``[S, T, V]`` and rows ``[N]`` of a padded batch."""
    batch = make_batch(dtype=dtype)
    rows = Rows(
        batch.mask.flatten(),
        batch.tokens.flatten(),
        None,
        batch.per_token(batch.advantages).flatten(),
        torch.full((16,), 0.1, device=DEVICE),
        batch.old_log_probs.flatten(),
        batch.ref_log_probs.flatten(),
        None,
    )
    return batch.logits, list(rows)


def given_rows(dtype=torch.float32):
    """Of every kind, none of which is there already: some for all, some per sequence, some of another dtype."""
    batch, half = make_batch(dtype=dtype), torch.bfloat16
    given = [
        batch.mask.flatten().long(),
        batch.tokens.flatten().int(),
        torch.full((1,), 0.7, device=DEVICE, dtype=dtype),
        batch.advantages,
        None,
        batch.old_log_probs.flatten().to(half),
        batch.ref_log_probs.flatten(),
        torch.ones(4, device=DEVICE, dtype=half),
        OFFSETS,
        torch.ones((), device=DEVICE),
        torch.tensor(9, device=DEVICE),
        None,
    ]
    one, each, for_all = PER_TOKEN, PER_SEQUENCE, FOR_ALL
    return given, [one, one, for_all, each, 0, one, one, each], [16, 4], [math.nan, 3.0]


def arguments(name, backend, dtype=torch.float32, support=(), shard=""):
    """Every operator's arguments, as autograd.py passes them."""
    logits, rows = padded_rows(dtype)
    rows, wide = [*rows, *support], compute_dtype(dtype)
    given, *how = given_rows(wide)
    of_loss = ([*given, *support], *how)
    log_probs = torch.full((16,), -1.0, dtype=wide, device=DEVICE)
    entropy = -log_probs
    statistics, upstream, scalars = [3 * entropy, entropy, entropy], [entropy, entropy], [1.0, 2.0]
    return {
        "sequence_offsets": (torch.tensor([0, 3, 7], device=DEVICE), 9),
        "support_offsets": (SUPPORT[1], 7),
        "support_metrics": (*SUPPORT, rows[1], rows[0], wide, backend),
        "read_either_way": (entropy, log_probs * 2, torch.zeros(16, dtype=torch.bool, device=DEVICE), "advantages"),
        "token_rows": (given, *how, SEQUENCE.json, True, wide, backend),
        "row_statistics": (logits, rows, 0.7, True, backend, shard),
        "token_scores": (logits, rows, 0.7, True, backend),
        "logits_gradient": (logits, rows, statistics, upstream, 1.0, backend, shard),
        "logits_gradient_": (logits, rows, statistics, upstream, 1.0, backend, shard),
        "policy_loss": (log_probs, entropy, rows, None, 4, CONFIG.json, 37, False, True, backend),
        "policy_loss_gradient": (log_probs, rows, OFFSETS, 4, SEQUENCE.json, entropy, True, backend),
        "given_policy_loss": (log_probs, entropy, given, *how, CONFIG.json, False, True, True, True),
        "scaled_gradients": ([log_probs, entropy], rows[0], torch.tensor(2.0, device=DEVICE)),
        "logits_policy_loss": (logits, *of_loss, CONFIG.json, False, scalars, True, True, backend),
        "logits_policy_loss_": (logits, *of_loss, CONFIG.json, True, scalars, True, True, backend),
        "group_advantages": (
            torch.tensor([1.0, 0, 1, 0], device=DEVICE),
            [torch.tensor([4, 4, 1, 1], device=DEVICE), None, log_probs, rows[0], None, None, OFFSETS],
            0,
            16,
            True,
            1e-6,
            AdvantageConfig().json,
            2,
            True,
            backend,
        ),
        "rescale_": (logits, torch.tensor(2.0, device=DEVICE), 1.0, backend),
        **linear_arguments(backend, dtype, rows, of_loss, [3 * entropy, entropy, entropy], upstream, shard),
    }[name]


def linear_arguments(backend, dtype, rows, of_loss, statistics, upstream, shard):
    """Those of the operators on hidden states, with a head that trains but for its adapters."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 4, 5), (37, 5), (37,), (2, 5), (37, 2))
    hidden, *head = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    scalars = (None, [0.7, 0.5, 1.5, 9.0], 16, 1000, dtype, shard, True)
    first, wanted = (hidden, head, rows, *scalars), [True, True, True, False, False]
    given = (hidden, head, *of_loss, CONFIG.json, False)
    return {
        "linear_row_statistics": (*first, True, True, backend),
        "linear_gradient": (*first, statistics, upstream, wanted, backend),
        "linear_policy_loss": (*given, *scalars, 2.0, True, True, wanted, backend),
    }


NAMES = [
    "sequence_offsets",
    "support_offsets",
    "support_metrics",
    "read_either_way",
    "token_rows",
    "row_statistics",
    "token_scores",
    "logits_gradient",
    "logits_gradient_",
    "policy_loss",
    "policy_loss_gradient",
    "given_policy_loss",
    "scaled_gradients",
    "logits_policy_loss",
    "logits_policy_loss_",
    "group_advantages",
    "rescale_",
    "linear_row_statistics",
    "linear_gradient",
    "linear_policy_loss",
]
MADE = {
    name: value
    for module in (given_ops, ops, row_ops, linear_ops)
    for name, value in vars(module).items()
    if isinstance(value, Operator)
}


def test_every_operator_is_here():
    assert sorted(MADE) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", FAST)
def test_opcheck(name, backend):
    torch.library.opcheck(MADE[name].overload, arguments(name, backend))


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.startswith(("row_st", "token_sc", "logits_", "linear_"))]
)
@pytest.mark.parametrize("backend", FAST)
def test_opcheck_with_a_support(name, backend):
    torch.library.opcheck(MADE[name].overload, arguments(name, backend, support=SUPPORT))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("row_st", "logits_grad", "linear_"))])
@pytest.mark.parametrize("support", [(), SUPPORT], ids=["", "support"])
@pytest.mark.parametrize("backend", FAST)
def test_opcheck_of_some_columns(name, backend, support):
    """All of them, of a group of one, which needs no process group."""
    torch.library.opcheck(MADE[name].overload, arguments(name, backend, support=support, shard=WHOLE))


def test_opcheck_of_columns():
    """What lies in columns has results in rows, as the fake says: a compiler relies on it."""
    log_probs, entropy, given, *others = arguments("given_policy_loss", "portable")
    columns = [it.view(4, 4).t() if it is not None and it.shape == (16,) else it for it in given]
    columns = [None if it is OFFSETS else it for it in columns]
    given = (log_probs.view(4, 4).t(), entropy.view(4, 4).t(), columns, *others)
    torch.library.opcheck(MADE["given_policy_loss"].overload, given)
    assert all(it.is_contiguous() for it in given_ops.given_policy_loss(*given))


@pytest.mark.parametrize("name", ["row_statistics", "logits_policy_loss", "logits_gradient", *NAMES[-3:]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_fakes_know_other_dtypes(name, dtype):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(MADE[name].overload, arguments(name, "portable", dtype), test_utils=checks)


def test_results_have_the_promised_length():
    loss, vector, gradient = ops.logits_policy_loss(*arguments("logits_policy_loss", "portable"))
    assert loss.shape == () and vector.shape == (len(metrics.TOKEN.keys),) and gradient.shape == (4, 4, 37)
    assert row_ops.group_advantages(*arguments("group_advantages", "portable"))[-1].shape == (len(metrics.GROUP.keys),)


class Watched(TorchDispatchMode):
    """What the compiler's first run, profilers and counters of operations put around an operator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("backend", FAST)
def test_under_a_dispatch_mode(path, backend):
    batch = make_batch()
    wanted = differentiate(path, batch, backend)
    with Watched():
        found = differentiate(path, batch, backend)
    assert_same(found, wanted)
