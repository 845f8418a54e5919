"""One call of a fused model: which loss its head makes, and how that comes out of the model again."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from egpo_kernels.config.results import LossOutput, TokenLogProbs
from egpo_kernels.inputs.validation import checks_values


class _Tie(torch.autograd.Function):
    """``value`` as it is; a gradient of it goes by ``carrier`` too, as zeros, so that hooks there run before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        ctx.shape = carrier.shape
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros(ctx.shape)


class _Through(torch.autograd.Function):
    """``value``, with a gradient by way of ``output``."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, value: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = output.shape, output.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.reshape(ctx.shape).to(ctx.dtype), None


class FusedCall:
    """What a head returns in a fused call is a small tensor in the place of logits, and the result comes from that.

    So everything around it sees a tensor: what a model does to its logits, hooks that look, and wrappers whose
    backward brings the weights back before the head's own backward needs them.
    """

    def __init__(
        self, function: Callable[..., LossOutput | TokenLogProbs], arguments: dict[str, Any], keep: Any
    ) -> None:
        self.function, self.arguments, self.keep = function, arguments, keep
        self.made: LossOutput | TokenLogProbs | None = None
        self.answer: LossOutput | TokenLogProbs | None = None
        self.shape: torch.Size | None = None

    def carrier(self, hidden: Tensor, head: dict[str, Any]) -> Tensor:
        """Make the loss of hidden states ``[B, T, H]`` and a head; return a tensor of three dimensions at least."""
        if self.made is not None:
            raise RuntimeError("the head was called twice in one forward; its loss must be made once")
        hidden = kept(hidden, self.keep)
        tokens = self.arguments["tokens"]
        if isinstance(tokens, Tensor) and tokens.dim() == 1 and hidden.dim() == 3 and hidden.shape[0] == 1:
            hidden = hidden[0]
        self.made = self.function(hidden, **head | self.arguments)
        first = self.made[0]
        carrier = first.reshape(*[1] * (2 - first.dim()), *first.shape, 1).clone()
        self.shape = carrier.shape
        return carrier

    def returned(self, output: Any) -> None:
        """Take the result from what the head returned; what others did to it on the way must be nothing.

        Raises:
            ValueError: It was changed; on a device, where that is not looked at, the result is NaN there.
        """
        assert self.made is not None
        wanted = "the head's hooks must leave it alone in a fused call: fuse_policy_loss says which they are"
        if not isinstance(output, Tensor) or output.shape != self.shape:
            raise ValueError(f"what the head returned came back as {type(output).__name__}; {wanted}")
        made = self.made[0].detach().reshape(self.shape)
        same = (output == made.to(output.dtype)) | (output.isnan() & made.isnan())
        if not torch.compiler.is_compiling() and checks_values(output.device) and not same.all():
            raise ValueError(f"what the head returned came back with other numbers; {wanted}")
        value = _Through.apply(output, torch.where(same, made, torch.nan).reshape(self.made[0].shape))
        if isinstance(self.made, LossOutput):
            self.answer = LossOutput(value, self.made.metrics)
        else:
            entropy = self.made.entropy
            self.answer = TokenLogProbs(value, None if entropy is None else _Tie.apply(entropy, output))

    def result(self) -> LossOutput | TokenLogProbs:
        """What the fused model returns."""
        if self.answer is None:
            raise RuntimeError(
                "the model's head was not called as it was fused; its forward must not be replaced afterwards: call "
                "fuse_policy_loss once more"
            )
        return self.answer


def thread() -> int:
    """Under which a head finds the call that is its thread's."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def kept(hidden: Tensor, keep: Any) -> Tensor:
    """The positions of ``hidden [B, T, H]`` that ``logits_to_keep`` names, as transformers chooses logits.

    The last so many; a slice; indices of positions, or of each row's ``[B, K]``; a bool mask ``[B, T]``, which leaves
    ``[N, H]``, packed.
    """
    if keep is None:
        return hidden
    if isinstance(keep, int):
        return hidden[:, slice(-keep, None)]
    if isinstance(keep, Tensor) and keep.dim() == 2:
        return hidden[keep] if keep.dtype == torch.bool else hidden.take_along_dim(keep.long()[..., None], dim=1)
    return hidden[:, keep]
