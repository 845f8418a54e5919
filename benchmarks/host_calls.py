"""The calls whose host time is compared: ours, and the others' that do the same work."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.batches import GROUP, SEQUENCES, Batch, Case, Outputs
from benchmarks.providers import OURS, Provider, Run, answer, gathered, our_log_probs, own_providers
from benchmarks.rivals import TRL, TRL_KERNEL, TRL_LOSS, rivals, trl_kernel, trl_linear_log_probs
from benchmarks.workloads import ROLLOUTS, WORKLOADS
from egpo_kernels import egpo_loss, linear_egpo_loss, linear_token_log_probs

DTYPE, LENGTH, VOCAB, HIDDEN_SIZE = "bf16", 4, 128, 16
"""So small that torch's own arithmetic, which a GPU would do while the host goes on, takes hardly any time."""
TRL_LOGITS = f"{TRL_KERNEL} + torch loss"
BY_HAND = "advantages by hand + "


class Call(NamedTuple):
    """One of ours by its public name, on the inputs of a workload, and those who can be called for the same."""

    name: str
    workload: str
    providers: list[Provider]


def make_batch(workload: str) -> Batch:
    """The inputs of a workload, a few tokens of each sequence; groups and rewards to those of logits, too."""
    made = WORKLOADS[workload].make(Case(workload, "cpu", DTYPE, SEQUENCES * LENGTH, VOCAB, HIDDEN_SIZE))
    if WORKLOADS[workload].given != ROLLOUTS:
        places = torch.arange(SEQUENCES)
        return made._replace(groups=places // GROUP, rewards=(places % 2).float())
    cut = {name: getattr(made, name)[:, :LENGTH].detach().clone() for name in ("mask", "log_probs", "old_log_probs")}
    cut["log_probs"].requires_grad_()
    return made._replace(**cut)


def _egpo_loss(batch: Batch) -> Outputs:
    given = (batch.logits, batch.tokens, batch.groups, batch.rewards)
    return answer(egpo_loss(*given, mask=batch.mask, old_log_probs=batch.old_log_probs).loss, batch)


def _linear_egpo_loss(batch: Batch) -> Outputs:
    given = (batch.hidden, batch.weight, batch.tokens, batch.groups, batch.rewards)
    return answer(linear_egpo_loss(*given, mask=batch.mask, old_log_probs=batch.old_log_probs).loss, batch)


def _linear_log_probs(batch: Batch) -> Tensor:
    return linear_token_log_probs(batch.hidden, batch.weight, batch.tokens, mask=batch.mask).log_probs


def _differentiated(score: Callable[[Batch], Tensor]) -> Run:
    """Log-probs and the gradient of their sum."""
    return lambda batch: answer(score(batch).sum(), batch)


def _after_advantages(provider: Provider) -> Provider:
    """A loss of advantages that are made first, as users write it."""
    by_hand = _named("advantages", "eager")[0].run

    def run(batch: Batch) -> Outputs:
        return provider.run(batch._replace(advantages=by_hand(batch)["advantages"]))

    return provider._replace(name=BY_HAND + provider.name, run=run)


def _named(workload: str, *names: str) -> list[Provider]:
    known = {one.name: one for one in own_providers(workload) + rivals(workload)}
    return [known[name] for name in names]


def _log_probs(workload: str, trl: str, *scores: Callable[[Batch], Tensor]) -> list[Provider]:
    """Ours, TRL's where ``trl`` of the workload can be had, eager: by their ``scores``, in that order."""
    (theirs,) = _named(workload, trl)
    known = (Provider(OURS, OURS, theirs.run), theirs._replace(name=TRL), Provider("eager", "eager", theirs.run))
    return [one._replace(run=_differentiated(score)) for one, score in zip(known, scores, strict=True)]


def calls() -> list[Call]:
    """Every public function that computes, ours first."""
    losses = _named("logits", "Liger", TRL_LOGITS, "eager")
    linear = _named("linear", "Liger, all sequences at once", TRL_LOSS, "eager")
    return [
        Call("logits_policy_loss", "logits", _named("logits", OURS, "egpo_kernels, no metrics") + losses),
        Call("egpo_loss", "logits", [Provider(OURS, OURS, _egpo_loss), *map(_after_advantages, losses)]),
        Call(
            "token_log_probs, no gradient", "log-probs",
            _named("log-probs", "egpo_kernels (no entropy)", "Liger (no entropy)", TRL_KERNEL, "eager"),
        ),
        Call(
            "token_log_probs", "log-probs",
            _log_probs(
                "log-probs", TRL_KERNEL, lambda batch: our_log_probs(batch, entropy=False).log_probs,
                lambda batch: trl_kernel(batch)[0], lambda batch: gathered(batch.logits.float(), batch.tokens),
            ),
        ),
        Call("policy_loss", "policy-loss", _named("policy-loss", OURS, "eager")),
        Call("group_advantages", "advantages", _named("advantages", OURS, "eager")),
        Call("linear_policy_loss", "linear", _named("linear", OURS) + linear),
        Call("linear_egpo_loss", "linear", [Provider(OURS, OURS, _linear_egpo_loss), *map(_after_advantages, linear)]),
        Call(
            "linear_token_log_probs", "linear",
            _log_probs(
                "linear", TRL_LOSS, _linear_log_probs, trl_linear_log_probs,
                lambda batch: gathered((batch.hidden @ batch.weight.t()).float(), batch.tokens),
            ),
        ),
    ]  # fmt: skip
