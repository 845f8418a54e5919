"""What a Hugging Face model does around its output layer, found by trying its forward on a few numbers.

Config fields are named alike and used in different ways, no table of models is complete, and anybody may have put a
function or a hook around a forward. So the forward itself is called, as it stands, with decoder and product replaced.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from egpo_kernels.integrations.heads import Curve, head_modules, linear_of
from egpo_kernels.integrations.surroundings import described, forward_name, own_hooks
from egpo_kernels.integrations.tensor_parallel import product

TINY, HUGE = 2.0**-30, 2.0**100
"""Where a softcap does nothing, and where it is all that is left."""
LENGTHS = (4, 7)
"""Of the sequences that are tried: a scale may depend on it."""


class Measured(NamedTuple):
    """A head's curve, which of our forwards the model's own comes by, and the linear layers whose product it used."""

    curve: Curve
    reached: set[int]
    used: set[int]


class Probe:
    """Stands at a model and its head instead of a policy; notes which of our forwards it comes by."""

    def __init__(self) -> None:
        self.reached: set[int] = set()
        self.inner: Tensor | None = None


class _Products(TorchFunctionMode):
    """Gives ``raw`` for the product of a head's own weight and bias, and 0 for those of its adapters."""

    def __init__(self, model: Any, raw: Tensor) -> None:
        head = model.get_output_embeddings()
        self.layers, self.raw = [linear_of(each) for each in head_modules(model)], raw
        self.adapters = [module for module in head.modules() if module not in self.layers and module is not head]
        self.inputs: list[Tensor] = []
        self.used: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not nn.functional.linear:
            return function(*args, **kwargs)
        names = ("input", "weight", "bias")
        given, weight, bias = [*args] + [kwargs.get(name) for name in names[len(args) :]]
        for layer in self.layers:
            if weight is layer.weight and bias is layer.bias and torch.is_grad_enabled():
                self.inputs.append(given)
                self.used.add(id(layer))
                return self.raw.clone()
        if any(weight is getattr(module, "weight", None) for module in self.adapters):
            return self.raw.new_zeros(*given.shape[:-1], weight.shape[0])
        raise ValueError("a product with another weight or bias than the head's own")


class _Called:
    """Is called in a module's place, and has its attributes."""

    def __init__(self, module: Any) -> None:
        self.module, self.calls = module, 0

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.calls += 1
        return self.result(inputs, named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Output(tuple[Tensor]):
    """What a decoder returns: hidden states, and None for all the rest."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


class _Decoder(_Called):
    def __init__(self, module: Any, hidden: Tensor) -> None:
        super().__init__(module)
        self.result = lambda inputs, named: _Output([hidden])


class _Head(_Called):
    """The head's own forward with whatever is around it but tensor parallelism, and its own hooks."""

    def __init__(self, module: Any, products: _Products, probe: Probe) -> None:
        super().__init__(module)
        self.products, self.probe = products, probe

    def result(self, inputs: Any, named: Any) -> Any:
        module = self.module
        for key, hook in own_hooks(module._forward_pre_hooks):
            with_kwargs = key in module._forward_pre_hooks_with_kwargs
            found = hook(module, inputs, named) if with_kwargs else hook(module, inputs)
            if found is not None:
                inputs, named = found if with_kwargs else (found if isinstance(found, tuple) else (found,), named)
        forward = product(module.forward)
        with parametrize.cached(), self.products:
            output = forward(*inputs, **named)
        changed = self.probe.inner is not None and not _same(output, self.probe.inner)
        if changed or forward is not module.forward:
            self.probe.reached.discard(id(module))  # what was put around our forward since would change its result
        for key, hook in own_hooks(module._forward_hooks):
            before = output.clone()
            found = hook(module, inputs, *([named] if key in module._forward_hooks_with_kwargs else []), output)
            if not _same(output if found is None else found, before):
                raise ValueError(f"{forward_name(hook)} changes what the head returns")
        return output


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


@contextmanager
def _mode(modules: list[Any], training: bool) -> Iterator[None]:
    """The modules' ``training`` for a while."""
    before = [module.training for module in modules]
    for module in modules:
        module.training = training
    try:
        yield
    finally:
        for module, each in zip(modules, before, strict=True):
            module.training = each


@contextmanager
def _replaced(model: Any, places: dict[int, _Called]) -> Iterator[None]:
    """A model's own children for a while others; in place, since what is around its forward is bound to the model."""
    before = {name: module for name, module in model._modules.items() if id(module) in places}
    model._modules.update({name: places[id(module)] for name, module in before.items()})
    try:
        yield
    finally:
        model._modules.update(before)


def _tried(model: Any, forward: Any, probe: Probe, length: int, training: bool) -> tuple[Curve, set[int]]:
    """The curve at one length of sequences, in one mode, and the linear layers used."""
    head = model.get_output_embeddings()
    layer, generator = linear_of(head_modules(model)[0]), torch.Generator().manual_seed(length)
    raw = 30 * torch.randn(3, length, layer.out_features, dtype=torch.float64, generator=generator)
    raw[0, 0], raw[0, 1] = TINY, HUGE
    hidden = torch.randn(3, length, layer.in_features, dtype=torch.float64, generator=generator)
    hidden = hidden.to(layer.weight.dtype).requires_grad_()
    products = _Products(model, raw)
    stand_ins = _Head(head, products, probe), _Decoder(model.base_model, hidden)
    with ExitStack() as around:
        around.enter_context(torch.enable_grad())
        around.enter_context(_replaced(model, {id(each.module): each for each in stand_ins}))
        # Not of parametrizations: spectral norm moves its vectors in training.
        parts = [part for name, part in head.named_modules() if "parametrizations" not in name]
        around.enter_context(_mode([model, *parts], training))
        probe.inner = None
        output = forward(torch.zeros(3, length, dtype=torch.long), return_dict=True)
        logits = output.logits
        for key, hook in own_hooks(model._forward_hooks):
            found = hook(model, (), *([{}] if key in model._forward_hooks_with_kwargs else []), output)
            if not _same((output if found is None else found).logits, logits):
                raise ValueError(f"{forward_name(hook)} changes what the model returns")
    top, scale = float(logits[0, 1, 0]), float(logits[0, 0, 0]) / TINY
    curve = Curve(scale, None if top > HUGE * scale / 2 else top)
    error = (logits - curve(raw)).abs()
    (given,) = products.inputs
    if not (scale > 0 and bool((error <= 8 * torch.finfo(logits.dtype).eps * curve(raw).abs()).all())):
        raise ValueError("its logits are no scale and softcap of the product")
    if not _same(given.double(), hidden.double()) or not given.requires_grad:
        raise ValueError("the product is not of the hidden states as they are")
    if logits.requires_grad or [each.calls for each in stand_ins] != [1, 1]:
        raise ValueError("a scale that is learned, or a decoder or head that is called again")
    return curve, products.used


def measured(model: Any, forward: Any) -> Measured:
    """What a model's forward does to the product of its head, in training and without, for sequences of two lengths.

    Raises:
        ValueError: It is no `Curve`, not the same one everywhere, or something happens before the head.
    """
    probe, used = Probe(), set()
    marked = [module for module in (model, *head_modules(model)) if "_policy_calls" in module.__dict__]
    calls = [dict(module._policy_calls) for module in marked]
    curves = []
    try:
        for module in marked:
            module._policy_calls[None] = probe
        for length in LENGTHS:
            for training in (False, True):
                curve, layers = _tried(model, forward, probe, length, training)
                curves.append(curve)
                used |= layers
        if any(not _close(curve, curves[0]) for curve in curves):
            raise ValueError("it scales differently in training, or by the length of sequences")
    except Exception as cause:
        raise ValueError(_unknown(model, cause)) from cause
    finally:
        for module, before in zip(marked, calls, strict=True):
            module._policy_calls.clear()
            module._policy_calls.update(before)
    return Measured(curves[0], probe.reached, used)


def _close(one: Curve, other: Curve) -> bool:
    pairs = zip(one, other, strict=True)
    return all((a is None) == (b is None) and abs((a or 0) - (b or 0)) <= 1e-6 * abs(a or 0) for a, b in pairs)


def _unknown(model: Any, cause: Exception) -> str:
    return (
        f"model is a {type(model).__name__}, whose forward does more{described(model)} than get_output_embeddings() of "
        f"its base model's last hidden state, a scale and a softcap ({cause}); take the loss of such a model from its "
        "logits, or take away what does more (logits_dtype=torch.float32 stands for a head put into float32)"
    )
