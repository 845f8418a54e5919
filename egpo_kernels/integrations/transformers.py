"""Hugging Face causal LMs whose own forward gives losses and log-probs, never logits."""

import functools
import inspect
from collections.abc import Callable, Mapping
from reprlib import repr as shown
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from egpo_kernels.api.linear import linear_egpo_loss, linear_policy_loss, linear_token_log_probs
from egpo_kernels.config.results import LossOutput, TokenLogProbs
from egpo_kernels.integrations.fused_call import FusedCall, thread
from egpo_kernels.integrations.heads import Curve, head_arguments, head_modules, linear_of
from egpo_kernels.integrations.probe import measured
from egpo_kernels.integrations.surroundings import around, check_inside
from egpo_kernels.integrations.tensor_parallel import aside, met, plan_of, product

Model = TypeVar("Model", bound=nn.Module)
PRECISE = ("advantages", "old_log_probs", "ref_log_probs", "rewards", "rollout_weights", "temperature")
"""Arguments that 16 bits would change."""
KNOWN = {"hidden", "weight", "bias", "lora", "logits_dtype", *Curve._fields}
"""Arguments that are the model's."""
SPLIT = {"vocab_group", "vocab_start", "hidden_grad", "sequence_parallel"}
"""These too, where tensor parallelism has split it."""
POLICY_KEYS = {
    function.__name__: frozenset(inspect.signature(function).parameters) - KNOWN - SPLIT
    for function in (linear_egpo_loss, linear_policy_loss, linear_token_log_probs)
}
"""What a policy may hold for each function: all but what the model knows."""


def fuse_policy_loss(model: Model, *, logits_dtype: torch.dtype | None = None) -> Model:
    """Let ``model(input_ids, ..., policy={...})`` return losses or log-probs; the logits are never whole.

    The keys of ``policy`` are arguments of one of these functions, without those that the model knows (hidden, weight,
    bias, lora, logit_scale, logit_softcap, and by whom it is split). They choose the function:

    | keys of ``policy``      | function                 | returned        |
    |-------------------------|--------------------------|-----------------|
    | tokens, groups, rewards | `linear_egpo_loss`       | `LossOutput`    |
    | tokens, advantages      | `linear_policy_loss`     | `LossOutput`    |
    | tokens                  | `linear_token_log_probs` | `TokenLogProbs` |

    The hidden state at position t scores ``tokens[:, t]``; nothing is shifted. `next_token_targets` makes such tokens.
    ``logits_to_keep`` chooses positions as it does for logits; tokens ``[N]`` go with input_ids ``[1, N]``. Pass all
    but input_ids by keyword. Without ``policy`` the model works as before.

    The call runs the model's own forward and its wrappers (autocast, accelerate's hooks). The weight of the head is
    read inside the head's own forward, where FSDP2 and ZeRO-3 have gathered it. Where tensor parallelism splits it over
    the vocabulary it stays split; all ranks must come with the same inputs. Fuse after peft and ``fully_shard``, and
    again if the model's config changes. What the model does to its head's output (Granite's scale, Gemma's softcap, a
    function in place of the head's forward) is measured with a few numbers, and again when a wrapper or hook was added.
    A hook on the head sees a small tensor in place of logits.

    Args:
        model: A ``PreTrainedModel`` with a linear output layer, or a ``PeftModel`` of one; changed in place.
        logits_dtype: ``torch.float32`` keeps a 16-bit model's logits in float32; see `linear_policy_loss`.

    Returns:
        The model.

    Raises:
        TypeError: Another type of model or output layer.
        ValueError: No output layer, or a forward, a patch or a hook that does more to its output than scale and softcap
            it.
        RuntimeError: ``nn.DataParallel`` replicates the model: use one process per device.
    """
    from transformers import PreTrainedModel

    if logits_dtype not in (None, torch.float32):
        raise ValueError(f"logits_dtype is {shown(logits_dtype)}; it must be torch.float32 or None")
    given: Any = model
    inner = given.get_base_model() if hasattr(given, "get_base_model") else given
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a transformers.PreTrainedModel, or peft's of one: fuse it "
            "before DDP or torch.compile wraps it"
        )
    _fuse(inner, logits_dtype)
    if "_policy_hook" in given.__dict__:
        given._policy_hook.remove()  # fully_shard may have put its own before it
    given._policy_hook = given.register_forward_pre_hook(_seal_inputs, prepend=True, with_kwargs=True)
    return model


class _Sealed:
    """The arguments of a loss, where no wrapper looks: FSDP2's mixed precision would round old log-probs too."""

    def __init__(self, policy: Mapping[str, Any]) -> None:
        self.policy = dict(policy)


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
        inner: Any = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
        if "_policy_around" in inner.__dict__:
            _check_fused(inner)
    return inputs, named


def _check_fused(model: Any, forward: Callable[..., Any] | None = None) -> None:
    """Fuse once more where something else stands around a model than was measured.

    Within a call only its inner ``forward`` is tried: autocast around the outer one cannot be entered twice.
    """
    if not torch.compiler.is_compiling() and not _alike(around(model), model._policy_around):
        _fuse(model, model._policy_dtype, forward)


def _model_forward(model: Any, forward: Callable[..., Any], *inputs: Any, policy: Any = None, **named: Any) -> Any:
    """The forward of a fused model."""
    if inputs and inputs[0] is model:  # accelerate makes a method of what it finds
        inputs = inputs[1:]
    if None in model._policy_calls:
        model._policy_calls[None].reached.add(id(model))
    if policy is None:
        return forward(*inputs, **named)
    arguments = _sealed(policy).policy
    if len(inputs) > 1:
        raise TypeError(f"{len(inputs)} positional arguments go with policy; all but input_ids must be named")
    if named.pop("labels", None) is not None:
        raise ValueError("labels and policy are both given; the loss must be one of them: leave out labels")
    if named.get("output_router_logits", getattr(model.config, "output_router_logits", False)):
        raise ValueError(
            "output_router_logits is True with policy, beside which there is no auxiliary loss; it must be False"
        )
    function, keep = _function_of(arguments), named.pop("logits_to_keep", None)
    _check_fused(model, forward)
    known = {**model._policy_curve._asdict(), "logits_dtype": model._policy_dtype}
    call = FusedCall(function, {**arguments, **known}, keep)
    # By thread, and put back as it was: a checkpoint may run the forward once more within the forward.
    own, heads = thread(), head_modules(model)
    before = [head._policy_calls.get(own) for head in heads]
    try:
        for head in heads:
            head._policy_calls[own] = call
        forward(*inputs, **named)
    finally:
        for head, other in zip(heads, before, strict=True):
            head._policy_calls.pop(own)
            if other is not None:
                head._policy_calls[own] = other
    return call.result()


def _function_of(policy: Mapping[str, Any]) -> Callable[..., LossOutput | TokenLogProbs]:
    """The function that a policy's keys ask for."""
    function: Callable[..., LossOutput | TokenLogProbs] = linear_token_log_probs
    if "groups" in policy or "rewards" in policy:
        function = linear_egpo_loss
    elif "advantages" in policy:
        function = linear_policy_loss
    for name in [name for name in policy if name not in POLICY_KEYS[function.__name__]] + ["tokens"]:
        if name != "tokens" or name not in policy:
            what = "has" if name in policy else "lacks"
            raise TypeError(
                f"policy {what} {name!r}; its keys must be arguments of {function.__name__}, tokens among them"
            )
    return function


def _head_forward(head: Any, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """The forward of its head."""
    call = head._policy_calls.get(thread())
    if None not in head._policy_calls:
        return forward(*inputs, **named) if call is None else call.carrier(*met(head, *inputs, **named))
    probe, output = head._policy_calls[None], product(forward)(*inputs, **named)
    probe.inner = output.clone()
    probe.reached.add(id(head))
    return output


def _head_hook(head: Any, inputs: Any, output: Any) -> None:
    """The last forward hook of its head: others may have put their own tensors around what it returned."""
    call = head._policy_calls.get(thread())
    if call is not None:
        call.returned(output)


def _alike(found: list[Any], before: list[Any]) -> bool:
    return len(found) == len(before) and all(a is b or a == b for a, b in zip(found, before, strict=True))


def _fuse(model: Any, logits_dtype: torch.dtype | None, forward: Callable[..., Any] | None = None) -> None:
    """Measure what stands around a model's head, and put our forwards where they are not yet come by."""
    heads = head_modules(model)
    for head in heads:
        head_arguments(head)
        head._policy_plan = plan_of(model, head)
    check_inside(model)
    model._policy_curve, reached, used = measured(model, forward or model.forward)
    if forward is None and id(model) not in reached:
        _replace_forward(model, _model_forward)
    for head in heads:
        fused = "_policy_calls" in head.__dict__ and id(linear_of(head)) not in used
        if id(head) not in reached and not fused:
            _replace_forward(head, _head_forward)
        head._forward_hooks.update({key: aside(hook) for key, hook in head._forward_hooks.items()})
        if "_policy_last" in head.__dict__:
            head._policy_last.remove()
        head._policy_last = head.register_forward_hook(_head_hook)
    model._policy_dtype, model._policy_around = logits_dtype, around(model)


def _replace_forward(module: Any, function: Callable[..., Any]) -> None:
    """Make ``function`` a module's forward and hand it the one before; a partial of a function can be pickled."""
    # Within accelerate's hooks, which bring the weights.
    place = "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"
    before = getattr(module, place)
    module._policy_calls = {}
    module._replicate_for_data_parallel = _refuse_replicas
    wrapped = functools.partial(function, module, before)
    if function is _model_forward:
        signature = inspect.signature(before)
        parameters = [*signature.parameters.values(), inspect.Parameter("policy", inspect.Parameter.KEYWORD_ONLY)]
        # generate and the Trainer look for the names that the model takes.
        wrapped.__signature__ = signature.replace(parameters=sorted(parameters, key=lambda each: each.kind))  # type: ignore[attr-defined]
    setattr(module, place, wrapped)


def _refuse_replicas() -> None:
    raise RuntimeError(
        "nn.DataParallel makes replicas of a model that fuse_policy_loss changed, which would all run the first one; "
        "it must be one process a device: DistributedDataParallel, by torchrun or accelerate launch"
    )
