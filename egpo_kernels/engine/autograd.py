"""Autograd Functions around the opaque operators: what is saved, and when the gradient of the logits is made."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from egpo_kernels.engine import given_ops, ops
from egpo_kernels.engine.row_ops import How

NO_DOUBLE = (
    "egpo_kernels differentiates once: a second derivative through its {} backend is not available; "
    "use backend='reference' for create_graph=True"
)
CONSUMED = (
    "the gradient was handed out by an earlier backward and is gone; "
    "use backend='reference', or inplace_grad=False with retain_graph=True in every backward but the last"
)


class _RefuseBackward(torch.autograd.Function):
    """Pass gradients on; refuse to be differentiated, so that a second derivative fails with a reason."""

    @staticmethod
    def forward(ctx: Any, backend: str, gradient: Tensor, *_: Tensor | None) -> Tensor:
        ctx.backend = backend
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(NO_DOUBLE.format(ctx.backend))


def guarded(backend: str, gradient: Tensor, *parents: Tensor | None) -> Tensor:
    """Under create_graph, return the gradient behind a node that refuses a second derivative.

    The node stands between the gradient and its ``parents``, so that every way to what they depend on leads through it.
    """
    if not torch.is_grad_enabled() or is_compiling():
        return gradient
    return _RefuseBackward.apply(backend, gradient.detach().requires_grad_(), *parents)


def no_gradients() -> contextlib.AbstractContextManager[Any]:
    """`torch.no_grad` where a backward pass runs under create_graph, which alone has them enabled."""
    return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()


def looks_at(tensor: Tensor) -> bool:
    """Whether autograd may ask for a tensor's gradient, or must refuse what it cannot do: forward mode, functorch."""
    watched = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    return watched or (torch.is_grad_enabled() and tensor.requires_grad)


class TokenLogProbs(torch.autograd.Function):
    """Log-prob and entropy of each row; the gradient is made in backward, from the logits read once more.

    With a ``shard`` also the status of its exchange.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        temperature: float,
        want_entropy: bool,
        inplace: bool,
        backend: str,
        shard: str,
        *rows: Any,
    ) -> tuple[Tensor, ...]:
        """See `egpo_kernels.engine.ops.row_statistics`."""
        log_probs, entropy, maximum, sum_exp, status = ops.row_statistics(
            logits.detach(), list(rows), temperature, want_entropy, backend, shard
        )
        ctx.save_for_backward(logits, maximum, sum_exp, entropy, log_probs if shard else None, *rows)
        ctx.options, ctx.overwritten = (temperature, want_entropy, inplace, backend, shard), False
        ctx.set_materialize_grads(False)
        if not shard:
            return log_probs, entropy
        ctx.mark_non_differentiable(status)
        return log_probs, entropy, status

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> Any:
        """Gradient with respect to the logits only."""
        temperature, want_entropy, inplace, backend, shard = ctx.options
        if inplace and not is_compiling():
            if ctx.overwritten:
                raise RuntimeError(CONSUMED)
            ctx.overwritten = True
        logits, maximum, sum_exp, entropy, log_probs, *rows = ctx.saved_tensors
        if not want_entropy:
            grad_entropy = None
        given = (grad_log_probs, grad_entropy)
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(maximum)
        with no_gradients():
            if log_probs is not None:
                # Nothing comes from a token whose logit is -inf, which may lie in another rank's columns.
                rows[0] = rows[0] & (log_probs != -torch.inf).view(rows[0].shape)
            statistics = [maximum, sum_exp, entropy]
            upstream = [grad_log_probs.contiguous(), None if grad_entropy is None else grad_entropy.contiguous()]
            gradient = logits.detach()
            options = (rows, statistics, upstream, temperature, backend, shard)
            if inplace:
                ops.logits_gradient_(gradient, *options)
            else:
                gradient = ops.logits_gradient(gradient, *options)
        return guarded(backend, gradient, logits, *given), *[None] * (5 + len(rows))


class PolicyLoss(torch.autograd.Function):
    """Loss (0-d, or per token) of log-probs and entropy; derivatives are made in backward, where upstream is known."""

    @staticmethod
    def forward(
        ctx: Any,
        log_probs: Tensor,
        entropy: Tensor | None,
        offsets: Tensor | None,
        num_sequences: int,
        config: str,
        vocab: int,
        per_token: bool,
        reported: bool,
        backend: str,
        *rows: Any,
    ) -> tuple[Tensor, Tensor]:
        """See `egpo_kernels.engine.ops.policy_loss`."""
        loss, vector = ops.policy_loss(
            log_probs.detach(),
            None if entropy is None else entropy.detach(),
            list(rows),
            offsets,
            num_sequences,
            config,
            vocab,
            per_token,
            reported,
            backend,
        )
        ctx.save_for_backward(log_probs, entropy, offsets, *rows)
        ctx.options = (num_sequences, config, backend)
        ctx.mark_non_differentiable(vector)
        ctx.set_materialize_grads(False)  # of the vector they would be zeros, a launch
        return loss, vector

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> Any:
        """Gradients with respect to log_probs and entropy."""
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        log_probs, entropy, offsets, *rows = ctx.saved_tensors
        num_sequences, config, backend = ctx.options
        with no_gradients():
            slope, bonus = ops.policy_loss_gradient(
                log_probs.detach(),
                rows,
                offsets,
                num_sequences,
                config,
                upstream.detach(),
                ctx.needs_input_grad[1],
                backend,
            )
        parents = (log_probs, entropy, upstream)
        grad_entropy = guarded(backend, bonus, *parents) if ctx.needs_input_grad[1] else None
        return guarded(backend, slope, *parents), grad_entropy, *[None] * (7 + len(rows))


class GivenPolicyLoss(torch.autograd.Function):
    """Loss (0-d) of log-probs and entropy through `portable`; gradients are made in forward, of the same terms."""

    @staticmethod
    def forward(
        ctx: Any,
        log_probs: Tensor,
        entropy: Tensor | None,
        how: How,
        wanted: tuple[bool, bool],
        reported: bool,
        given: list[Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        """See `egpo_kernels.engine.given_ops.given_policy_loss`; ``wanted`` are gradients by log-probs and entropy."""
        loss, vector, *gradients = given_ops.given_policy_loss(log_probs, entropy, given, *how, *wanted, reported)
        # Not the loss, which leads to both as well: callers divide it in place.
        ctx.save_for_backward(log_probs, entropy, *gradients)
        ctx.mark_non_differentiable(vector)
        return loss, vector

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        """Gradients with respect to log_probs and entropy."""
        log_probs, entropy, slope, bonus, live = ctx.saved_tensors
        made = [slope, bonus] if ctx.needs_input_grad[1] else [slope]
        made = given_ops.scaled_gradients(made, live, upstream.detach())
        found = [guarded("portable", gradient, log_probs, entropy, upstream) for gradient in made]
        return *found, *[None] * (6 - len(found))


class LogitsPolicyLoss(torch.autograd.Function):
    """Loss of logits whose gradient is made in forward, expecting ``grad_scale`` from upstream."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        how: How,
        scalars: list[float],
        options: tuple[bool, bool, bool, str],
        *given: Any,
    ) -> tuple[Tensor, Tensor]:
        """See `egpo_kernels.engine.ops.logits_policy_loss`; ``options`` are whether the gradient is written over the
        logits, and its last arguments. ``given`` are tensors, or a list of them.
        """
        tensors = given[0] if isinstance(given[0], list) else list(given)
        inplace, *others = options
        arguments = (tensors, *how, scalars, *others)
        if inplace:
            gradient = logits.detach()
            loss, vector = ops.logits_policy_loss_(gradient, *arguments)
        else:
            loss, vector, gradient = ops.logits_policy_loss(logits, *arguments)
        ctx.options = (scalars[1], inplace, options[-1], len(given))
        # An attribute can be given away in backward; a saved tensor cannot, and leaf logits would get a copy of it.
        if is_compiling():
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(loss)  # which leads to the logits, for `guarded`, and keeps none of them
            ctx.gradients = [gradient]
        ctx.mark_non_differentiable(vector)
        ctx.set_materialize_grads(False)  # of the vector they would be zeros, a launch
        return loss, vector

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> Any:
        """Gradient with respect to the logits only."""
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_scale, inplace, backend, num_given = ctx.options
        if is_compiling():
            (gradient,) = ctx.saved_tensors
            gradient = (gradient * (upstream / grad_scale)).to(gradient.dtype)
        else:
            (gradient,) = take_gradients(ctx, inplace)
            ops.rescale_(gradient, upstream.detach() if upstream.requires_grad else upstream, grad_scale, backend)
        return guarded(backend, gradient, *parents_of(ctx, upstream)), *[None] * (3 + num_given)


def parents_of(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
    """The loss, which leads to all that it was made of, and the upstream gradient: `guarded` needs them if anything."""
    return (*ctx.saved_tensors, upstream) if torch.is_grad_enabled() and not is_compiling() else ()


def take_gradients(ctx: Any, inplace: bool = False) -> list[Tensor]:
    """Hand ``ctx.gradients`` out: themselves the last time, copies where the graph is kept for another backward."""
    gradients = ctx.gradients
    if gradients is None:
        raise RuntimeError(CONSUMED)
    if graph_is_kept() and not inplace:
        return [gradient.clone() for gradient in gradients]
    ctx.gradients = None
    return gradients


def graph_is_kept() -> bool:
    """Whether the backward that is running leaves the graph for another."""
    return _KEEPS is not None and _KEEPS()


# Not public; where a torch lacks it, a second backward fails with CONSUMED instead of getting a copy.
_KEEPS = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
