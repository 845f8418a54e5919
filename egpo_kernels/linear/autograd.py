"""Autograd Functions of `egpo_kernels.linear`: which gradients are made with the values, and which in backward."""

from typing import Any

import torch
from torch import Tensor

from egpo_kernels.engine.autograd import graph_is_kept, guarded, no_gradients, parents_of, take_gradients
from egpo_kernels.engine.ops import rescale_
from egpo_kernels.engine.row_ops import How
from egpo_kernels.linear import ops
from egpo_kernels.linear.passes import coefficients


class TokenLogProbs(torch.autograd.Function):
    """Log-prob and entropy of each row.

    With a frozen head ``dl/dhidden`` is made together with them, and its rows are scaled in backward; else, and for a
    gradient through the entropy, the logits are made once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scalars: tuple[float, ...],
        sizes: tuple[int | None, ...],
        want_entropy: bool,
        with_gradient: bool,
        wanted: tuple[bool, ...],
        backend: str,
        host_mask: Tensor | None,
        *rows: Any,
    ) -> tuple[Tensor, ...]:
        """See `egpo_kernels.linear.ops.linear_row_statistics`."""
        head = [weight, bias, lora_a, lora_b]
        log_probs, entropy, maximum, sum_exp, gradient, status = ops.linear_row_statistics(
            hidden, head, list(rows), host_mask, list(scalars), *sizes, want_entropy, with_gradient, backend
        )
        ctx.options = (sizes, scalars, want_entropy, with_gradient, wanted, backend)
        ctx.sharded = bool(status.shape[0])
        saved = [hidden, *head, host_mask, entropy, maximum, sum_exp, log_probs if ctx.sharded else None]
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*saved, gradient, *rows)
        else:
            ctx.save_for_backward(*saved, None, *rows)
            ctx.gradients = [gradient]
        ctx.set_materialize_grads(False)
        if not ctx.sharded:
            return log_probs, entropy
        ctx.mark_non_differentiable(status)
        return log_probs, entropy, status

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> Any:
        """Gradients of hidden states and head."""
        sizes, scalars, want_entropy, with_gradient, wanted, backend = ctx.options
        hidden, *others = ctx.saved_tensors
        head, (host_mask, entropy, maximum, sum_exp, log_probs, gradient), rows = others[:4], others[4:10], others[10:]
        if not want_entropy:
            grad_entropy = None
        given = (grad_log_probs, grad_entropy)
        if grad_log_probs is None:
            grad_log_probs = hidden.new_zeros(rows[0].numel(), dtype=entropy.dtype)
        with no_gradients():
            if with_gradient and grad_entropy is None:
                if gradient is None:
                    (gradient,) = take_gradients(ctx)
                factor = grad_log_probs / coefficients(grad_log_probs.shape[0], grad_log_probs)
                gradients = [_times_rows(gradient, factor), *[None] * 4]
            else:
                if not torch.compiler.is_compiling() and not graph_is_kept():
                    ctx.gradients = None
                if log_probs is not None:
                    # Nothing comes from a token whose logit is -inf, which may lie in another rank's columns.
                    rows[0] = rows[0] & (log_probs != -torch.inf).view(rows[0].shape)
                upstream = [grad_log_probs.contiguous(), None if grad_entropy is None else grad_entropy.contiguous()]
                gradients = ops.linear_gradient(
                    hidden, head, rows, host_mask, list(scalars), *sizes, [maximum, sum_exp, entropy], upstream,
                    list(wanted), backend,
                )  # fmt: skip
        parents = (hidden, *head, *given)
        return *_answers(backend, gradients, wanted, parents), *[None] * (7 + len(rows))


def _times_rows(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient [B, T, H]`` times ``factor [N]``, exactly 0 where that is 0; in place but under a compiler."""
    column = factor.view(*gradient.shape[:2], 1)
    if torch.compiler.is_compiling():
        return torch.where(column == 0, 0.0, gradient * column).to(gradient.dtype)
    return gradient.mul_(column).masked_fill_(column == 0, 0.0)


def _answers(backend: str, gradients: Any, wanted: tuple[bool, ...], parents: tuple[Tensor | None, ...]) -> Any:
    return tuple(
        guarded(backend, gradient, *parents) if asked else None
        for gradient, asked in zip(gradients, wanted, strict=True)
    )


class PolicyLoss(torch.autograd.Function):
    """Loss whose gradients are made in forward, expecting ``grad_scale`` from upstream."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scalars: tuple[float, ...],
        sizes: tuple[int | None, ...],
        how: How,
        grad_scale: float,
        want_entropy: bool,
        reported: bool,
        wanted: tuple[bool, ...],
        backend: str,
        *fields: Any,
    ) -> tuple[Tensor, ...]:
        """See `egpo_kernels.linear.ops.linear_policy_loss`.

        ``fields``: the host's mask, what rows are made of.
        """
        host_mask, *given = fields
        loss, vector, *gradients, status = ops.linear_policy_loss(
            hidden, [weight, bias, lora_a, lora_b], given, *how, host_mask, list(scalars), *sizes, grad_scale,
            want_entropy, reported, list(wanted), backend,
        )  # fmt: skip
        ctx.options = (grad_scale, wanted, backend, len(fields))
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(loss)  # which leads to all of them, for `guarded`, and keeps none
            ctx.gradients = gradients
        ctx.set_materialize_grads(False)  # of the vector they would be zeros, a launch
        if not status.shape[0]:
            ctx.mark_non_differentiable(vector)
            return loss, vector
        ctx.mark_non_differentiable(vector, status)
        return loss, vector, status

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> Any:
        """Gradients of hidden states and head."""
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_scale, wanted, backend, num_fields = ctx.options
        if torch.compiler.is_compiling():
            gradients = [(gradient * (upstream / grad_scale)).to(gradient.dtype) for gradient in ctx.saved_tensors]
        else:
            gradients = take_gradients(ctx)
            for gradient in gradients:
                rescale_(gradient, upstream.detach(), grad_scale, backend)
        return *_answers(backend, gradients, wanted, parents_of(ctx, upstream)), *[None] * (8 + num_fields)
