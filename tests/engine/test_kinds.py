"""A call of a known kind: the same answers and the same refusals as one whose kind was never seen."""

import functools
import warnings

import pytest
import torch

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
        found = [(it.dtype, it.shape, it.detach().double().numpy().tobytes()) for it in tensors + gradients]
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
