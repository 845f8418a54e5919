"""What a Hugging Face model does around its output layer, found by trying its forward on a few numbers.

Config fields are named alike and used in different ways, no table of models is complete, and anybody may have put a
function or a hook around a forward. So the forward itself is called, as it stands, with decoder and product replaced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from egpo_kernels.integrations.heads import Curve, head_modules, linear_of

TINY, HUGE = 2.0**-30, 2.0**100
"""Where a softcap does nothing, and where it is all that is left."""
GATHERERS = ("torch.distributed.", "torch.nn.utils.", "deepspeed.", "accelerate.", "egpo_kernels.")
"""Whose hooks bring weights and leave numbers alone; they must not run without a real forward."""


class Probe:
    """Stands at a model and its head instead of a policy; notes which of our forwards it comes by."""

    def __init__(self) -> None:
        self.reached: set[int] = set()
        self.inner: Tensor | None = None


class _Products(TorchFunctionMode):
    """Gives ``raw`` for the product of a head's own weight, and 0 for all others (adapters)."""

    def __init__(self, heads: list[Any], raw: Tensor) -> None:
        self.layers, self.raw = [linear_of(head) for head in heads], raw
        self.inputs: list[Tensor] = []
        self.used: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not nn.functional.linear:
            return function(*args, **kwargs)
        given, weight, *_ = [*args] + [kwargs[name] for name in ("input", "weight") if name in kwargs]
        for layer in self.layers:
            if weight is layer.weight:
                self.inputs.append(given)
                self.used.add(id(layer))
                return self.raw
        return self.raw.new_zeros(*given.shape[:-1], weight.shape[0])


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
    """The head's own forward with whatever is around it, and its hooks but for those that bring weights."""

    def __init__(self, module: Any, products: _Products, probe: Probe) -> None:
        super().__init__(module)
        self.products, self.probe, self.changed_by = products, probe, ""

    def result(self, inputs: Any, named: Any) -> Any:
        module = self.module
        for key, hook in _own_hooks(module._forward_pre_hooks):
            with_kwargs = key in module._forward_pre_hooks_with_kwargs
            found = hook(module, inputs, named) if with_kwargs else hook(module, inputs)
            if found is not None:
                inputs, named = found if with_kwargs else (found if isinstance(found, tuple) else (found,), named)
        with parametrize.cached(), self.products:
            output = module.forward(*inputs, **named)
        if self.probe.inner is not None and not _same(output, self.probe.inner):
            self.probe.reached.discard(id(module))  # what was put around our forward since would change its result
        for key, hook in _own_hooks(module._forward_hooks):
            before = output.clone()
            found = hook(module, inputs, *([named] if key in module._forward_hooks_with_kwargs else []), output)
            output = output if found is None else found
            if not _same(output, before):
                self.changed_by = _name(hook)
        return output


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _own_hooks(hooks: Any) -> Iterator[tuple[int, Any]]:
    for key, hook in [*hooks.items()]:
        origin = getattr(hook, "func", hook)
        if not str(getattr(origin, "__module__", None) or type(origin).__module__).startswith(GATHERERS):
            yield key, hook


def _name(function: Any) -> str:
    function = getattr(function, "func", function)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


@contextmanager
def _replaced(model: Any, places: dict[int, _Called], probe: Probe, marked: list[Any]) -> Iterator[None]:
    """A model's own children for a while others; in place, since what is around its forward is bound to the model."""
    before = {name: module for name, module in model._modules.items() if id(module) in places}
    model._modules.update({name: places[id(module)] for name, module in before.items()})
    calls = [(module, module.__dict__.get("_policy_call")) for module in marked if "_policy_call" in module.__dict__]
    for module, _ in calls:
        module._policy_call = probe
    try:
        yield
    finally:
        model._modules.update(before)
        for module, call in calls:
            module._policy_call = call


def surroundings(model: Any) -> list[Any]:
    """What stands around a model's heads; where it is the same, so is the curve."""
    found: list[Any] = []
    for head in head_modules(model):
        for module in (head, linear_of(head)):
            own = module.__dict__
            found += [module, own.get("forward"), own.get("_old_forward"), type(module).forward]
        found += [*head._forward_pre_hooks, *head._forward_hooks]
    return found


def measured_curve(model: Any) -> tuple[Curve, Probe, set[int]]:
    """What a model's forward does to the product of its head, which of our forwards it came by, and the layers used.

    Costs three rows; no weight is touched.

    Raises:
        ValueError: It is no `Curve`, or something happens before the head.
    """
    vocab = model.config.get_text_config().vocab_size
    raw = torch.stack([torch.full((vocab,), TINY), torch.full((vocab,), HUGE), torch.linspace(-99, 99, vocab)])
    raw = raw.double().unsqueeze(1)
    hidden = torch.arange(12.0).view(3, 1, 4)
    heads, probe = head_modules(model), Probe()
    products = _Products(heads, raw)
    head, decoder = _Head(model.get_output_embeddings(), products, probe), _Decoder(model.base_model, hidden)
    places: dict[int, _Called] = {id(each.module): each for each in (head, decoder)}
    try:
        with torch.enable_grad(), _replaced(model, places, probe, [model, *heads]):
            logits = model.forward(torch.zeros(3, 1, dtype=torch.long), return_dict=True).logits
        top, scale = float(logits[1, 0, 0]), float(logits[0, 0, 0]) / TINY
        curve = Curve(scale, None if top > HUGE * scale / 2 else top)
        error = (logits - curve(raw)).abs()
        (given,) = products.inputs
        fits = bool((error <= 8 * torch.finfo(logits.dtype).eps * curve(raw).abs()).all()) and scale > 0
        fits = fits and not logits.requires_grad  # of a learned scale
        fits = fits and given.shape == hidden.shape and bool((given == hidden).all())
        fits = fits and (head.calls, decoder.calls) == (1, 1) and not head.changed_by
    except Exception as cause:
        raise ValueError(_unknown(model, head)) from cause
    if not fits:
        raise ValueError(_unknown(model, head))
    return curve, probe, products.used


def _unknown(model: Any, head: _Head) -> str:
    around = []
    for name, module in (("model", model), ("head", head.module)):
        if "forward" in module.__dict__:
            around.append(f"{name}.forward is {_name(module.forward)}")
    around += [f"a forward pre-hook {_name(hook)}" for _, hook in _own_hooks(head.module._forward_pre_hooks)]
    around += [f"a forward hook {_name(hook)}" for _, hook in _own_hooks(head.module._forward_hooks)]
    what = f" (around them: {'; '.join(around)})" if around else ""
    return (
        f"model is a {type(model).__name__}, whose forward does more{what} than get_output_embeddings() of its base "
        "model's last hidden state, a scale and a softcap; take the loss of such a model from its logits, or take away "
        "what does more (logits_dtype=torch.float32 stands for a head put into float32)"
    )
