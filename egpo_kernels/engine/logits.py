"""Logits as what a loss is computed from."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from egpo_kernels import reference
from egpo_kernels.config.fields import check_bool
from egpo_kernels.config.results import Rows, TokenLogProbs
from egpo_kernels.config.settings import PolicyLossConfig
from egpo_kernels.engine import autograd, losses, ops
from egpo_kernels.engine.rows import Unmade
from egpo_kernels.inputs import layout as layouts
from egpo_kernels.inputs.validation import check_logits, check_not_overlapping, check_rows


class Logits(NamedTuple):
    """Logits ``[B, T, V]``, undivided by the temperature, and whether their gradient goes where they lie."""

    tensor: Tensor
    inplace: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.tensor.dtype

    @property
    def vocab(self) -> int:
        """Vocabulary size."""
        return self.tensor.shape[-1]

    @property
    def requires_grad(self) -> bool:
        """Whether they are differentiated."""
        return self.tensor.requires_grad

    def log_probs(
        self, call: losses.Call, rows: Rows, want_entropy: bool, entropy_gradient: bool = False
    ) -> TokenLogProbs:
        """See `egpo_kernels.engine.losses.Source`; a gradient through the entropy costs nothing more here."""
        if call.backend == "reference":
            check_rows(rows, self.vocab)
            log_probs, entropy = reference.token_log_probs(self.tensor, rows, call.temperature)
        elif autograd.looks_at(self.tensor):
            log_probs, entropy = autograd.TokenLogProbs.apply(
                self.tensor, call.temperature, want_entropy, self.inplace, call.backend, *rows
            )
        else:
            options = (call.temperature, want_entropy, call.backend)
            log_probs, entropy = [*ops.token_scores(self.tensor, list(rows), *options), None][:2]
        return TokenLogProbs(log_probs, entropy if want_entropy else None)

    def loss(
        self,
        call: losses.Call,
        unmade: Unmade,
        config: PolicyLossConfig,
        scale: float,
        want_entropy: bool,
        reported: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `egpo_kernels.engine.losses.Source`."""
        given = unmade.tensors()
        return autograd.LogitsPolicyLoss.apply(
            self.tensor,
            unmade.how(),
            [call.temperature, scale],
            (self.inplace, want_entropy, reported, call.backend),
            # A list is one argument, which costs the host less; a compiler must see what is in it.
            *(given if is_compiling() else [given]),
        )


def read_logits(
    logits: Any,
    tokens: Any,
    mask: Any,
    cu_seqlens: Any,
    temperature: Any,
    inplace_grad: Any,
    backend: str,
    one_sequence: bool = False,
) -> losses.Call:
    """Check logits, tokens, mask and temperature."""
    packed = cu_seqlens is not None or one_sequence
    logits = check_logits("logits", logits, packed)
    shape = tuple(logits.shape[:-1])
    if one_sequence:
        layout = layouts.one_sequence(shape, logits.device)
    else:
        layout = layouts.make_layout("logits", shape, cu_seqlens, logits.device)
    source = Logits(logits.unsqueeze(0) if packed else logits, check_bool("inplace_grad", inplace_grad))
    call = losses.read_tokens(source, layout, tokens, mask, temperature, backend)
    if source.inplace:
        if call.backend == "reference":
            raise ValueError("inplace_grad is True with backend 'reference'; it must be False there")
        check_not_overlapping(source.tensor)
    return call
