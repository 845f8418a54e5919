"""Garbage thrown at every public function: a documented error that names an argument, or a documented result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import egpo_kernels as ek
from tests.support import strategies
from tests.support.batches import TRITON, make_batch
from tests.support.calls import DIFFERENTIABLE, FUNCTIONS, call, lead, valid
from tests.support.fuzz import CALM, refusal, untouched
from tests.support.garbage import garbage_for

VOCAB = 5
PRESETS = st.sampled_from(list(ek.recipes.RECIPES.values()))
LOSSES = st.one_of(strategies.loss_configs(), PRESETS.map(lambda recipe: recipe.loss))
CONFIGS = {
    "egpo_loss": ("recipe", st.one_of(strategies.recipes(), PRESETS)),
    "group_advantages": (
        "config",
        st.one_of(strategies.advantage_configs(), PRESETS.map(lambda recipe: recipe.advantage)),
    ),
    "policy_loss": ("config", LOSSES),
    "logits_policy_loss": ("config", LOSSES),
    "linear_egpo_loss": ("recipe", st.one_of(strategies.recipes(), PRESETS)),
    "linear_policy_loss": ("config", LOSSES),
}


@st.composite
def calls(draw, name, backend):
    """An accepted call with one to three arguments replaced, tensors more often than settings."""
    arguments = valid(name, draw(st.sampled_from(["padded", "packed"])), VOCAB)
    if name in CONFIGS:
        key, configs = CONFIGS[name]
        arguments[key] = draw(st.one_of(st.just(arguments[key]), configs))
    if draw(st.booleans()):
        for key in DIFFERENTIABLE:
            if key in arguments and name != "group_advantages":
                arguments[key] = arguments[key].clone().requires_grad_()
    if "inplace_grad" in arguments:
        arguments["inplace_grad"] = backend != "reference" and draw(st.booleans())
    tensors = [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]
    names = draw(st.lists(st.sampled_from([*arguments, *tensors, *tensors]), min_size=1, max_size=3, unique=True))
    return arguments | {key: draw(garbage_for(arguments[key]), label=key) for key in names}


def tensors_of(result):
    """Every tensor in a result, by name."""
    fields = result._asdict() if hasattr(result, "_asdict") else dict(enumerate(result))
    metrics = fields.pop("metrics", {})
    return {key: value for key, value in fields.items() if value is not None} | metrics


def is_calm(value):
    """Whether numbers of this size overflow nothing, whether multiplied or divided by."""
    if isinstance(value, torch.Tensor):
        sizes = value.detach().double().abs()
        return not value.dtype.is_floating_point or bool(((sizes == 0) | (sizes > 1e-6) & (sizes <= 100)).all())
    return not isinstance(value, (int, float)) or value == 0 or 1e-6 < value <= 100


def check_result(name, arguments, result):
    """Shapes, dtypes and finiteness as the docstrings say; then backward, where there is a way."""
    first = arguments["rewards" if name == "group_advantages" else lead(name)]
    tensors = tensors_of(result)
    for key, tensor in tensors.items():
        assert tensor.device == first.device and (tensor.dim() == 0 or "/" not in str(key)), key
        assert tensor.dtype in (torch.float32, torch.float64), key
        assert not tensor.requires_grad or key in ("loss", "log_probs", "entropy"), key
    shape = first.shape if name in ("group_advantages", "policy_loss") else first.shape[:-1]
    if isinstance(result, ek.LossOutput):
        settings_of = arguments.get("recipe") or arguments["config"]
        losses = settings_of if isinstance(settings_of, ek.PolicyLossConfig) else ek.recipes.get(settings_of).loss
        shape = shape if losses.reduction == "none" else ()
    assert all(tensor.shape == shape for key, tensor in tensors.items() if "/" not in key)
    calm = not first.is_meta and all(map(is_calm, arguments.values()))
    if calm and isinstance(result, (ek.LossOutput, ek.GroupAdvantages)):
        assert tensors.get("loss", tensors.get("advantages")).isfinite().all()
    roots = [tensor for tensor in tensors.values() if tensor.requires_grad]
    leaves = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    leaves = {key: value for key, value in leaves.items() if key in DIFFERENTIABLE and name != "group_advantages"}
    if name == "policy_loss" and losses.entropy_coef == 0:
        leaves.pop("entropy", None)  # only reported
    assert bool(roots) == bool(leaves)
    if roots:
        wanted = torch.autograd.grad([root.sum() for root in roots], list(leaves.values()), allow_unused=True)
        for value, gradient in zip(leaves.values(), wanted, strict=True):
            assert gradient is None or (gradient.shape == value.shape and gradient.dtype == value.dtype)
            if calm and gradient is not None and value.dtype != torch.float16:
                assert gradient.isfinite().all()


def check_call(name, arguments, backend):
    """One call: refused, or answered as documented; and nothing was changed."""
    check_untouched = untouched(arguments, ("logits",) if arguments.get("inplace_grad") is True else ())
    try:
        result = call(name, arguments, backend)
    except (ValueError, TypeError) as error:
        refusal(error, [*arguments, "PolicyLossConfig.norm_length"])
        check_untouched(succeeded=False)
        return False
    check_result(name, arguments, result)
    check_untouched(succeeded=True)
    return True


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=100, **CALM)
@given(data=st.data())
def test_garbage_is_refused_by_name_or_answered(name, backend, data):
    check_call(name, data.draw(calls(name, backend)), backend)


@pytest.mark.cpu
@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=25, **CALM)  # interpreted kernels take their time
@given(data=st.data())
def test_garbage_is_refused_by_name_or_answered_by_kernels(name, backend, data):
    check_call(name, data.draw(calls(name, backend)), backend)


def test_positional_arguments_are_counted():
    batch = make_batch()
    for name in ("egpo_loss", "logits_policy_loss"):
        with pytest.raises(TypeError, match="positional argument"):
            getattr(ek, name)(*[batch.logits] * 6)
    with pytest.raises(TypeError, match="old_logprobs"):
        ek.egpo_loss(batch.logits, batch.tokens, 2, batch.rewards, old_logprobs=batch.old_log_probs)
