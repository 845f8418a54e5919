"""Liger 0.8.5: `LigerFusedLinearGRPOLoss`, whose formulas are `LigerFusedLinearGRPOFunction.ppo_loss_fn`."""

from tests.parity.facts import Difference, Facts, Option, Same

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LEVELLED = ("grpo", "bnpo", "dr_grpo", "dapo")

LIGER = Facts(
    trainer="Liger 0.8.5",
    options=(
        Option("`loss_type`", "`surrogate`, `reduction`: see the table of losses"),
        Option("`importance_sampling_level`", '`ratio`: `"token"` or `"sequence"`'),
        Option("`epsilon_low`, `epsilon_high`", "`clip_low`, `clip_high`; with cispo the second is `ratio_cap`"),
        Option("`delta`", "`dual_clip`"),
        Option("`beta` (default 0.04)", '`kl_coef` (default 0), with `kl="k3"`'),
        Option("`use_bias_correction_kl`", "`kl_times_ratio`"),
        Option("`sapo_temperature_pos`, `sapo_temperature_neg`", "`tau_positive`, `tau_negative`"),
        Option("`max_completion_length`", "`norm_length`"),
        Option("`temperature`", "`temperature`"),
        Option("`vllm_is_ratio`", "`rollout_weights`"),
        Option("`num_items_in_batch`", "`num_tokens`"),
        Option("`_input`, `lin_weight`, `bias`", "logits"),
    ),
    losses=(
        Same('loss_type="grpo"', 'reduction="seq_mean_token_mean"'),
        Same('loss_type="bnpo"', 'reduction="token_mean"'),
        Same('loss_type="dr_grpo", max_completion_length=32', 'reduction="seq_mean_token_sum_norm", norm_length=32.0'),
        Same('loss_type="dapo"', 'reduction="token_mean"'),
        Same(
            'loss_type="cispo", epsilon_high=2.0',
            'surrogate="cispo", clip_low=1.0, ratio_cap=2.0, reduction="token_mean"',
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
        Same("epsilon_low=0.1, epsilon_high=0.28", "clip_low=0.1, clip_high=0.28", CLIPPED),
        Same("delta=1.5", "dual_clip=1.5", CLIPPED),
        Same("sapo_temperature_pos=2.0, sapo_temperature_neg=3.0", "tau_positive=2.0, tau_negative=3.0", ("sapo",)),
        Same("beta=0.1", "kl_coef=0.1", (*LEVELLED, "cispo", "sapo")),
        Same(
            "beta=0.1, use_bias_correction_kl=True",
            "kl_coef=0.1, kl_times_ratio=True",
            (*LEVELLED, "cispo", "sapo"),
        ),
        Same(
            'beta=0.1, use_bias_correction_kl=True, importance_sampling_level="sequence"',
            'kl_coef=0.1, kl_times_ratio=True, ratio="sequence"',
            LEVELLED,
        ),
        Same("vllm_is_ratio=weights", "rollout_weights=weights", (*LEVELLED, "cispo", "sapo")),
        Same("vllm_is_ratio=weights[:, :1]", "rollout_weights=weights[:, :1]"),
        Same("num_items_in_batch=400", "num_tokens=400", ("dapo", "cispo")),
    ),
    advantages=(),
    helpers=(),
    differences={
        "liger_counts_empty_responses": Difference(
            "`grpo`, `sapo`, `dr_grpo`, `luspo` divide by all rows",
            "divided by the responses with a token in the mask",
            "a response without one carries no information; `num_sequences=len(mask)` gives the same numbers",
        ),
        "liger_luspo_counts_padding": Difference(
            '`luspo` per token (`importance_sampling_level="token"`, KL, weights): the mean over all positions, '
            "padding included, of each loss times its response's length",
            "masked positions have no loss",
            "TRL 1.16 masks them; the numbers of the table's row hold where the loss is one per response",
        ),
        "liger_bounds_above_one_plus_epsilon": Difference(
            "`delta` below `1 + epsilon_high`: no effect where A < 0, and a cap where A > 0",
            "`dual_clip` bounds the ratio where A < 0, and only there",
            "as for TRL",
        ),
        "liger_clamps_no_log_ratio": Difference(
            "log-ratios, to the old policy and to the reference, are not clamped",
            "clamped to 20 nats, no gradient beyond",
            "as for TRL: `max_log_ratio` may be up to 60",
        ),
        "liger_vespo": Difference(
            '`loss_type="vespo"`',
            "not offered",
            "its gradient is that of `old_log_probs=None` with the gamma weights as `rollout_weights`",
        ),
    },
)
