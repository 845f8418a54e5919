"""What is compared: ours, what users write by hand, and that under torch.compile. Rivals' own kernels: `rivals.py`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.batches import GROUP, Batch, Outputs
from egpo_kernels import (
    TokenLogProbs,
    group_advantages,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    token_log_probs,
)

OURS = "egpo_kernels"
WITHOUT_METRICS = "egpo_kernels, no metrics"
NATIVE = "eager, in the logits' dtype"
GEMMS = "bare GEMMs"
CHUNKS = {64: "cpu", 32: "cpu", 256: "cuda"}
"""MiB, beside the default, and where: a GPU's default is a share of its memory, and 64 MiB are too few rows for one."""
Run = Callable[[Batch], Outputs]


class Provider(NamedTuple):
    """One way to do a workload. `family` gives it its colour."""

    name: str
    family: str
    run: Run
    unavailable: Callable[[str], str | None] = lambda device: None
    """Why it cannot run on this device, None where it can."""
    overwrites: bool = False
    """Whether it leaves its gradient in the memory of the logits."""
    prepare: Callable[[], Run] | None = None
    """Makes `run` anew for each case."""
    outputs: tuple[str, ...] | None = None
    """What of the workload's answer it computes; None: all of it."""


def clipped_loss(log_probs: Tensor, batch: Batch) -> Tensor:
    """Token mean of the clipped surrogate, as users write it."""
    ratio = (log_probs - batch.old_log_probs).exp()
    advantages = batch.advantages[:, None]
    losses = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (losses * batch.mask).sum() / batch.mask.sum()


def answer(loss: Tensor, batch: Batch) -> Outputs:
    """The loss, and the gradients of what is differentiated."""
    loss.backward()
    return {"loss": loss} | {name: leaf.grad for name, leaf in batch.leaves.items()}


def gathered(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probs of the tokens, as users write it."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _by_hand(logits: Tensor, batch: Batch) -> Tensor:
    return clipped_loss(gathered(logits.float(), batch.tokens), batch)


def eager_logits(batch: Batch) -> Outputs:
    """log_softmax, gather and the clipped loss; float32 where autocast would make it so."""
    return answer(_by_hand(batch.logits, batch), batch)


def native_logits(batch: Batch) -> Outputs:
    """As `eager_logits`, with log_softmax in the dtype of the logits: less accurate, less memory."""
    return answer(clipped_loss(gathered(batch.logits, batch.tokens).float(), batch), batch)


def eager_logits_and_entropy(batch: Batch) -> Outputs:
    """As `eager_logits`, and the mean entropy that trainers log and ours reports."""
    found = eager_logits(batch)
    with torch.no_grad():
        log_probs = batch.logits.float().log_softmax(-1)
        (log_probs.exp() * log_probs).sum(-1).mean()
    return found


def our_loss(batch: Batch, **options) -> Tensor:
    """`logits_policy_loss`."""
    given = (batch.logits, batch.tokens, batch.advantages, batch.mask)
    return logits_policy_loss(*given, old_log_probs=batch.old_log_probs, **options).loss


def ours_logits(**options) -> Run:
    """`our_loss` and its gradient."""
    return lambda batch: answer(our_loss(batch, **options), batch)


def _linear_by_hand(hidden: Tensor, batch: Batch) -> Tensor:
    return _by_hand(hidden @ batch.weight.t(), batch)


def _kept_by_hand(hidden: Tensor, batch: Batch) -> Tensor:
    logits = hidden @ batch.weight.t()
    return _by_hand(logits.masked_fill(batch.left_out.view(logits.shape), -torch.inf), batch)


def eager_kept(batch: Batch) -> Outputs:
    """As `eager_linear`, with logits outside the kept sets filled with -inf first: slime's way, and SkyRL's."""
    return answer(_kept_by_hand(batch.hidden, batch), batch)


def eager_linear(batch: Batch) -> Outputs:
    """As `eager_logits`, of hidden states times the head."""
    return answer(_linear_by_hand(batch.hidden, batch), batch)


def _ours_linear(**options) -> Run:
    def run(batch: Batch) -> Outputs:
        loss, _ = linear_policy_loss(
            batch.hidden, batch.weight, batch.tokens, batch.advantages, batch.mask,
            **{"old_log_probs": batch.old_log_probs, "support": batch.support, **options},
        )  # fmt: skip
        return answer(loss, batch)

    return run


def _ours_in_chunks(size: int, where: str) -> Provider:
    def unavailable(device: str) -> str | None:
        return None if device == where else "a size for a GPU" if where == "cuda" else "a size for a CPU"

    name = f"egpo_kernels, chunks of {size} MiB"
    return Provider(name, OURS, _ours_linear(max_chunk_bytes=size << 20), unavailable)


def bare_gemms() -> Run:
    """The products that no implementation can do without, of whole matrices, into memory that is there: no loss."""
    made: list[Tensor] = []

    def run(batch: Batch) -> Outputs:
        hidden, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
        if not made:
            made.extend((hidden.new_empty(len(hidden), len(weight)), torch.empty_like(hidden)))
            made.extend([torch.empty_like(weight)] if batch.weight.requires_grad else [])
        logits, *gradients = made
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=gradients[0])
        if len(gradients) == 2:
            torch.mm(logits.t(), hidden, out=gradients[1])
        return {}

    return run


def _log_probs_by_hand(batch: Batch, dtype: torch.dtype | None = torch.float32) -> Outputs:
    log_probs = batch.logits.log_softmax(-1, dtype=dtype)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    chosen = log_probs.gather(-1, batch.tokens[..., None])[..., 0]
    return {"log_probs": chosen * batch.mask, "entropy": entropy * batch.mask}


def _only_log_probs_by_hand(batch: Batch) -> Outputs:
    return {"log_probs": gathered(batch.logits.float(), batch.tokens) * batch.mask}


def our_log_probs(batch: Batch, entropy: bool, **options) -> TokenLogProbs:
    """`token_log_probs`."""
    return token_log_probs(batch.logits, batch.tokens, mask=batch.mask, return_entropy=entropy, **options)


def ours_log_probs(entropy: bool, **options) -> Run:
    """The values of `our_log_probs`."""

    @torch.no_grad()
    def run(batch: Batch) -> Outputs:
        found = our_log_probs(batch, entropy, **options)
        return found._asdict() if entropy else {"log_probs": found.log_probs}

    return run


def _advantages_by_hand(batch: Batch) -> Outputs:
    """EGPO's advantages in whole tensors, for groups of consecutive equal size as the batch has them."""
    counted = batch.mask.sum(-1)
    uncertainty = -(batch.old_log_probs * batch.mask).sum(-1) / counted
    mean = uncertainty.clamp(min=0).view(-1, GROUP).mean(-1).repeat_interleave(GROUP)
    weight = mean / (uncertainty.clamp(min=0) + 1e-5)
    correct = batch.rewards > 0.5
    weight = torch.where(correct, weight.clamp(1, 2), weight.clamp(0.8, 1))
    grouped = batch.rewards.view(-1, GROUP)
    base = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 1e-6)
    collapsed = grouped.amax(-1) - grouped.amin(-1) <= 1e-6
    alike = torch.where(correct.view(-1, GROUP).any(-1), 0.0, -1.0)
    base = torch.where(collapsed[:, None], alike[:, None], base)
    return {"advantages": base.view(-1) * weight}


def ours_advantages(**options) -> Run:
    """`group_advantages`."""

    def run(batch: Batch) -> Outputs:
        given = (batch.groups, batch.rewards, batch.old_log_probs, batch.mask)
        return {"advantages": group_advantages(*given, **options).advantages}

    return run


def ours_policy_loss(**options) -> Run:
    """`policy_loss` and its gradient."""

    def run(batch: Batch) -> Outputs:
        given = (batch.log_probs, batch.old_log_probs, batch.advantages, batch.mask)
        return answer(policy_loss(*given, **options).loss, batch)

    return run


def eager_policy_loss(batch: Batch) -> Outputs:
    """The clipped loss of log-probs."""
    return answer(clipped_loss(batch.log_probs, batch), batch)


def _compiled_loss(by_hand: Callable[[Tensor, Batch], Tensor], of: str) -> Callable[[], Run]:
    def prepare() -> Run:
        compiled = torch.compile(by_hand, dynamic=False)
        return lambda batch: answer(compiled(getattr(batch, of), batch), batch)

    return prepare


def _compiled(function: Run) -> Callable[[], Run]:
    return lambda: torch.no_grad()(torch.compile(function, dynamic=False))


def own_providers(workload: str) -> list[Provider]:
    """Ours first, then by hand."""
    linear = [
        Provider(OURS, OURS, _ours_linear()),
        *(_ours_in_chunks(size, device) for size, device in CHUNKS.items()),
        Provider("eager", "eager", eager_linear),
        Provider("torch.compile", "torch.compile", eager_linear, prepare=_compiled_loss(_linear_by_hand, "hidden")),
        # A bar, not a rival.
        Provider(GEMMS, GEMMS, bare_gemms(), prepare=bare_gemms, outputs=()),
    ]
    return {
        "linear": linear,
        "linear-frozen": linear,
        "linear-support": [
            Provider(OURS, OURS, _ours_linear()),
            # What it takes without the record; its answer is another one.
            Provider("egpo_kernels, whole vocabulary", OURS, _ours_linear(support=None), outputs=()),
            Provider("eager", "eager", eager_kept),
            Provider("torch.compile", "torch.compile", eager_kept, prepare=_compiled_loss(_kept_by_hand, "hidden")),
            Provider(GEMMS, GEMMS, bare_gemms(), prepare=bare_gemms, outputs=()),
        ],
        "logits": [
            Provider(OURS, OURS, ours_logits()),
            Provider("egpo_kernels, in place", OURS, ours_logits(inplace_grad=True), overwrites=True),
            Provider(WITHOUT_METRICS, OURS, ours_logits(metrics="none")),
            Provider("eager", "eager", eager_logits),
            Provider("eager, with entropy", "eager", eager_logits_and_entropy),
            Provider(NATIVE, "eager", native_logits),
            Provider("torch.compile", "torch.compile", eager_logits, prepare=_compiled_loss(_by_hand, "logits")),
        ],
        "log-probs": [
            Provider(OURS, OURS, ours_log_probs(entropy=True)),
            Provider("egpo_kernels (no entropy)", OURS, ours_log_probs(entropy=False), outputs=("log_probs",)),
            Provider("eager", "eager", torch.no_grad()(_log_probs_by_hand)),
            Provider(NATIVE, "eager", torch.no_grad()(functools.partial(_log_probs_by_hand, dtype=None))),
            Provider("torch.compile", "torch.compile", _log_probs_by_hand, prepare=_compiled(_log_probs_by_hand)),
            Provider(
                "torch.compile (no entropy)",
                "torch.compile",
                _only_log_probs_by_hand,
                prepare=_compiled(_only_log_probs_by_hand),
                outputs=("log_probs",),
            ),
        ],
        "advantages": [
            Provider(OURS, OURS, ours_advantages()),
            Provider(WITHOUT_METRICS, OURS, ours_advantages(metrics="none")),
            Provider("eager", "eager", torch.no_grad()(_advantages_by_hand)),
            Provider("torch.compile", "torch.compile", _advantages_by_hand, prepare=_compiled(_advantages_by_hand)),
        ],
        "policy-loss": [
            Provider(OURS, OURS, ours_policy_loss()),
            Provider(WITHOUT_METRICS, OURS, ours_policy_loss(metrics="none")),
            Provider("eager", "eager", eager_policy_loss),
            Provider(
                "torch.compile", "torch.compile", eager_policy_loss, prepare=_compiled_loss(clipped_loss, "log_probs")
            ),
        ],
    }[workload]
