"""What an output layer is made of."""

from typing import Any, NamedTuple

from torch import Tensor, nn


class Curve(NamedTuple):
    """Logits of a head's output x: ``softcap tanh(scale x / softcap)``."""

    logit_scale: float
    logit_softcap: float | None

    def __call__(self, raw: Tensor) -> Tensor:
        """The logits."""
        scaled = self.logit_scale * raw
        return scaled if self.logit_softcap is None else self.logit_softcap * (scaled / self.logit_softcap).tanh()


def head_modules(model: Any) -> list[Any]:
    """The modules that are a model's head: several where peft trains copies of it (modules_to_save)."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model is a {type(model).__name__} without output embeddings; it must be a causal LM")
    if hasattr(head, "modules_to_save"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def linear_of(head: Any) -> Any:
    """The linear layer of a head, around which may be peft's LoRA."""
    return getattr(head, "base_layer", head)


def head_arguments(head: Any) -> dict[str, Any]:
    """``weight``, ``bias`` and ``lora`` of a linear layer, around which may be peft's LoRA.

    Raises:
        TypeError: Another layer.
        ValueError: Adapters that do more than add ``scale B A``.
    """
    base = linear_of(head)
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
