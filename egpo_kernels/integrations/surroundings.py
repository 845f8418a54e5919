"""What somebody may have put around a model and its output layer: functions in place of a forward, and hooks."""

from collections.abc import Iterator
from typing import Any

from egpo_kernels.integrations.heads import head_modules
from egpo_kernels.integrations.tensor_parallel import module_of, moves, origin

GATHERERS = ("torch.distributed.", "torch.nn.utils.", "deepspeed.", "accelerate.", "egpo_kernels.")
"""Whose hooks bring weights and leave numbers alone; they must not run without a real forward."""


def own_hooks(hooks: Any) -> Iterator[tuple[int, Any]]:
    """Hooks that are none of those that bring weights, or move what they are given from rank to rank."""
    for key, hook in [*hooks.items()]:
        if not (module_of(hook).startswith(GATHERERS) or moves(hook)):
            yield key, hook


def forward_name(function: Any) -> str:
    """What a function or hook is called, with its module."""
    function = origin(function)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def around(model: Any) -> list[Any]:
    """What stands around a model and its heads; where it is the same, a curve need not be measured again."""
    found: list[Any] = []
    for module in (model, *model.get_output_embeddings().modules()):
        own = module.__dict__
        found += [module, own.get("forward"), own.get("_old_forward"), type(module).forward]
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks):
            # Of a head all: ours must be the last. Of a model ours may come and go.
            keys = [key for key, _ in own_hooks(hooks)] if module is model else [*hooks]
            found += [len(keys), *keys]
        found += [*module._backward_pre_hooks]
    return found


def check_inside(model: Any) -> None:
    """Raise where something stands around a part of the head, which is read and never called.

    Raises:
        ValueError: A function or a hook within peft's layers, on one of several heads, or in the head's backward.
    """
    top, heads = model.get_output_embeddings(), head_modules(model)
    for module in top.modules():
        own = module.__dict__
        backward = [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        for hook in backward:
            raise ValueError(
                f"the head has a backward hook {forward_name(hook)}, which would see no logits; it must have none: "
                "take the loss of such a model from its logits"
            )
        whole = module is top and len(heads) == 1
        if whole or (module in heads and len(heads) == 1):
            continue
        hooks = {**module._forward_pre_hooks, **module._forward_hooks}
        found = [forward_name(hook) for _, hook in own_hooks(hooks)]
        found += [forward_name(hook) for hook in hooks.values() if moves(hook)]
        if "forward" in own and "_policy_calls" not in own and "_hf_hook" not in own:
            found.append(forward_name(own["forward"]))
        if found:
            raise ValueError(
                f"within the head, around {type(module).__name__}, stands {found[0]}; there must be nothing: take it "
                "away, or take the loss of such a model from its logits"
            )


def described(model: Any) -> str:
    """What stands around a model and its head, for a message."""
    head = model.get_output_embeddings()
    found = []
    for name, module in (("model", model), ("head", head)):
        forward = module.__dict__.get("forward")
        if forward is not None and not forward_name(forward).startswith("egpo_kernels."):
            found.append(f"{name}.forward is {forward_name(forward)}")
        for kind, hooks in (("pre-hook", module._forward_pre_hooks), ("hook", module._forward_hooks)):
            found += [f"a forward {kind} {forward_name(hook)}" for _, hook in own_hooks(hooks)]
    return f" (around them: {'; '.join(found)})" if found else ""
