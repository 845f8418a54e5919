"""verl 0.9.1: `verl.trainer.ppo.core_algos` with an `ActorConfig`."""

from tests.parity.facts import Difference, Facts, Option, Same

AGGREGATED = ("vanilla", "gspo", "cispo")

VERL = Facts(
    trainer="verl 0.9.1",
    options=(
        Option("`policy_loss.loss_mode`", "`surrogate`, `ratio`: see the table of losses"),
        Option("`loss_agg_mode`", "`reduction`: the same names with underscores; `token-sum` is `sum`"),
        Option("`loss_scale_factor`", "`norm_length`"),
        Option("`clip_ratio_low`, `clip_ratio_high`", "`clip_low`, `clip_high`"),
        Option("`clip_ratio_c` (default 3)", "`dual_clip` (default none)"),
        Option("`tau_pos`, `tau_neg`", "`tau_positive`, `tau_negative`"),
        Option("`kl_loss_coef`, 0 without `use_kl_loss`", "`kl_coef`"),
        Option("`kl_loss_type`", '`kl`; with `"k3"`, `kl_max=10.0`'),
        Option("`entropy_coeff`", "`entropy_coef`"),
        Option("`rollout_is_weights`", "`rollout_weights`"),
        Option(
            "`rollout_is`, `rollout_is_threshold`", '`rollout_weights`: `level`, and `bounds` with `outside="clamp"`'
        ),
        Option(
            "`batch_num_tokens`, `global_batch_size`, `dp_size`",
            "`num_tokens`, `num_sequences`: each divided by the number of processes",
        ),
        Option("`adv_estimator`", "`baseline`, `scale`: see the table of advantages"),
        Option("`norm_adv_by_std_in_grpo`", '`scale`: `"group_std"` or `"none"`'),
        Option("`uid` in `non_tensor_batch`", "`groups`"),
        Option("`overlong_buffer_cfg`", "`soft_overlong_penalty(lengths, max_length, buffer)`"),
        Option("`filter_groups`", "`informative_groups(groups, rewards)`"),
    ),
    losses=(
        Same('loss_mode="vanilla"', "dual_clip=3.0"),
        Same(
            'loss_mode="vanilla", clip_ratio_low=0.1, clip_ratio_high=0.28, clip_ratio_c=1.5',
            "clip_low=0.1, clip_high=0.28, dual_clip=1.5",
        ),
        Same(
            'loss_mode="gspo", clip_ratio_low=0.1, clip_ratio_high=0.05',
            'ratio="sequence_token", clip_low=0.1, clip_high=0.05',
        ),
        Same(
            'loss_mode="cispo", clip_ratio_low=0.1, clip_ratio_high=1.0',
            'surrogate="cispo", clip_low=0.1, clip_high=1.0',
        ),
        Same(
            'loss_mode="sapo", loss_agg_mode="seq-mean-token-mean"',
            'surrogate="sapo", reduction="seq_mean_token_mean"',
        ),
        Same(
            'loss_mode="geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4, loss_agg_mode="seq-mean-token-mean"',
            'surrogate="gmpo", clip_low=0.4, clip_high=0.4, reduction="seq_mean_token_mean"',
        ),
    ),
    modifiers=(
        Same('loss_agg_mode="token-mean"', 'reduction="token_mean"', AGGREGATED),
        Same('loss_agg_mode="token-sum"', 'reduction="sum"', AGGREGATED),
        Same('loss_agg_mode="seq-mean-token-sum"', 'reduction="seq_mean_token_sum"', AGGREGATED),
        Same('loss_agg_mode="seq-mean-token-mean"', 'reduction="seq_mean_token_mean"', AGGREGATED),
        Same(
            'loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=32',
            'reduction="seq_mean_token_sum_norm", norm_length=32.0',
            AGGREGATED,
        ),
        Same(
            'loss_agg_mode="token-mean", batch_num_tokens=400, dp_size=2',
            'reduction="token_mean", num_tokens=400 / 2',
            AGGREGATED,
        ),
        Same(
            'loss_agg_mode="seq-mean-token-mean", global_batch_size=32, dp_size=2',
            'reduction="seq_mean_token_mean", num_sequences=32 / 2',
            (*AGGREGATED, "sapo"),
        ),
        Same('kl_loss_type="k1", kl_loss_coef=0.1', 'kl="k1", kl_coef=0.1'),
        Same('kl_loss_type="k2", kl_loss_coef=0.1', 'kl="k2", kl_coef=0.1'),
        Same('kl_loss_type="low_var_kl", kl_loss_coef=0.1', 'kl="k3", kl_coef=0.1, kl_max=10.0'),
        Same("entropy_coeff=0.1", "entropy_coef=0.1"),
        Same("rollout_is_weights=weights", "rollout_weights=weights", (*AGGREGATED, "sapo")),
        *(
            Same(
                f'rollout_is="{level}", rollout_is_threshold=2.0',
                f'rollout_weights=rollout_weights(old_log_probs, sampler_log_probs, mask, level="{level}")',
                (*AGGREGATED, "sapo"),
            )
            for level in ("token", "sequence")
        ),
    ),
    advantages=(
        Same('adv_estimator="grpo"', 'scale="group_std"'),
        Same('adv_estimator="grpo_vectorized"', 'scale="group_std"'),
        Same('adv_estimator="grpo", norm_adv_by_std_in_grpo=False', 'scale="none", singleton="raw"'),
        Same('adv_estimator="rloo"', 'baseline="leave_one_out", scale="none", singleton="raw"'),
        Same('adv_estimator="rloo_vectorized"', 'baseline="leave_one_out", scale="none"'),
        Same('adv_estimator="reinforce_plus_plus_baseline"', 'scale="batch_whiten", singleton="raw"'),
        Same('adv_estimator="reinforce_plus_plus", gamma=1.0', 'baseline="none", scale="batch_whiten"'),
    ),
    helpers=(
        Same(
            "max_resp_len=100, overlong_buffer_cfg=dict(enable=True, len=20, penalty_factor=0.5, log=False)",
            "0.5 * soft_overlong_penalty(lengths, max_length=100, buffer=20)",
        ),
    ),
    absent=(
        *("bypass_mode", "clip_cov", "dppo_kl", "dppo_tv", "dro", "gpg", "kl_cov"),
        *("gae", "gdpo", "grpo_passk", "opo", "optimal_token_baseline", "remax"),
        "tir_optimal_token_baseline",
    ),
    differences={
        "verl_sapo_and_geo_mean_have_one_aggregation": Difference(
            "`sapo` and `geo_mean` average each response, then the responses, whatever `loss_agg_mode` says",
            "`reduction` decides",
            'no setting is ignored; `reduction="seq_mean_token_mean"` gives the same numbers',
        ),
        "verl_geo_mean_counts_every_row": Difference(
            "`geo_mean`: mean over all rows of the micro-batch; global counts are ignored",
            "divided by `num_sequences`, or by the responses with a token in the mask",
            "so that micro-batches of one step add up; `num_sequences=len(mask)` gives the same numbers",
        ),
        "verl_geo_mean_weighs_geometrically": Difference(
            "`geo_mean` with `rollout_is_weights`: each response is weighted by the geometric mean of its weights",
            "each token is weighted by its own weight",
            "one rule for every surrogate; for the same numbers pass that mean, `[S]`, as `rollout_weights`",
        ),
        "verl_geo_mean_clamps_one_side": Difference(
            "`geo_mean`: log-ratios are clipped on one side, by the advantage's sign, and unlimited on the other",
            "log-ratios are clamped to 20 nats first, no gradient beyond",
            "one rule for every loss; `max_log_ratio` may be up to 60, and the numbers are equal up to it",
        ),
        "verl_gspo_clamps_at_ten": Difference(
            "`gspo`: the sequence's log-ratio is clamped to 10, its tokens' are not",
            "each token's log-ratio is clamped to 20 before the mean",
            "one rule for every loss; the numbers differ only beyond 10 nats per token",
        ),
        "verl_does_not_clamp_k1_and_k2": Difference(
            "`k1` and `k2` do not clamp the log-ratio",
            "x is clamped to 20 nats, no gradient beyond",
            "one rule for every estimator; `max_log_ratio` may be up to 60",
        ),
        "verl_straight_through_kl": Difference(
            '`kl_loss_type="k1+"`, `"k3+"`: value of k1 or k3, gradient of k2',
            "not offered",
            '`kl="k2"` has that gradient',
        ),
        "verl_divides_rounding_by_epsilon": Difference(
            "`grpo`: equal rewards get the rounding error of their mean, over 1e-6 (0.06 for eight rewards of 0.9)",
            "exactly 0",
            "equal rewards carry no information",
        ),
        "verl_divides_a_single_reward": Difference(
            "`grpo`: a group of one gets its reward divided by 1 + 1e-6",
            '0, or with `singleton="raw"` the reward',
            "the difference is one part in a million",
        ),
        "verl_overlong_has_no_floor": Difference(
            "`overlong_buffer_cfg`: the penalty keeps growing beyond `max_resp_len`",
            "-1 beyond `max_length`",
            "as published (arXiv 2503.14476, Eq. 13); a sampler that stops at `max_resp_len` never gets beyond it",
        ),
        "verl_sums_are_scaled_by_processes": Difference(
            "`token-sum` is multiplied by `dp_size`",
            "`sum` is not multiplied",
            "multiply the loss yourself if gradients are averaged",
        ),
        "verl_takes_the_width_for_a_length": Difference(
            "`seq-mean-token-sum-norm` without `loss_scale_factor` divides by the padded width",
            "`norm_length` is required",
            "with that, padding would change the loss; `norm_length=mask.shape[1]` gives the same numbers",
        ),
        "verl_multiplies_by_the_mask": Difference(
            "a NaN at a masked position makes the loss of the `seq-mean-*` modes NaN",
            "exactly 0 loss and gradient there",
            "masked positions are never read",
        ),
    },
)
