"""Other libraries' own functions for the same work, called as their users call them; imported only when asked for."""

import functools
from collections.abc import Callable

import torch

from benchmarks.batches import SEQUENCES, Batch, Outputs
from benchmarks.providers import Provider, Run, answer, clipped_loss
from egpo_kernels.command.info import version

TRL, TRL_LOSS = "TRL", "TRL log-probs + torch loss"
TRL_KERNEL = "TRL's kernel"
LIGER_CE = "Liger cross-entropy + torch loss"
CCE, CCE_PACKAGE = "cut-cross-entropy + torch loss", "cut-cross-entropy"
PACKAGES = ("liger-kernel", "trl", "quack-kernels", CCE_PACKAGE)
TRL_CHUNK = 32768
"""Tokens of the vocabulary in a tile of TRL's head, as its trainers have it."""


def _needs(package: str, on_cuda: bool = False, hopper: bool = False) -> Callable[[str], str | None]:
    """Why a rival cannot run: not installed, or made for another device."""

    def unavailable(device: str) -> str | None:
        if version(package) is None:
            return f"{package} is not installed"
        if on_cuda and device != "cuda":
            return "needs a CUDA device"
        if hopper and torch.cuda.get_device_capability()[0] < 9:
            return "needs an NVIDIA Hopper or newer"
        return None

    return unavailable


def liger_loss(batch: Batch, **options) -> torch.Tensor:
    """Liger's loss of logits, which expects those of a whole sequence: the last score nothing."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    old, tokens = (field[:, :-1].contiguous() for field in (batch.old_log_probs, batch.tokens))
    plain = {"temperature": 1.0, "beta": 0.0, "reduce": True}
    return triton_grpo_loss(batch.logits, old, None, tokens, batch.advantages, **plain, **options)[0]


def _liger_logits(inplace: bool) -> Run:
    options = {"eps_low": 0.2, "eps_high": 0.2, "loss_type": "bnpo", "inplace": inplace}
    return lambda batch: answer(liger_loss(batch, **options), batch)


def _liger_linear(sequences: int) -> Run:
    def run(batch: Batch) -> Outputs:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        # What it can compile is the loss of log-probs that are there; it would be compiled for every call.
        fused = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=False, use_ref_model=False, chunk_size=sequences, epsilon_low=0.2, epsilon_high=0.2,
            loss_type="bnpo",
        )  # fmt: skip
        loss, _ = fused(
            batch.hidden, batch.weight, batch.tokens, batch.mask, batch.advantages,
            old_per_token_logps=batch.old_log_probs,
        )  # fmt: skip
        return answer(loss, batch)

    return run


def _on_negative_log_probs(score: Callable[[torch.Tensor, Batch, torch.Tensor], torch.Tensor]) -> Run:
    """A cross-entropy of each token, told which do not count, and the torch loss of it."""

    def run(batch: Batch) -> Outputs:
        targets = batch.tokens.masked_fill(~batch.mask, -100).flatten()
        log_probs = -score(batch.hidden.flatten(0, 1), batch, targets).view(batch.mask.shape)
        return answer(clipped_loss(log_probs.float(), batch), batch)

    return run


def _liger_cross_entropy(hidden: torch.Tensor, batch: Batch, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, batch.weight, targets)


def _cut_cross_entropy(implementation: str) -> Run:
    def score(hidden: torch.Tensor, batch: Batch, targets: torch.Tensor) -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, batch.weight, targets, reduction="none", impl=implementation)

    return _on_negative_log_probs(score)


def trl_linear_log_probs(batch: Batch, outputs: tuple[str, ...] = ()) -> torch.Tensor:
    """Log-probs of hidden states times the head; the ``outputs`` beside them are made and dropped."""
    from trl.kernels import ChunkedLogProbFunction

    hidden, tokens = batch.hidden.flatten(0, 1), batch.tokens.flatten()
    found = ChunkedLogProbFunction.apply(hidden, batch.weight, None, tokens, 1.0, TRL_CHUNK, None, 1.0, outputs)
    return found[0].view(batch.mask.shape)


def _trl_linear(outputs: tuple[str, ...]) -> Run:
    return lambda batch: answer(clipped_loss(trl_linear_log_probs(batch, outputs), batch), batch)


def liger_log_probs(batch: Batch) -> Outputs:
    """Liger's log-probs of logits, of which it too expects those of a whole sequence."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    found = fused_selective_log_softmax(batch.logits.detach(), batch.tokens[:, :-1].contiguous(), 1.0)
    return {"log_probs": torch.nn.functional.pad(found, (0, 1))}


def _trl_in_torch(device: str) -> str | None:
    """Its torch operations cannot be had where its kernel runs, which has no way to leave the entropy out."""
    return "takes its kernel on a CUDA device" if device == "cuda" else _needs("trl")(device)


Scored = tuple[torch.Tensor, torch.Tensor | None]


def _trl_scores(batch: Batch) -> Scored:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(batch.logits, batch.tokens, False, row_mask=batch.mask)


def _trl_chosen(batch: Batch) -> Scored:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(batch.logits, batch.tokens, row_mask=batch.mask), None


def trl_kernel(batch: Batch) -> Scored:
    """Log-probs and entropy by the kernel."""
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(batch.logits, batch.tokens, row_mask=batch.mask)


def _trl_logits(score: Callable[[Batch], Scored]) -> Run:
    return lambda batch: answer(clipped_loss(score(batch)[0].float(), batch), batch)


def _trl_log_probs(score: Callable[[Batch], Scored]) -> Run:
    @torch.no_grad()
    def run(batch: Batch) -> Outputs:
        log_probs, entropy = score(batch)
        return {"log_probs": log_probs} | ({} if entropy is None else {"entropy": entropy})

    return run


def _quack_cross_entropy(batch: Batch) -> Outputs:
    from quack.cross_entropy import cross_entropy_fwd

    loss, gradient = cross_entropy_fwd(
        batch.logits.detach().flatten(0, 1), batch.tokens.flatten(), return_dx=True, inplace_backward=True
    )
    return {"loss": loss.mean(), "gradient": gradient}


def rivals(workload: str) -> list[Provider]:
    """Of one workload; those that cannot run say so in their row."""
    liger, trl, on_cuda = _needs("liger-kernel", on_cuda=True), _needs("trl"), _needs("trl", on_cuda=True)
    by_compiler = functools.partial(_cut_cross_entropy, "torch_compile")
    linear = [
        Provider("Liger", "Liger", _liger_linear(1), _needs("liger-kernel")),
        Provider("Liger, all sequences at once", "Liger", _liger_linear(SEQUENCES), _needs("liger-kernel")),
        # A kernel on Hopper, elsewhere torch operations in chunks of 512 rows.
        Provider(LIGER_CE, "Liger", _on_negative_log_probs(_liger_cross_entropy), _needs("liger-kernel")),
        Provider(TRL_LOSS, "TRL", _trl_linear(()), trl),
        Provider("TRL, with entropy", "TRL", _trl_linear(("entropy",)), trl),
        Provider(CCE, CCE_PACKAGE, _cut_cross_entropy("cce"), _needs(CCE_PACKAGE, on_cuda=True)),
        Provider(
            f"{CCE}, torch_compile",
            CCE_PACKAGE,
            by_compiler(),
            _needs(CCE_PACKAGE),
            prepare=by_compiler,
        ),
    ]
    return {
        "linear": linear,
        "linear-frozen": linear,
        "logits": [
            Provider("Liger", "Liger", _liger_logits(False), liger),
            Provider("Liger, in place", "Liger", _liger_logits(True), liger, overwrites=True),
            Provider(TRL_LOSS, "TRL", _trl_logits(_trl_scores), _trl_in_torch),
            Provider(f"{TRL_LOSS} (no entropy)", "TRL", _trl_logits(_trl_chosen), _trl_in_torch),
            Provider(f"{TRL_KERNEL} + torch loss", "TRL", _trl_logits(trl_kernel), on_cuda),
            # A bar, not a rival: cross-entropy is less work, and its answer is another one.
            Provider(
                "quack cross-entropy, in place", "quack", _quack_cross_entropy,
                _needs("quack-kernels", on_cuda=True, hopper=True), overwrites=True, outputs=(),
            ),
        ],
        "log-probs": [
            Provider("Liger (no entropy)", "Liger", liger_log_probs, liger, outputs=("log_probs",)),
            Provider(TRL, "TRL", _trl_log_probs(_trl_scores), _trl_in_torch),
            Provider(
                f"{TRL} (no entropy)", "TRL", _trl_log_probs(_trl_chosen), _trl_in_torch, outputs=("log_probs",)
            ),
            Provider(TRL_KERNEL, "TRL", _trl_log_probs(trl_kernel), on_cuda),
        ],
    }.get(workload, [])  # fmt: skip
