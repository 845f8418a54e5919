"""What an output layer is made of, and what a Hugging Face model does to what it gives."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TINY, HUGE = 2.0**-30, 2.0**100
"""Where a softcap does nothing, and where it is all that is left."""


class Curve(NamedTuple):
    """Logits of a head's output x: ``softcap tanh(scale x / softcap)``."""

    logit_scale: float
    logit_softcap: float | None

    def __call__(self, raw: Tensor) -> Tensor:
        """The logits."""
        scaled = self.logit_scale * raw
        return scaled if self.logit_softcap is None else self.logit_softcap * (scaled / self.logit_softcap).tanh()


def head_modules(model: Any) -> list[nn.Module]:
    """The modules that are a model's head: several where peft trains copies of it (modules_to_save)."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model is a {type(model).__name__} without output embeddings; it must be a causal LM")
    if hasattr(head, "modules_to_save"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def head_arguments(head: Any) -> dict[str, Any]:
    """``weight``, ``bias`` and ``lora`` of a linear layer, around which may be peft's LoRA.

    Raises:
        TypeError: Another layer.
        ValueError: Adapters that do more than add ``scale B A``.
    """
    base = getattr(head, "base_layer", head)
    plain = type(base).forward is nn.Linear.forward
    if base is not head:
        from peft.tuners import lora

        plain = plain and type(head).forward is lora.Linear.forward
    if not plain:
        layers = " around ".join(
            f"{type(each).__module__}.{type(each).__name__}" for each in dict.fromkeys((head, base))
        )
        raise TypeError(
            f"the head is a {layers}; it must be a torch.nn.Linear, as it is or under peft's LoRA: take such a model's "
            "loss from its logits"
        )
    found = {"weight": base.weight, "bias": base.bias}
    if base is head:
        return found
    if head.disable_adapters and head.merged:
        head.unmerge()  # as peft does
    if head.disable_adapters or head.merged:
        return found
    names = [name for name in head.active_adapters if name in head.lora_A]
    for name in names:
        _check_adapter(head, name, len(names))
        pair = (layers[name].weight.to(base.weight.dtype) for layers in (head.lora_A, head.lora_B))
        found["lora"] = (*pair, head.scaling[name])
    return found


def _check_adapter(head: Any, name: str, active: int) -> None:
    dropout = getattr(head.lora_dropout[name], "p", 0.0)
    wrong = {
        f"is one of {active} that are active; it must be the only one": active > 1,
        "is no plain LoRA (DoRA, ...); it must add scale B A and nothing else": name in head.lora_variant,
        "has a bias; it must have none: lora_bias=False": head.lora_bias.get(name),
        f"has dropout {dropout}; it must be 0 to train": head.training and dropout > 0,
    }
    for what, holds in wrong.items():
        if holds:
            raise ValueError(f"the head's adapter {name!r} {what}, or leave the head out of target_modules")


class _StandIn:
    """Is called in a module's place, and has its attributes."""

    def __init__(self, module: Any, result: Any) -> None:
        self.module, self.result = module, result
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self.calls.append(inputs)
        return self.result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Output(tuple[Tensor]):
    """What a decoder returns: hidden states, and None for all the rest."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def measured_curve(model: Any) -> Curve:
    """What a model's forward does to its head's output, found by calling it with decoder and head replaced.

    Config fields are named alike and used in different ways; and no table of models is complete. Costs three rows.

    Raises:
        ValueError: It is no `Curve`, or something happens before the head.
    """
    vocab = model.config.get_text_config().vocab_size
    raw = torch.stack([torch.full((vocab,), TINY), torch.full((vocab,), HUGE), torch.linspace(-99, 99, vocab)])
    raw = raw.double().unsqueeze(1)
    hidden = torch.arange(12.0).view(3, 1, 4)
    head = _StandIn(model.get_output_embeddings(), raw)
    decoder = _StandIn(model.base_model, _Output([hidden]))
    places = {id(stand_in.module): stand_in for stand_in in (head, decoder)}
    # Of the same class and with the same attributes, but for two modules; FSDP2's classes cannot be copied.
    double = object.__new__(type(model))
    double.__dict__ = {**model.__dict__, "_modules": {k: places.get(id(m), m) for k, m in model._modules.items()}}
    try:
        logits = type(model).forward(double, torch.zeros(3, 1, dtype=torch.long), return_dict=True).logits
        top = float(logits[1, 0, 0])
        scale = float(logits[0, 0, 0]) / TINY
        curve = Curve(scale, None if top > HUGE * scale / 2 else top)
        error = (logits - curve(raw)).abs()
        ((given,),) = head.calls
        fits = bool((error <= 8 * torch.finfo(logits.dtype).eps * curve(raw).abs()).all()) and not logits.requires_grad
        fits = fits and given.shape == hidden.shape and bool((given == hidden).all()) and len(decoder.calls) == 1
    except Exception as cause:
        raise ValueError(_unknown(model)) from cause
    if not fits:
        raise ValueError(_unknown(model))
    return curve


def _unknown(model: Any) -> str:
    return (
        f"model is a {type(model).__name__}, whose forward does more than get_output_embeddings() of its base model's "
        "last hidden state, a scale and a softcap; take the loss of such a model from its logits"
    )
