"""Hugging Face causal LMs whose own forward gives losses and log-probs, never logits."""

import functools
import inspect
from collections.abc import Callable, Mapping
from reprlib import repr as shown
from typing import Any, TypeVar

from torch import Tensor, nn

from egpo_kernels.integrations.heads import Curve, head_arguments, head_modules, measured_curve
from egpo_kernels.linear.api import linear_egpo_loss, linear_policy_loss, linear_token_log_probs
from egpo_kernels.types import LossOutput, TokenLogProbs

Model = TypeVar("Model", bound=nn.Module)
PRECISE = ("advantages", "old_log_probs", "ref_log_probs", "rewards", "rollout_weights", "temperature")
"""Arguments that 16 bits would change."""
POLICY_KEYS = {
    function.__name__: frozenset(inspect.signature(function).parameters)
    - {"hidden", "weight", "bias", "lora", *Curve._fields}
    for function in (linear_egpo_loss, linear_policy_loss, linear_token_log_probs)
}
"""What a policy may hold for each function: all but what the model knows."""


def fuse_policy_loss(model: Model) -> Model:
    """Let ``model(input_ids, ..., policy={...})`` return losses or log-probs; the logits are never whole.

    ``policy`` holds a function's arguments by name, but for those that the model knows (hidden, weight, bias, lora,
    logit_scale, logit_softcap):

    ===========================  ==========================  =================
    keys of ``policy``           function                    returned
    ===========================  ==========================  =================
    tokens, groups, rewards      `linear_egpo_loss`          `LossOutput`
    tokens, advantages           `linear_policy_loss`        `LossOutput`
    tokens                       `linear_token_log_probs`    `TokenLogProbs`
    ===========================  ==========================  =================

    The hidden state at position t scores ``tokens[:, t]`` and nothing is shifted: `next_token_targets` makes such
    tokens. ``logits_to_keep`` chooses positions as it does for logits; tokens ``[N]`` go with input_ids ``[1, N]``. All
    but input_ids is passed by name. Without ``policy`` the model is what it was.

    The head is read inside its own forward, where FSDP2 and ZeRO-3 have gathered it. Fuse last, after peft and
    ``fully_shard``, and again where its config changes. What the model makes of its head's output (Granite's scale,
    Gemma's softcap) is found by trying its forward on a few numbers.

    Args:
        model: A ``PreTrainedModel`` with a linear output layer, or a ``PeftModel`` of one; changed in place.

    Returns:
        The model.

    Raises:
        TypeError: Another kind of model, or of output layer.
        ValueError: No output layer, or a forward that makes of its output what cannot be fused.
    """
    from transformers import PreTrainedModel

    given: Any = model
    inner = given.get_base_model() if hasattr(given, "get_base_model") else given
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a transformers.PreTrainedModel, or peft's of one: fuse it "
            "before DDP or torch.compile wraps it"
        )
    for head in head_modules(inner):
        head_arguments(head)
    inner._policy_curve = measured_curve(inner)
    _fuse_heads(inner)
    _replace_forward(inner, _model_forward)
    if "_policy_hook" in given.__dict__:
        given._policy_hook.remove()  # fully_shard may have put its own before it
    given._policy_hook = given.register_forward_pre_hook(_seal_inputs, prepend=True, with_kwargs=True)
    return model


class _Sealed:
    """The arguments of a loss, where no wrapper looks: FSDP2's mixed precision would round old log-probs too."""

    def __init__(self, policy: Mapping[str, Any], curve: Curve | None = None) -> None:
        self.policy, self.curve = dict(policy), curve


def _sealed(policy: Any) -> _Sealed:
    if isinstance(policy, _Sealed):
        return policy
    if not isinstance(policy, Mapping):
        raise TypeError(f"policy is {shown(policy)}; it must be a dict of a loss's arguments, tokens among them")
    for name in PRECISE:
        value = policy.get(name)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
            raise TypeError(
                f"policy[{name!r}] has dtype {value.dtype}; it must be float32 or float64: where FSDP2's "
                "MixedPrecisionPolicy rounds it, fuse the model after fully_shard, or pass MappingProxyType(policy)"
            )
    return _Sealed(policy)


def _seal_inputs(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Forward pre-hook that comes before those of wrappers."""
    if named.get("policy") is not None:
        named["policy"] = _sealed(named["policy"])
    return inputs, named


def _model_forward(model: Any, forward: Callable[..., Any], *inputs: Any, policy: Any = None, **named: Any) -> Any:
    """The forward of a fused model."""
    if policy is None:
        return forward(*inputs, **named)
    arguments = _sealed(policy).policy
    if len(inputs) > 1:
        raise TypeError(f"{len(inputs)} positional arguments go with policy; all but input_ids must be named")
    if named.pop("labels", None) is not None:
        raise ValueError("labels and policy are both given; the loss must be one of them: leave out labels")
    keep = named.pop("logits_to_keep", None)
    keep = 0 if keep is None else keep
    hidden = model.base_model(*inputs, **{**named, "return_dict": True}).last_hidden_state
    hidden = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
    tokens = arguments.get("tokens")
    if isinstance(tokens, Tensor) and tokens.dim() == 1 and hidden.shape[0] == 1:
        hidden = hidden[0]
    _fuse_heads(model)  # peft may have put another head there
    return model.get_output_embeddings()(hidden, policy=_Sealed(arguments, model._policy_curve))


def _head_forward(head: nn.Module, forward: Callable[..., Any], *inputs: Any, policy: Any = None, **named: Any) -> Any:
    """The forward of its head."""
    if policy is None:
        return forward(*inputs, **named)
    function: Callable[..., LossOutput | TokenLogProbs] = linear_token_log_probs
    if "groups" in policy.policy or "rewards" in policy.policy:
        function = linear_egpo_loss
    elif "advantages" in policy.policy:
        function = linear_policy_loss
    known = {**head_arguments(head), **policy.curve._asdict()}
    allowed = POLICY_KEYS[function.__name__]
    for name in [name for name in policy.policy if name not in allowed] + ["tokens"] * ("tokens" not in policy.policy):
        what = "has" if name in policy.policy else "lacks"
        raise TypeError(f"policy {what} {name!r}; its keys must be arguments of {function.__name__}, tokens among them")
    return function(*inputs, **known, **policy.policy, **named)


def _fuse_heads(model: Any) -> None:
    for head in head_modules(model):
        _replace_forward(head, _head_forward)


def _replace_forward(module: Any, function: Callable[..., Any]) -> None:
    """Make ``function`` a module's forward and hand it the one before; a partial of a function can be pickled."""
    if module.__dict__.get("_policy_forward") and "forward" in module.__dict__:  # others may have wrapped it since
        return
    module._policy_forward = True
    signature = inspect.signature(module.forward)
    parameters = [*signature.parameters.values(), inspect.Parameter("policy", inspect.Parameter.KEYWORD_ONLY)]
    module.forward = functools.partial(function, module, module.forward)
    # generate and the Trainer look for the names that the model takes.
    module.forward.__signature__ = signature.replace(parameters=sorted(parameters, key=lambda each: each.kind))
