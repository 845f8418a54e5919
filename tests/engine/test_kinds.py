"""A call of a known kind: the same answers and the same refusals as one whose kind was never seen."""

import functools
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import egpo_kernels as ek
from egpo_kernels.api import logits as api
from egpo_kernels.engine import kinds, logits
from tests.support.changed_calls import AROUND, CALLS, CHANGES, arguments


def gradient(found, given):
    """By the logits, of the loss times what a `GradScaler` takes."""
    if not found.requires_grad:
        return []
    (found * 2.0**14).backward()
    return [] if given["logits"].grad is None else [given["logits"].grad]


def loss(given):
    """Loss, metrics and gradient."""
    given = {name: it for name, it in given.items() if name != "return_entropy"}
    found, metrics = ek.logits_policy_loss(**given)
    return [found, *metrics.values()], list(metrics), gradient(found.sum(), given)


def scores(given):
    """Log-probs, entropy and gradient."""
    known = ("logits", "tokens", "mask", "temperature", "inplace_grad", "return_entropy", "backend")
    found = ek.token_log_probs(**{name: given[name] for name in known if name in given})
    found = [each for each in found if each is not None]
    return found, len(found), gradient(sum(each.sum() for each in found), given)


def outcome(call, change, around):
    """What a call returns, to the last bit, or what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototypes among torch's tensors
        given = arguments()
        try:
            CHANGES[change](given)
        except (RuntimeError, TypeError, IndexError, NotImplementedError):
            return "there is no such tensor"
        try:
            with AROUND[around]():
                tensors, others, gradients = call(given)
        except Exception as error:
            return type(error), str(error)
        # Logits too, which only a gradient that was asked for may be written over.
        tensors = [*tensors, given["logits"], *gradients]
        found = [(it.dtype, it.shape, it.detach().double().numpy().tobytes()) for it in tensors]
        last = tensors[0].grad_fn
        ways = [] if last is None else [type(each) for each in (last, *(before for before, _ in last.next_functions))]
        return ways, others, found


def forget():
    """As if nothing had been called yet."""
    logits.LOSSES.clear()
    logits.SCORES.clear()


@functools.cache
def wanted(call):
    """The outcome of every call as if it were the first."""
    found = {}
    for one in CALLS:
        forget()
        found[one] = outcome(call, *one)
    return found


def differing(call, calls):
    """Those of ``calls`` whose outcome is another after others."""
    forget()
    return {one for one in calls if outcome(call, *one) != wanted(call)[one]}


KNOWN = pytest.mark.parametrize("call, known", [(loss, logits.LOSSES), (scores, logits.SCORES)])


@KNOWN
def test_what_is_known_changes_nothing(call, known):
    assert differing(call, CALLS + CALLS) == set()
    assert differing(call, CALLS[::-1]) == set()
    assert len(known) > 10


@KNOWN
@pytest.mark.parametrize("part", [0, 1, 2, 3, 4, 5, torch.dtype, int, type(None)])
def test_a_kind_that_misses_a_part_is_noticed(call, known, part, monkeypatch):
    def without(*given):
        kind = kinds.kind_of_call(*given)
        if kind is None:
            return None
        if isinstance(part, int):
            return kind[:part] + kind[part + 1 :]
        options = len(given) - 4 + 2
        return kind[:options] + tuple(each for each in kind[options:] if type(each) is not part)

    monkeypatch.setattr(logits, "kind_of_call", without)
    monkeypatch.setattr(api, "kind_of_call", without)
    assert differing(call, CALLS + CALLS)


def refusing(**changed):
    """The kind of a call that differs from one with a kind in this."""
    given = {"logits": torch.randn(3, 4, 5), "rows": torch.ones(3, 4), "temperature": 1.0, "option": True} | changed
    return kinds.kind_of_call(given["logits"], (given["rows"], None), given["temperature"], "portable", given["option"])


def test_what_must_be_looked_at_anew_has_no_kind():
    assert refusing() is not None
    draw = torch.randn
    with torch.inference_mode():
        made = torch.ones(3, 4)
    for changed in (
        {"logits": torch._neg_view(draw(3, 4, 5))}, {"logits": draw(3, 4, 5, 1)}, {"logits": draw(12, 5)},
        {"logits": torch.nested.nested_tensor([draw(4, 5)])}, {"logits": draw(3, 4, 5).to_sparse()},
        {"logits": torch.nn.Parameter(draw(3, 4, 5))}, {"logits": draw(3, 4, 0)},
        {"logits": draw(3, 5, 4).transpose(1, 2)}, {"logits": draw(3, 1, 5), "rows": torch.ones(3, 1)},
        {"logits": None}, {"rows": torch._neg_view(torch.ones(3, 4))}, {"rows": torch.ones(3, 4).to_sparse()},
        {"rows": torch.nested.nested_tensor([torch.ones(4)])}, {"rows": torch.ones(3, 4, requires_grad=True)},
        {"rows": made}, {"rows": torch.nn.Parameter(torch.ones(3, 4), requires_grad=False)}, {"rows": torch.ones(3, 1)},
        {"rows": torch.ones(3, 4, device="meta")}, {"rows": [1.0]}, {"temperature": torch.tensor(1.0)}, {"option": 1},
        {"option": None}, {"option": ["all"]},
    ):  # fmt: skip
        assert refusing(**changed) is None, changed


def test_a_traced_call_has_no_kind():
    def step(values):
        return values + 1 if kinds.kind_of_call(values, (), 1.0, "portable") is None else values

    assert torch.compile(step, backend="eager", fullgraph=True)(torch.zeros(2, 3, 4)).all()


def test_a_bounded_number_of_kinds_is_kept():
    known = {}
    for number in range(3 * kinds.MOST):
        kinds.remember(known, number, "way")
        assert 0 < len(known) <= kinds.MOST and number in known
    kinds.remember(known, None, "way")
    assert None not in known


class Seen(TorchDispatchMode):
    """The operators that a mode is told of."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("call, name", [(loss, "logits_policy_loss"), (scores, "token_scores")])
def test_a_dispatch_mode_is_told_of_calls_of_a_known_kind(call, name):
    forget()
    seen = []
    for _ in range(2):
        given = arguments()
        if call is scores:
            given["logits"] = given["logits"].detach()
        with Seen() as mode:
            call(given)
        seen.append(mode.names.count(f"egpo_kernels::{name}"))
    assert seen == [1, 1]
