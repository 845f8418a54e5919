"""TRL's GRPOTrainer with the advantages and the loss of a recipe (written for TRL 1.16)."""

import inspect
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from egpo_kernels.api.groups import group_advantages
from egpo_kernels.api.logits import policy_loss
from egpo_kernels.config import recipes
from egpo_kernels.config.results import SamplingSupport
from egpo_kernels.config.settings import Recipe
from egpo_kernels.formulas.metrics import combine_metrics
from egpo_kernels.integrations.transformers import fuse_policy_loss
from egpo_kernels.integrations.trl_options import adjusted, nearest_loss_type
from egpo_kernels.integrations.trl_records import (
    IDS,
    RECORDS,
    kept_metrics,
    padded,
    take_records,
    truncating,
    warn_of_truncation,
)

PAPER = {
    "title": "Know What You Know: Metacognitive Entropy Calibration for Verifiable RL Reasoning",
    "id": "2602.22751",
}
FORWARD = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters


class EGPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` with the advantages and the loss of EGPO (arXiv 2602.22751), or of another recipe.

    It takes the arguments of `trl.GRPOTrainer`. Once per generation batch it computes advantages from the rewards of
    all processes, within whole groups. The uncertainty comes from the batch's old log-probs, else the sampler's, else
    one more forward. Losses of micro-batches are divided as in TRL. TRL's own code reports TRL's metrics; this
    library's are added under ``egpo/``. Log-probs come from the model's own forward (`fuse_policy_loss`) without whole
    logits; with images or an auxiliary loss, TRL computes them.

    A ``rollout_func`` may return what its sampler kept (top-p, top-k, min-p) as ``sampling_mask_ids`` and
    ``sampling_mask_offsets``, as `support_from_lists` takes them. All log-probs, those of the reference too, and
    entropies are then over the kept sets.

    Args:
        *inputs: See `trl.GRPOTrainer`.
        recipe: A `Recipe` or its name. Options of ``args`` that are not at their default change it (``epsilon``,
            ``beta``, ``loss_type``, ``scale_rewards``, ...); the attribute ``recipe`` is the result.
        **named: See `trl.GRPOTrainer`.

    Raises:
        ValueError: An option that contradicts the recipe, or a model that cannot be fused.
    """

    _tag_names = ("trl", "egpo_kernels")

    def __init__(self, *inputs: Any, recipe: Recipe | str = recipes.EGPO, **named: Any) -> None:
        super().__init__(*inputs, **named)
        self.recipe = adjusted(recipe, self.args)
        # What the model card says.
        ours = self.recipe.advantage.weight == "inverse_uncertainty" and self.recipe.advantage.statistic == "nll"
        self._name, self._paper = self.recipe.name, PAPER if ours else {}
        self._seen: dict[str, list[tuple[tuple[str, ...], Tensor]]] = {"train": [], "eval": []}
        self._records: list[SamplingSupport] | None = None
        self._truncating = truncating(self.args)
        self._fused = not (self._is_vlm or self.aux_loss_enabled)
        self._fused_reference = False
        if self._fused:
            self._fuse(self.model)
        loss = self.recipe.loss
        self.loss_type = nearest_loss_type(loss, self.args)
        self.importance_sampling_level = "token" if loss.ratio == "token" else "sequence"
        self.epsilon_low, self.epsilon_high = loss.clip_low, loss.clip_high
        if loss.surrogate == "cispo":
            self.epsilon_high = 1 + loss.clip_high if loss.ratio_cap is None else loss.ratio_cap

    def _fuse(self, model: Any) -> None:
        fuse_policy_loss(model, logits_dtype=torch.float32 if self.args.cast_lm_head_to_fp32 else None)

    def _generate(self, prompts: Any) -> Any:
        output = super()._generate(prompts)
        _, completions, _, _, _, fields, *_ = output
        self._records = take_records(fields, completions)
        if self._records is None:
            if self._truncating and self.accelerator.is_main_process:
                warn_of_truncation(self._truncating)
            self._truncating = {}  # once
        elif not self._fused:
            raise ValueError(
                f"rollout_func returned {IDS} for a model with images or an auxiliary loss, whose log-probs TRL "
                "computes over the whole vocabulary; it must return none there: sample with top_p=1, without top_k "
                "and min_p"
            )
        return output

    def _calculate_rewards(self, *inputs: Any) -> Tensor:
        found = super()._calculate_rewards(*inputs)
        rewards = (found * self.reward_weights.to(found.device)).nansum(1)
        self._rewards = torch.where(found.isnan().all(1), torch.nan, rewards)
        return found

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        config, mask, entropy = self.recipe.advantage, _mask(output), None
        if self._records is not None:
            output[RECORDS], self._records = self._records, None
        old = output.get("old_per_token_logps", output.get("sampling_per_token_logps"))
        if config.weight != "none" and (old is None or config.statistic == "shannon"):
            wanted, rows = config.statistic == "shannon", self.args.per_device_train_batch_size
            with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                now, entropy, _ = self._log_probs(self.model, output, wanted, rows)
            old = now if old is None else old
        # NaN is a token that the sampler did not score.
        scored = None if old is None else mask * ~old.isnan()
        whole = {"old_log_probs": old, "mask": mask, "entropy": entropy, "entropy_mask": scored}
        for name, value in whole.items():
            if value is not None:
                whole[name] = self.accelerator.gather(self.accelerator.pad_across_processes(value, dim=1))
        mode, size = self._mode_and_size()
        found = group_advantages(size, self._rewards, config=config, group_size=size, **whole)
        self._seen[mode].append((tuple(found.metrics), torch.stack([*found.metrics.values()])[None]))
        if RECORDS in output:
            self._see(mode, kept_metrics(output[RECORDS], output["completion_ids"], mask))
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(found.advantages))):
            logged.pop()
        logged.extend(found.advantages.tolist())
        first = self.accelerator.process_index * len(mask)
        return output | {"advantages": found.advantages[first : first + len(mask)]}

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None,
        compute_entropy: bool = False, **named: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        if isinstance(model, tuple):  # found already: see _compute_loss
            return model
        records = named.pop(RECORDS, self._records)
        if not self._fused or (model is self.ref_model and records is None):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **named
            )
        if model is self.ref_model and not self._fused_reference:
            self._fuse(self.accelerator.unwrap_model(model))
            self._fused_reference = True
        parts = []
        size = batch_size or len(input_ids)
        for first in range(0, len(input_ids), size):
            ids, attended = input_ids[first : first + size], attention_mask[first : first + size]
            tokens, mask = ids[:, -logits_to_keep:], attended[:, -logits_to_keep:]
            policy = {
                "tokens": tokens,
                "mask": mask,
                "temperature": self.temperature,
                "return_entropy": compute_entropy,
            }
            if records is not None:
                policy["support"] = padded(records[first : first + size], logits_to_keep)
            scored = slice(-logits_to_keep - 1, -1)
            with self.accelerator.autocast():
                # FSDP2's mixed precision leaves a mapping proxy alone.
                parts.append(
                    model(ids, attention_mask=attended, logits_to_keep=scored, policy=MappingProxyType(policy))
                )
        log_probs, entropies = zip(*parts, strict=True)
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    def _log_probs(
        self, model: Any, inputs: dict[str, Any], entropy: bool = True, batch_size: int | None = None, **named: Any
    ) -> Any:
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        named |= {name: inputs[name] for name in (*FORWARD, RECORDS) if name in inputs}  # images, kept sets
        width = inputs["completion_ids"].shape[1]
        return self._get_per_token_logps_and_entropies(model, ids, mask, width, batch_size, entropy, **named)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode, _ = self._mode_and_size()
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        adapting = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        entropy_coef = 0.0 if adapting else self.entropy_coef
        found = log_probs, entropy, aux_loss = self._log_probs(model, inputs, compute_aux_loss=self.aux_loss_enabled)
        with torch.no_grad():
            super()._compute_loss(tuple(x if x is None else x.detach() for x in found), inputs)  # for its metrics
        mask, old, advantages = _mask(inputs), inputs.get("old_per_token_logps"), inputs["advantages"]
        kept, weights = mask, [inputs[name] for name in ("importance_sampling_ratio",) if name in inputs]
        if self.top_entropy_quantile < 1:
            kept = mask * self.get_high_entropy_mask(entropy.detach(), mask, 1 - self.top_entropy_quantile)
            weights.append(kept)
        if self.off_policy_mask_threshold is not None:
            sampled = inputs.get("sampling_per_token_logps", log_probs.detach() if old is None else old)
            far = self.off_policy_mask_threshold
            weights.append(self.get_off_policy_mask(advantages[:, None], log_probs, sampled, mask, far))
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if mode == "train":
            tokens = tokens * steps / self.args.steps_per_generation
        if self.loss_type == "bnpo":
            tokens = mask.sum().clamp(min=1) * steps
        loss, seen = policy_loss(
            log_probs,
            old,
            advantages,
            mask,
            ref_log_probs=inputs.get("ref_per_token_logps"),
            entropy=entropy,
            rollout_weights=math.prod(weights) if weights else None,
            config=self.recipe.loss,
            num_tokens=tokens,
            num_sequences=len(mask) * steps,
        )
        # TRL logs the loss; its parts would be those of a process, and add up over steps.
        seen = {key: value for key, value in seen.items() if not key.startswith("policy/loss/")}
        self._see(mode, seen)
        if self._entropy_bonus_enabled:
            loss = loss - entropy_coef * (entropy * kept).sum() / kept.sum().clamp(min=1) / steps
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our metrics, merged over micro-batches and processes, to TRL's; this waits for the device."""
        mode, _ = self._mode_and_size()
        seen, self._seen[mode] = self._seen[mode], []
        parts = [dict(zip(keys, row.unbind(), strict=True)) for keys, rows in seen for row in rows.cpu()]
        for key, value in combine_metrics(parts).items():
            self._metrics[mode][key if key.startswith("egpo/") else f"egpo/{key}"] = [value.item()]
        super().log(logs, start_time)

    def _see(self, mode: str, metrics: Mapping[str, Tensor]) -> None:
        """Keep a process's own metrics for the log."""
        self._seen[mode].append((tuple(metrics), self.accelerator.gather(torch.stack([*metrics.values()])[None])))

    def _mode_and_size(self) -> tuple[str, int]:
        """Whether it trains, and the members of a group then."""
        return ("train", self.num_generations) if self.model.training else ("eval", self.num_generations_eval)


def _mask(inputs: dict[str, Any]) -> Tensor:
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)
