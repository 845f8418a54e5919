"""The linear functions beside the numbers: bits, chunks, masks, autocast, second backwards, what the host knows."""

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.linear import chunks
from egpo_kernels.linear import ops as linear_ops
from tests.support.accuracy import assert_rounding
from tests.support.batches import EVERY_BACKEND, EVERY_LAYOUT, FAST_BACKEND, SEQUENCE, WITH_KL
from tests.support.calls import valid
from tests.support.device import DEVICE

LEAVES = ("hidden", "weight", "bias", "A", "B")
KNOWN, LATE = ek.PolicyLossConfig(kl_coef=0.1, entropy_coef=0.02), SEQUENCE
EVERY_COEFFICIENT = pytest.mark.parametrize("config", [KNOWN, LATE], ids=["known", "late"])
EVERY_HEAD = pytest.mark.parametrize("trains", [LEAVES, ("hidden",)], ids=["trains", "frozen"])


def leaves_of(arguments, trains=LEAVES):
    """Fresh leaves of a layer, of which some want a gradient."""
    tensors = {**arguments, "A": arguments["lora"][0], "B": arguments["lora"][1]}
    return {name: tensors[name].detach().clone().requires_grad_(name in trains) for name in LEAVES}


def arguments_of(backend, config=KNOWN, layout="padded", **changes):
    changes = {"config": config, "backend": backend, "temperature": 0.8, "max_chunk_bytes": 5 * 37 * 4, **changes}
    return valid("linear_policy_loss", layout) | changes


def loss_of(leaves, arguments):
    layer = {name: leaves[name] for name in ("hidden", "weight", "bias")}
    lora = (leaves["A"], leaves["B"], arguments["lora"][2])
    return ek.linear_policy_loss(**{**arguments, **layer, "lora": lora}).loss


def gradients(arguments, trains=LEAVES):
    """Loss and gradients by name."""
    leaves = leaves_of(arguments, trains)
    loss = loss_of(leaves, arguments)
    loss.backward()
    return {"loss": loss.detach(), **{name: leaves[name].grad for name in trains}}


# Bits.


@EVERY_HEAD
@EVERY_COEFFICIENT
@EVERY_LAYOUT
@FAST_BACKEND
def test_two_runs(backend, layout, config, trains):
    arguments = arguments_of(backend, config, layout)
    first, again = gradients(arguments, trains), gradients(arguments, trains)
    assert all(torch.equal(first[name], again[name]) for name in first)


@EVERY_HEAD
@EVERY_COEFFICIENT
@FAST_BACKEND
def test_chunks_change_nothing_but_rounding(backend, config, trains):
    whole = gradients(arguments_of(backend, config, max_chunk_bytes=None), trains)
    for rows in (1, 3, 7, 16):
        found = gradients(arguments_of(backend, config, max_chunk_bytes=rows * 2 * 37 * 4), trains)
        for name, value in whole.items():
            assert_rounding(found[name], value)


# Inputs.


@EVERY_COEFFICIENT
@EVERY_BACKEND
def test_what_does_not_count_may_hold_anything(backend, config):
    arguments = arguments_of(backend, config)
    broken = arguments["hidden"].clone()
    broken[~arguments["mask"]] = torch.nan
    broken[3, 3] = torch.inf if not arguments["mask"][3, 3] else broken[3, 3]
    wanted, found = gradients(arguments), gradients(arguments | {"hidden": broken})
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (found["hidden"][~arguments["mask"]] == 0).all()


@EVERY_BACKEND
def test_dense_rows_that_do_not_count_reach_no_gradient(backend, monkeypatch):
    """On a device nobody knows how many rows count, and all are multiplied."""
    monkeypatch.setattr(chunks, "active_rows", lambda *_: None)
    monkeypatch.setattr("egpo_kernels.linear.layer.active_rows", lambda *_: None)
    test_what_does_not_count_may_hold_anything(backend, KNOWN)
    test_what_does_not_count_may_hold_anything(backend, LATE)


@EVERY_BACKEND
def test_padded_vocabulary_by_a_bias(backend):
    arguments = arguments_of(backend, logit_softcap=None, lora=(torch.zeros(1, 4), torch.zeros(37, 1), 1.0))
    arguments["lora"] = tuple(one.to(DEVICE) if torch.is_tensor(one) else one for one in arguments["lora"])
    padded = arguments["bias"].clone()
    padded[30:] = -torch.inf
    tokens = arguments["tokens"] % 30
    found = gradients(arguments | {"bias": padded, "tokens": tokens})
    small = {name: arguments[name][:30] for name in ("weight", "bias")}
    small |= {"lora": (arguments["lora"][0], arguments["lora"][1][:30], 1.0), "tokens": tokens}
    wanted = gradients(arguments | small)
    for name, value in wanted.items():
        assert_rounding(found[name][:30] if name in ("weight", "bias", "B") else found[name], value)
        if name in ("weight", "bias", "B"):
            assert (found[name][30:] == 0).all()


@EVERY_COEFFICIENT
@FAST_BACKEND
def test_hidden_states_lie_anywhere(backend, config):
    """A slice of longer sequences, another order of dimensions, every second entry: read chunk by chunk."""
    arguments = arguments_of(backend, config)
    hidden = arguments["hidden"]
    wanted = gradients(arguments)
    longer = torch.cat([hidden, hidden], 1).requires_grad_()
    loss_of({**leaves_of(arguments), "hidden": longer[:, :4]}, arguments).backward()
    assert_rounding(longer.grad[:, :4], wanted["hidden"])
    assert (longer.grad[:, 4:] == 0).all()
    for view in (hidden.transpose(0, 1).contiguous().transpose(0, 1), hidden.repeat_interleave(2, 2)[..., ::2]):
        found = leaves_of(arguments)
        leaf = view.detach().requires_grad_()
        loss_of({**found, "hidden": leaf}, arguments).backward()
        assert_rounding(leaf.grad, wanted["hidden"])
        assert_rounding(found["weight"].grad, wanted["weight"])


@FAST_BACKEND
def test_autocast_converts_as_it_does_for_a_linear_layer(backend):
    arguments = arguments_of(backend)
    leaves, plain = leaves_of(arguments), leaves_of(arguments)
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        loss_of(leaves, arguments).backward()
    loss_of({name: leaf.bfloat16() for name, leaf in plain.items()}, arguments).backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, plain[name].grad)
    doubles = {name: leaf.detach().double() for name, leaf in leaves.items()}
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        assert loss_of(doubles, arguments).dtype == torch.float64


# Backward.


@EVERY_HEAD
@EVERY_COEFFICIENT
@FAST_BACKEND
def test_a_kept_graph_gives_the_same_again(backend, config, trains):
    arguments = arguments_of(backend, config)
    leaves = leaves_of(arguments, trains)
    loss = loss_of(leaves, arguments)
    loss.backward(retain_graph=True)
    first = {name: leaves[name].grad.clone() for name in trains}
    (2 * loss).backward()
    for name in trains:
        assert torch.equal(leaves[name].grad, 3 * first[name]) or config is LATE
        assert_rounding(leaves[name].grad, 3 * first[name])
    with pytest.raises(RuntimeError, match=r"second time|handed out"):
        loss.backward()


@EVERY_HEAD
@EVERY_COEFFICIENT
@FAST_BACKEND
def test_a_second_derivative_is_refused(backend, config, trains):
    arguments = arguments_of(backend, config)
    leaves = leaves_of(arguments, trains)
    wanted = [leaves[name] for name in trains]
    found = torch.autograd.grad(loss_of(leaves, arguments), wanted, create_graph=True)
    for gradient in found:
        with pytest.raises(RuntimeError, match="backend='reference'"):
            torch.autograd.grad(gradient.square().sum(), leaves["hidden"], retain_graph=True)


@EVERY_COEFFICIENT
@FAST_BACKEND
def test_another_upstream_than_expected(backend, config):
    arguments = arguments_of(backend, config)
    wanted = gradients(arguments)
    leaves = leaves_of(arguments)
    (0.3 * loss_of(leaves, arguments | {"grad_scale": 2.0})).backward()
    for name, leaf in leaves.items():
        assert_rounding(leaf.grad, 0.3 * wanted[name])


@FAST_BACKEND
def test_half_precision_waits_for_its_scale(backend):
    """Unscaled, most of these gradients are below float16's smallest number."""
    arguments = arguments_of(backend, WITH_KL, num_tokens=10**6)
    leaves = {name: leaf.detach().half().requires_grad_() for name, leaf in leaves_of(arguments).items()}
    (2.0**14 * loss_of(leaves, arguments)).backward()
    wanted = gradients(arguments)
    for name, leaf in leaves.items():
        found = leaf.grad.float() / 2.0**14
        assert (found - wanted[name]).norm() < 0.02 * wanted[name].norm(), name


@EVERY_COEFFICIENT
@FAST_BACKEND
def test_changed_between_forward_and_backward(backend, config):
    """What backward still needs may not change; what it does not may."""
    arguments = arguments_of(backend, config)
    leaves = leaves_of(arguments)
    loss = loss_of(leaves, arguments)
    with torch.no_grad():
        leaves["weight"].mul_(2)
    if config is LATE:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(leaves["weight"].grad, gradients(arguments)["weight"])


@EVERY_HEAD
@EVERY_COEFFICIENT
@FAST_BACKEND
def test_nothing_is_kept_for_what_is_not_differentiated(backend, config, trains):
    arguments = arguments_of(backend, config)
    leaves = leaves_of(arguments, trains)
    with torch.no_grad():
        assert not loss_of(leaves, arguments).requires_grad
    loss_of(leaves, arguments).backward()
    assert all((leaf.grad is not None) == (name in trains) for name, leaf in leaves.items())


@FAST_BACKEND
def test_a_broken_row_stays_alone(backend):
    """A counted row that is NaN, backward through other rows: 0 times its NaN gradient is 0."""
    arguments = arguments_of(backend)
    hidden = arguments["hidden"].clone()
    hidden[0, 0] = torch.nan
    for trains in ((), ("weight",)):
        leaf, weight = hidden.clone().requires_grad_(), arguments["weight"].clone().requires_grad_(bool(trains))
        found = ek.linear_token_log_probs(leaf, weight, arguments["tokens"], backend=backend).log_probs
        assert found[0, 0].isnan() and found.isnan().sum() == 1
        found[1:].sum().backward()
        assert (leaf.grad[0] == 0).all() and leaf.grad.isfinite().all()
        assert not trains or weight.grad.isfinite().all()


@EVERY_HEAD
@EVERY_COEFFICIENT
@FAST_BACKEND
def test_only_the_loss_is_differentiable_and_nothing_lingers(backend, config, trains):
    arguments = arguments_of(backend, config)
    leaves = leaves_of(arguments, trains)
    layer = {name: leaves[name] for name in ("hidden", "weight", "bias")}
    loss, metrics = ek.linear_policy_loss(**{**arguments, **layer})
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    found = ek.linear_token_log_probs(
        layer["hidden"], layer["weight"], arguments["tokens"], return_entropy=True, backend=backend
    )
    for root in (loss, found.entropy.sum()):
        root.backward()
    for value in (loss, found.log_probs):
        node = value.grad_fn
        while node.next_functions and not hasattr(node, "gradients"):
            node = node.next_functions[0][0]
        assert getattr(node, "gradients", None) is None


# What the host knows.


def test_places_of_what_counts():
    mask = torch.tensor([False, True, True, False, True])
    assert chunks.places_on(mask, torch.device("cpu")).tolist() == [1, 2, 4]
    assert chunks.first_places(mask, 3).tolist() == [1, 2, 4]
    assert chunks.first_places(mask, 4).tolist() == [1, 2, 4, 0]
    assert chunks.first_places(mask, 9).tolist() == [1, 2, 4, 0, 3]
    assert chunks.first_places(mask, 0).tolist() == []
    assert chunks.active_rows(mask, None, None).tolist() == [1, 2, 4]


@EVERY_COEFFICIENT
@FAST_BACKEND
@pytest.mark.cpu
def test_too_few_active_rows_make_nan_where_nobody_may_look(backend, config, monkeypatch):
    for module in (chunks, linear_ops):
        monkeypatch.setattr(module, "checks_values", lambda device: False, raising=False)
    monkeypatch.setattr(
        "egpo_kernels.linear.layer.active_rows", lambda mask, host, count: chunks.first_places(mask, count)
    )
    arguments = arguments_of(backend, config)
    counted = int(arguments["mask"].sum())
    wanted, found = gradients(arguments), gradients(arguments | {"num_active": counted})
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    wide = gradients(arguments | {"num_active": counted + 2})
    for name, value in wanted.items():
        assert_rounding(wide[name], value)
    short = gradients(arguments | {"num_active": counted - 1})
    assert short["loss"].isnan() and short["weight"].isnan().any() and short["hidden"].isnan().any()
    found = ek.linear_token_log_probs(
        arguments["hidden"], arguments["weight"], arguments["tokens"], mask=arguments["mask"], num_active=counted - 1,
        backend=backend,
    ).log_probs  # fmt: skip
    assert found[arguments["mask"]].isnan().all() and (found[~arguments["mask"]] == 0).all()
