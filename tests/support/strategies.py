"""The hypothesis strategies that draw batches and settings.

What a batch looks like (layout, strides, dtype, vocabulary, settings) is drawn by hypothesis; the numbers in it come
from a generator seeded by hypothesis, which keeps an example fast and shrinks what matters. What needs no hypothesis is
in `make_case`, for machines that lack it.
"""

import numpy as np
import torch
from hypothesis import strategies as st

from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, Recipe
from tests.support.case import STRIDES, Case
from tests.support.make_case import DTYPES, PUBLISHED, make_case


def advantage_configs() -> st.SearchStrategy[AdvantageConfig]:
    """Every option of the group level."""
    compared = st.builds(
        dict,
        baseline=st.sampled_from(["mean", "leave_one_out"]),
        scale=st.sampled_from(["group_std", "none", "group_mean", "batch_std", "batch_whiten"]),
    )
    alone = st.builds(
        dict,
        baseline=st.sampled_from(["correctness", "none"]),
        scale=st.sampled_from(["group_std", "none", "batch_std", "batch_whiten"]),
        positive_scale=st.sampled_from([1.0, 0.1, 0.0]),
        negative_scale=st.sampled_from([1.0, 0.0, 3.0]),
    )
    others = st.builds(
        dict,
        std_eps=st.sampled_from([1e-6, 0.1]),
        weight=st.sampled_from(["inverse_uncertainty", "inverse_uncertainty", "none"]),
        statistic=st.sampled_from(["nll", "nll", "shannon"]),
        uncertainty_eps=st.sampled_from([1e-5, 0.1]),
        clamp=st.sampled_from(["asymmetric", "symmetric", "negative_only", "positive_only", "none"]),
        weight_bounds=st.sampled_from([(0.8, 2.0), (0.0, 1.0), (1.0, 1.0), (0.5, 1.25)]),
        renorm=st.sampled_from(["none", "after", "before"]),
        all_wrong=st.sampled_from(["negative", "negative_no_correct", "zero"]),
        nsr_scale=st.sampled_from([1.0, 0.25, 0.0]),
        lock_all_wrong=st.booleans(),
        singleton=st.sampled_from(["zero", "raw"]),
        correct_threshold=st.sampled_from([0.5, 0.0, -0.25]),
    )
    # Repeated values weigh: repeated strategies in a one_of would be drawn as often as one.
    bases = st.sampled_from([True, True, True, False]).flatmap(lambda groups: compared if groups else alone)
    return st.builds(lambda base, rest: AdvantageConfig(**base, **rest), bases, others)


@st.composite
def loss_configs(draw) -> PolicyLossConfig:
    """Every option of the token level."""
    reduction = draw(
        st.sampled_from(
            ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "sum", "none"]
        )
    )
    surrogate = draw(st.sampled_from(["clip", "clip", "clip", "cispo", "sapo", "gmpo"]))
    clips, clip_low = surrogate == "clip", draw(st.sampled_from([0.2, 0.0, 1.0]))
    # A cap lies above the lower bound.
    caps = [None, 5.0, 0.9] if clip_low else [None, 5.0]
    return PolicyLossConfig(
        surrogate=surrogate,
        ratio=draw(st.sampled_from(["token", "token", "sequence", "sequence_token"])) if clips else "token",
        clip_low=0.2 if surrogate == "sapo" else clip_low,
        clip_high=0.2 if surrogate == "sapo" else draw(st.sampled_from([0.2, 0.28, 0.0])),
        ratio_cap=draw(st.sampled_from(caps)) if surrogate == "cispo" else None,
        dual_clip=draw(st.sampled_from([None, 3.0, 1.5])) if clips else None,
        tau_positive=draw(st.sampled_from([1.0, 4.0])) if surrogate == "sapo" else 1.0,
        tau_negative=draw(st.sampled_from([1.05, 0.1])) if surrogate == "sapo" else 1.05,
        max_log_ratio=draw(st.sampled_from([20.0, 1.0])),
        kl=draw(st.sampled_from(["k1", "k2", "k3"])),
        kl_coef=draw(st.sampled_from([0.0, 0.1, 1.0])),
        kl_max=draw(st.sampled_from([None, None, 10.0, 0.25])),
        kl_times_ratio=draw(st.sampled_from([False, True, "on_policy"])),
        entropy_coef=draw(st.sampled_from([0.0, 0.0, 0.02, -0.5])),
        reduction=reduction,
        norm_length=7.0 if reduction == "seq_mean_token_sum_norm" else None,
    )


@st.composite
def recipes(draw) -> Recipe:
    """A published method now and then, as it is or half of it; any settings mostly."""
    published = st.sampled_from(sorted(PUBLISHED))
    advantage = PUBLISHED[draw(published)].advantage if draw(st.booleans()) else draw(advantage_configs())
    loss = PUBLISHED[draw(published)].loss if draw(st.booleans()) else draw(loss_configs())
    return Recipe(name="drawn", advantage=advantage, loss=loss)


@st.composite
def vocabularies(draw, widest: int) -> int:
    """Small, odd and even; sometimes more than one block."""
    ranges = [*[(2, 64)] * 10, (180, 260), (180, 260), (1020, 1100), (16380, 16420)]
    low, high = draw(st.sampled_from([one for one in ranges if one[1] <= widest]))
    return draw(st.integers(low, high))


@st.composite
def cases(draw, dtypes: tuple[torch.dtype, ...] = DTYPES, widest: int = 20_000) -> Case:
    """Any batch, with no more than so many tokens in its vocabulary."""
    names = draw(st.sampled_from(["tensor", "strings", "objects", "int"]))
    seed, count = draw(st.integers(0, 2**31)), draw(st.integers(1, 3))
    sizes = np.random.default_rng(seed).integers(1, 5, count)
    vocab = draw(vocabularies(widest))
    case = make_case(
        seed,
        group_sizes=tuple([int(sizes[0])] * count if names == "int" else sizes.tolist()),
        length=draw(st.integers(1, 2 if vocab > 300 else 4)),
        vocab=vocab,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(["padded", "packed"])),
        strides=draw(st.sampled_from(STRIDES)),
        recipe=draw(recipes()),
        names=names,
        mask=draw(st.sampled_from(["bool", "none", "int", "float"])),
        old=draw(st.sampled_from(["none", "near", "near", "far"])),
        temperature=draw(st.sampled_from(["one", "float", "sequence", "token"])),
        padded_vocab=draw(st.booleans()),
        garbage=draw(st.booleans()),
        support=draw(st.sampled_from(["none", "none", "some", "all"])),
    )
    # A power of two between expected and actual upstream: the second pass over the gradient then rounds nothing.
    ratio = draw(st.sampled_from([1.0, 1.0, 2.0]))
    per_token = case.recipe.loss.reduction == "none"
    return case.replace(grad_scale=1.0 if per_token else abs(float(case.upstream)) * ratio)
