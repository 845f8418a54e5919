"""Other libraries' own functions for the same work, called as their users call them; imported only when asked for."""

from collections.abc import Callable

import torch

from benchmarks.machine import version
from benchmarks.providers import Provider, clipped_loss
from benchmarks.workloads import Batch, Outputs

TRL, TRL_LOSS = "TRL", "TRL log-probs + torch loss"
PACKAGES = ("liger-kernel", "trl", "quack-kernels")


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


def _liger_logits(inplace: bool) -> Callable[[Batch], Outputs]:
    def run(batch: Batch) -> Outputs:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        loss, _ = triton_grpo_loss(
            batch.logits, batch.old_log_probs[:, :-1].contiguous(), None, batch.tokens[:, :-1].contiguous(),
            batch.advantages, temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2, inplace=inplace,
            loss_type="bnpo", reduce=True,
        )  # fmt: skip
        loss.backward()
        return {"loss": loss, "gradient": batch.logits.grad}

    return run


def _liger_log_probs(batch: Batch) -> Outputs:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    found = fused_selective_log_softmax(batch.logits.detach(), batch.tokens[:, :-1].contiguous(), 1.0)
    return {"log_probs": torch.nn.functional.pad(found, (0, 1))}


def _trl_log_probs_and_entropy(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    if batch.logits.is_cuda:
        from trl.kernels import selective_log_softmax_and_entropy

        return selective_log_softmax_and_entropy(batch.logits, batch.tokens, row_mask=batch.mask)
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    with torch.no_grad():
        entropy = entropy_from_logits(batch.logits)
    return selective_log_softmax(batch.logits, batch.tokens, row_mask=batch.mask), entropy * batch.mask


def _trl_logits(batch: Batch) -> Outputs:
    log_probs, _ = _trl_log_probs_and_entropy(batch)
    loss = clipped_loss(log_probs.float(), batch)
    loss.backward()
    return {"loss": loss, "gradient": batch.logits.grad}


@torch.no_grad()
def _trl_log_probs(batch: Batch) -> Outputs:
    log_probs, entropy = _trl_log_probs_and_entropy(batch)
    return {"log_probs": log_probs, "entropy": entropy}


def _quack_cross_entropy(batch: Batch) -> Outputs:
    from quack.cross_entropy import cross_entropy_fwd

    loss, gradient = cross_entropy_fwd(
        batch.logits.detach().flatten(0, 1), batch.tokens.flatten(), return_dx=True, inplace_backward=True
    )
    return {"loss": loss.mean(), "gradient": gradient}


def rivals(workload: str) -> list[Provider]:
    """Of one workload; those that cannot run say so in their row."""
    liger, trl = _needs("liger-kernel", on_cuda=True), _needs("trl")
    return {
        "logits": [
            Provider("Liger", "Liger", _liger_logits(False), liger),
            Provider("Liger, in place", "Liger", _liger_logits(True), liger, overwrites=True),
            Provider(TRL_LOSS, "TRL", _trl_logits, trl),
            # A bar, not a rival: cross-entropy is less work, and its answer is another one.
            Provider(
                "quack cross-entropy, in place", "quack", _quack_cross_entropy,
                _needs("quack-kernels", on_cuda=True, hopper=True), overwrites=True, outputs=(),
            ),
        ],
        "log-probs": [
            Provider("Liger (no entropy)", "Liger", _liger_log_probs, liger, outputs=("log_probs",)),
            Provider(TRL, "TRL", _trl_log_probs, trl),
        ],
    }.get(workload, [])  # fmt: skip
