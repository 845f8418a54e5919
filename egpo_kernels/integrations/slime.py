"""Slime: a policy loss from per-sample lists, reduced by slime, and advantages of a whole rollout."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from reprlib import repr as shown
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels.api.groups import group_advantages
from egpo_kernels.api.logits import logits_policy_loss, policy_loss
from egpo_kernels.config import recipes
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig
from egpo_kernels.inputs.validation import check_dense, check_instance
from egpo_kernels.rollouts.kept import support_from_lists


class _Samples(NamedTuple):
    """Where samples lie in ``rows`` of packed logits: their lengths, and which rows score their responses, ``[R]``."""

    rows: int
    total: list[int]
    response: list[int]
    scored: Tensor

    def joined(self, name: str, values: Sequence[Tensor], of_response: bool = True) -> Tensor:
        """One tensor of all samples'; they must be whole."""
        found, lengths = [len(each) for each in values], self.response if of_response else self.total
        if found != lengths:
            wanted = f"batch['{'response' if of_response else 'total'}_lengths'], {shown(lengths)}"
            raise ValueError(
                f"{name} has tensors of lengths {shown(found)}; they must be {wanted}: under context parallelism no "
                "rank has whole samples, start slime without it"
            )
        return torch.cat(list(values))

    def spread(self, name: str, values: Sequence[Tensor]) -> Tensor:
        """What is said of responses, at the rows that score them, 0 elsewhere."""
        flat = self.joined(name, values)
        return flat.new_zeros(self.rows).index_copy_(0, self.scored, flat)

    def targets(self, tokens: Sequence[Tensor]) -> Tensor:
        """The token that each row scores; any where there is none."""
        flat = self.joined("batch['unconcat_tokens']", tokens, of_response=False)
        return torch.nn.functional.pad(flat[1:], (0, self.rows + 1 - len(flat)))


def _samples(batch: Mapping[str, Any], logits: Tensor) -> _Samples:
    """Read lengths, on the host: the response of a sample that ends at row ``e`` is scored by those up to ``e - 1``."""
    total, response = ([int(each) for each in batch[f"{name}_lengths"]] for name in ("total", "response"))
    for number, (own, generated) in enumerate(zip(total, response, strict=True)):
        if not 0 <= generated < own:
            raise ValueError(
                f"batch['response_lengths'][{number}] is {generated}, of {own} tokens; it must be less, for the first "
                "of a response is scored by the last of its prompt"
            )
    if logits.dim() != 3 or logits.shape[0] != 1 or logits.shape[1] < sum(total):
        raise ValueError(
            f"logits has shape {list(logits.shape)}; it must be [1, T, V], with a row for each of the {sum(total)} "
            "tokens of batch['total_lengths']: under context parallelism no rank has them, start slime without it"
        )
    counts, ends = torch.tensor(response), torch.tensor(total).cumsum(0)
    first = ends - counts - 1 - (counts.cumsum(0) - counts)
    scored = first.repeat_interleave(counts) + torch.arange(sum(response))
    return _Samples(logits.shape[1], total, response, scored.to(logits.device))


def samples_policy_loss(
    log_probs: Sequence[Tensor],
    old_log_probs: Sequence[Tensor] | None,
    batch: Mapping[str, Any],
    sum_of_sample_mean: Callable[[Tensor], Tensor],
    config: PolicyLossConfig = recipes.EGPO.loss,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of a slime micro-batch, for a function named by ``--custom-loss-function-path``.

    Args:
        log_probs: Log-probs, a tensor ``[response_length]`` for each sample, floating.
        old_log_probs: Those at sampling time, a list like log_probs; None or empty: on-policy.
        batch: Slime's micro-batch, with ``advantages``, ``loss_masks`` and, for a KL, ``ref_log_probs``: lists like
            log_probs.
        sum_of_sample_mean: Slime's function that reduces a per-token vector; it replaces ``config.reduction``.
        config: Settings of the loss, without an entropy bonus.

    Returns:
        ``(loss, {"loss": loss})``, 0-d, the second detached.

    Raises:
        ValueError: A wrong length, device or value (context parallelism splits log-probs but not masks); a missing
            input.
        TypeError: A wrong type or dtype.
    """
    check_instance("config", config, PolicyLossConfig)
    if config.has_bonus:
        raise ValueError(
            f"config.entropy_coef is {config.entropy_coef}; it must be 0, as a batch has no entropies: subtract the "
            "bonus from the loss, with those of get_log_probs_and_entropy(with_entropy=True)"
        )
    ref = _reference(batch, config)
    flat = torch.cat(list(log_probs))
    per_token = policy_loss(
        flat,
        torch.cat(list(old_log_probs)) if old_log_probs else None,
        torch.cat(batch["advantages"]),
        torch.cat(batch["loss_masks"]),
        ref_log_probs=None if ref is None else torch.cat(list(ref)),
        cu_seqlens=torch.tensor([0, *accumulate(len(each) for each in log_probs)], device=flat.device),
        config=_unreduced(config),
    ).loss
    loss = sum_of_sample_mean(per_token)
    return loss, {"loss": loss.detach()}


def samples_logits_policy_loss(
    logits: Tensor,
    old_log_probs: Sequence[Tensor] | None,
    batch: Mapping[str, Any],
    sum_of_sample_mean: Callable[[Tensor], Tensor],
    config: PolicyLossConfig = recipes.EGPO.loss,
    *,
    temperature: float = 1.0,
    vocab_group: Any = None,
    vocab_size: int | None = None,
    top_p_token_ids: Sequence[Any] | None = None,
    top_p_token_offsets: Sequence[Any] | None = None,
    inplace_grad: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`samples_policy_loss` from the logits that slime hands a loss function, in place of its log-probs.

    One `logits_policy_loss` of all samples: rows that score no response are not read, and get a gradient of 0.

    Args:
        logits: ``[1, T, V]``, this rank's columns of the vocabulary, undivided by the temperature; samples one after
            another, maybe with padding behind.
        old_log_probs: Log-probs at sampling time, a tensor ``[response_length]`` for each sample; None or empty:
            on-policy.
        batch: Slime's micro-batch, with ``unconcat_tokens``, ``total_lengths`` and ``response_lengths`` beside what
            `samples_policy_loss` needs.
        sum_of_sample_mean: Slime's function that reduces a per-token vector; it replaces ``config.reduction``.
        config: Settings of the loss; an entropy bonus is possible here.
        temperature: Sampling temperature, ``args.rollout_temperature``.
        vocab_group: Megatron's tensor-parallel group; None: the vocabulary is not split.
        vocab_size: Ids of the vocabulary; columns behind them are padding. None: padded columns count, as they do in
            slime's own log-probs, old and reference ones among them.
        top_p_token_ids: With the next: what the sampler kept, from ``get_rollout_top_p_logprob_kwargs``; see
            `support_from_lists`. Log-probs are over it, as slime's then are, and the entropy, which slime's is not.
        top_p_token_offsets: Where the kept ids of each token begin.
        inplace_grad: Write the gradient over the logits; see `logits_policy_loss`.

    Returns:
        ``(loss, {"loss": loss})``, 0-d, the second detached.

    Raises:
        ValueError: A wrong length, device or value (context parallelism splits samples); a missing input.
        TypeError: A wrong type or dtype.
    """
    check_instance("config", config, PolicyLossConfig)
    ref, samples = _reference(batch, config), _samples(batch, check_dense("logits", logits, "floating"))
    bounds, support = torch.tensor([0, *accumulate(samples.total)]), None
    if top_p_token_ids is not None or top_p_token_offsets is not None:
        starts = [total - response - 1 for total, response in zip(samples.total, samples.response, strict=True)]
        kept = (list(top_p_token_ids or ()), list(top_p_token_offsets or ()))
        support = support_from_lists(*kept, starts=starts, length=samples.rows, cu_seqlens=bounds)
    per_token = logits_policy_loss(
        logits.squeeze(0),  # indexing would copy the gradient
        samples.targets(batch["unconcat_tokens"]),
        samples.spread("batch['advantages']", batch["advantages"]),
        samples.spread("batch['loss_masks']", batch["loss_masks"]),
        old_log_probs=samples.spread("old_log_probs", old_log_probs) if old_log_probs else None,
        ref_log_probs=None if ref is None else samples.spread("batch['ref_log_probs']", ref),
        cu_seqlens=bounds.to(logits.device),
        temperature=temperature,
        support=support,
        vocab_group=vocab_group,
        vocab_size=vocab_size,
        config=_unreduced(config),
        inplace_grad=inplace_grad,
        metrics="none",
    ).loss
    loss = sum_of_sample_mean(per_token[samples.scored])
    return loss, {"loss": loss.detach()}


def _unreduced(config: PolicyLossConfig) -> PolicyLossConfig:
    return dataclasses.replace(config, reduction="none", norm_length=None)


def _reference(batch: Mapping[str, Any], config: PolicyLossConfig) -> Sequence[Tensor] | None:
    """Log-probs under the reference, where the settings need them."""
    ref = batch.get("ref_log_probs") if config.kl_coef else None
    if config.kl_coef and ref is None:
        raise ValueError(
            f"batch['ref_log_probs'] is None with config.kl_coef {config.kl_coef}; it must be a list like "
            "old_log_probs: start slime with --use-kl-loss and --ref-load, or set kl_coef to 0"
        )
    return ref


def samples_advantages(
    samples: Sequence[Any], rewards: Sequence[float], config: AdvantageConfig = recipes.EGPO.advantage
) -> Tensor:
    """Advantages ``[S]`` of all samples of a rollout, float32 on the CPU.

    Args:
        samples: Slime's ``Sample`` objects with ``group_index``, ``response_length``, ``loss_mask`` (None: every token)
            and ``rollout_log_probs``.
        rewards: One for each sample.
        config: Settings of the advantages.

    Raises:
        ValueError: Samples without ``group_index``, or without ``rollout_log_probs`` if the settings need them; a wrong
            length.
        TypeError: A wrong type.
    """
    groups = [sample.group_index for sample in samples]
    if None in groups:
        raise ValueError(
            f"samples[{groups.index(None)}].group_index is None; it must be the number of its prompt: "
            "set it where your rollout function makes samples itself, as slime's data source does"
        )
    scored = [sample.rollout_log_probs for sample in samples]
    masks = [[1] * each.response_length if each.loss_mask is None else each.loss_mask for each in samples]
    return group_advantages(
        torch.tensor(groups),
        torch.tensor(rewards, dtype=torch.float32),
        None if None in scored else torch.tensor([each for row in scored for each in row], dtype=torch.float32),
        torch.tensor([each for row in masks for each in row]),
        cu_seqlens=torch.tensor([0, *accumulate(sample.response_length for sample in samples)]),
        config=config,
    ).advantages
