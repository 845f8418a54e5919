"""TRL 1.16.0: `GRPOTrainer` with a `GRPOConfig`."""

from tests.parity.facts import Difference, Facts, Option, Same

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LEVELLED = ("grpo", "bnpo", "dr_grpo", "dapo")
WEIGHTS = (
    "rollout_weights=rollout_weights(old_log_probs, sampler_log_probs, mask, level={}, outside={}, bounds=(0.5, 2.0))"
)
LIMITS = "vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=2.0"

TRL = Facts(
    trainer="TRL 1.16.0",
    options=(
        Option("`loss_type`", "`surrogate`, `reduction`: see the table of losses"),
        Option("`importance_sampling_level`", '`ratio`: `"token"` or `"sequence"`'),
        Option("`epsilon`, `epsilon_high`", "`clip_low`, `clip_high`; with cispo the second is `ratio_cap`"),
        Option("`delta`", "`dual_clip`"),
        Option("`beta`", '`kl_coef`, with `kl="k3"`'),
        Option("`use_bias_correction_kl` (default true)", "`kl_times_ratio` (default false)"),
        Option("`entropy_coef`", "`entropy_coef`"),
        Option("`sapo_temperature_pos`, `sapo_temperature_neg`", "`tau_positive`, `tau_negative`"),
        Option("`scale_rewards`", '`scale`: `"group_std"`, `"batch_std"` or `"none"`, with `std_eps=1e-4`'),
        Option("`num_generations`", "`groups`: that number, for whole groups of the global batch; also `group_size`"),
        Option("`max_completion_length` of `dr_grpo`", "`norm_length`"),
        Option("`temperature`", "`temperature`: pass logits undivided"),
        Option("`mask_truncated_completions`", "`mask`: 0 on responses that were cut off"),
        Option(
            "`top_entropy_quantile`",
            "`top_entropy_mask(entropy, mask, fraction=...)`, times `rollout_weights` without its NaN",
        ),
        Option(
            "`off_policy_mask_threshold`",
            "`off_policy_mask(..., threshold=...)`, times `rollout_weights` without its NaN",
        ),
        Option("`vllm_importance_sampling_mode`", '`rollout_weights`: `level` and `outside` (`"clamp"` or `"mask"`)'),
        Option("`vllm_importance_sampling_clip_min`, `vllm_importance_sampling_clip_max`", "`bounds`"),
        Option("`gradient_accumulation_steps`", "`num_tokens`, `num_sequences`: the counts of the whole step"),
    ),
    losses=(
        Same('loss_type="grpo"', 'reduction="seq_mean_token_mean"'),
        Same('loss_type="bnpo"', 'reduction="token_mean"'),
        Same('loss_type="dr_grpo", max_completion_length=32', 'reduction="seq_mean_token_sum_norm", norm_length=32.0'),
        Same(
            'loss_type="dapo", gradient_accumulation_steps=2, steps_per_generation=4',
            'reduction="token_mean", num_tokens=num_items_in_batch / num_processes * 2 / 4',
        ),
        Same(
            'loss_type="cispo", epsilon_high=2.0',
            'surrogate="cispo", clip_low=1.0, ratio_cap=2.0, reduction="token_mean", '
            "num_tokens=num_items_in_batch / num_processes",
        ),
        Same('loss_type="sapo"', 'surrogate="sapo", reduction="seq_mean_token_mean"'),
        Same(
            'loss_type="luspo", importance_sampling_level="sequence"',
            'ratio="sequence", reduction="seq_mean_token_sum"',
        ),
    ),
    modifiers=(
        Same("old_per_token_logps=None", "old_log_probs=None"),
        Same('importance_sampling_level="sequence"', 'ratio="sequence"', LEVELLED),
        Same("epsilon=0.1, epsilon_high=0.28", "clip_low=0.1, clip_high=0.28", CLIPPED),
        Same("delta=1.5", "dual_clip=1.5", CLIPPED),
        Same("sapo_temperature_pos=2.0, sapo_temperature_neg=3.0", "tau_positive=2.0, tau_negative=3.0", ("sapo",)),
        Same("beta=0.1, use_bias_correction_kl=False", "kl_coef=0.1"),
        Same("beta=0.1", "kl_coef=0.1, kl_times_ratio=True"),
        Same(
            'beta=0.1, importance_sampling_level="sequence"',
            'kl_coef=0.1, kl_times_ratio=True, ratio="sequence"',
            LEVELLED,
        ),
        Same("beta=0.1, old_per_token_logps=None", "kl_coef=0.1, kl_times_ratio=True, old_log_probs=None"),
        Same("entropy_coef=0.1", "entropy_coef=0.1", ("bnpo",)),
        Same("top_entropy_quantile=0.2", "rollout_weights=top_entropy_mask(entropy, mask, fraction=0.2).float()"),
        Same(
            "off_policy_mask_threshold=0.05",
            "rollout_weights=off_policy_mask(log_probs, sampler_log_probs, advantages, mask, threshold=0.05).float()",
        ),
        *(
            Same(
                f'use_vllm=True, vllm_importance_sampling_mode="{level}_{theirs}", {LIMITS}',
                WEIGHTS.format(f'"{level}"', f'"{outside}"'),
            )
            for level in ("token", "sequence")
            for theirs, outside in (("truncate", "clamp"), ("mask", "mask"))
        ),
        Same(
            "beta=0.1, top_entropy_quantile=0.5, off_policy_mask_threshold=0.05, use_vllm=True, "
            'vllm_importance_sampling_mode="token_truncate"',
            "kl_coef=0.1, kl_times_ratio=True, rollout_weights=top_entropy_mask(entropy, mask, fraction=0.5) "
            "* off_policy_mask(log_probs, sampler_log_probs, advantages, mask, threshold=0.05)[:, None] "
            '* rollout_weights(old_log_probs, sampler_log_probs, mask, level="token", bounds=(0.0, 3.0)).nan_to_num(1)',
        ),
        Same("gradient_accumulation_steps=4", "num_sequences=4 * len(mask)", ("grpo", "dr_grpo", "sapo", "luspo")),
        Same("gradient_accumulation_steps=4", "num_tokens=4 * mask.sum()", ("bnpo",)),
    ),
    advantages=(
        Same('scale_rewards="group"', 'scale="group_std", std_eps=1e-4'),
        Same('scale_rewards="batch"', 'scale="batch_std", std_eps=1e-4'),
        Same('scale_rewards="none"', 'scale="none"'),
    ),
    helpers=(
        Same(
            "get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)",
            "soft_overlong_penalty(lengths, max_length=100, buffer=20)",
        ),
    ),
    differences={
        "trl_counts_empty_responses": Difference(
            "`grpo`, `sapo`, `dr_grpo`, `luspo` divide by all rows",
            "divided by the responses with a token in the mask",
            "a response without one carries no information; `num_sequences=len(mask)` gives TRL's numbers",
        ),
        "trl_averages_the_entropy_over_tokens": Difference(
            "`entropy_coef`: mean over tokens, whatever the loss type",
            "the loss's `reduction` averages the bonus too",
            "one loss has one denominator; the numbers are equal where that is the micro-batch's tokens (`bnpo`)",
        ),
        "trl_gives_the_bonus_to_the_kept_tokens": Difference(
            "`top_entropy_quantile` with `entropy_coef`: the bonus is the mean over the kept tokens",
            "the mask multiplies the surrogate; the bonus is over all tokens in the mask",
            "for TRL's numbers set `entropy_coef=0` and add the bonus to the loss yourself",
        ),
        "trl_bounds_above_one_plus_epsilon": Difference(
            "`delta` below `1 + epsilon_high`: no effect where A < 0, and a cap where A > 0",
            "`dual_clip` bounds the ratio where A < 0, and only there",
            "dual clip as published (arXiv 1912.09729); the numbers are equal from `1 + epsilon_high` on",
        ),
        "trl_does_not_clamp_log_ratios": Difference(
            "log-ratios are not clamped",
            "clamped to 20 nats, no gradient beyond",
            "one token could make the batch's loss inf; `max_log_ratio` may be up to 60 (40 with the KL times the "
            "ratio), and the numbers are equal up to it",
        ),
        "trl_clamps_nothing_in_the_kl": Difference(
            "k3, exp(x) - x - 1, does not clamp x",
            "x is clamped to 20 nats, no gradient beyond",
            "as above: `max_log_ratio`",
        ),
        "trl_takes_sequence_level_with_every_loss": Difference(
            '`cispo` and `sapo` with `importance_sampling_level="sequence"`',
            "`ValueError`",
            "neither paper defines it",
        ),
        "trl_vespo": Difference(
            '`loss_type="vespo"`',
            "not offered",
            "its gradient is that of `old_log_probs=None` with the gamma weights as `rollout_weights`",
        ),
        "trl_divides_rounding_by_epsilon": Difference(
            "equal rewards: the rounding error of their mean, divided by 1e-4",
            "exactly 0",
            "equal rewards carry no information",
        ),
        "trl_keeps_infinite_rewards": Difference(
            "an infinite reward gets advantage 0, the rest of its group the smallest float",
            "left out of its group's statistics, advantage 0, like NaN",
            "one bad reward would ruin the run",
        ),
        "trl_normalizes_each_reward": Difference(
            '`multi_objective_aggregation="normalize_then_sum"`',
            "one reward per response",
            "for TRL's numbers call `group_advantages` for each reward, take the weighted sum, and call it for that "
            "with the batch as one group",
        ),
        "trl_multiplies_by_the_mask": Difference(
            "a NaN or infinity at a masked position makes the loss NaN",
            "exactly 0 loss and gradient there",
            "masked positions are never read",
        ),
    },
)
