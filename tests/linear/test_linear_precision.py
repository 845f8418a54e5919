"""Float32 logits of 16-bit hidden states: log-probs under the accuracy rule, without a float32 copy of the weight."""

import pytest
import torch

import egpo_kernels as ek
from egpo_kernels.linear import head as heads
from tests.support.accuracy import assert_accurate, assert_bits, assert_rounding
from tests.support.batches import BACKENDS, FAST_BACKEND
from tests.support.cost import peak_bytes, products
from tests.support.device import DEVICE

VOCAB, WIDTH = 97, 48
HALF = (torch.bfloat16, torch.float16)
PAIRS = [(dtype, dtype) for dtype in HALF] + [(dtype, torch.float32) for dtype in HALF]
LAYERS = {
    "plain": {},
    "bias": {"bias": True},
    "scale and cap": {"logit_scale": 0.7, "logit_softcap": 3.0},
    "adapters": {"lora": True, "bias": True},
}


def layer(hidden_dtype, weight_dtype, kind="plain", rows=(4, 6)):
    """Hidden states, weight and options, drawn in the dtypes they have."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=weight_dtype, size=1.0):
        return (size * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)

    options = dict(LAYERS[kind])
    if options.pop("bias", False):
        options["bias"] = normal(VOCAB)
    if options.pop("lora", False):
        options["lora"] = (normal(3, WIDTH), normal(VOCAB, 3, size=0.3), 0.5)
    tokens = torch.randint(VOCAB, rows, generator=generator).to(DEVICE)
    return normal(*rows, WIDTH, dtype=hidden_dtype), normal(VOCAB, WIDTH, size=0.5), tokens, options


def wide(hidden, weight, options, dtype=torch.float64):
    """The same numbers in another dtype."""
    given = dict(options)
    if "bias" in given:
        given["bias"] = given["bias"].to(dtype)
    if "lora" in given:
        given["lora"] = (*(part.to(dtype) for part in given["lora"][:2]), given["lora"][2])
    return hidden.to(dtype), weight.to(dtype), given


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probs_under_the_accuracy_rule(dtypes, kind, backend):
    hidden, weight, tokens, options = layer(*dtypes, kind)
    double, heavy, exactly = wide(hidden, weight, options)
    exact = ek.linear_token_log_probs(double, heavy, tokens, return_entropy=True, backend="reference", **exactly)

    def found(backend, **more):
        given = {"return_entropy": True, "backend": backend, **options, **more}
        return ek.linear_token_log_probs(hidden, weight, tokens, **given)

    actual, plain = found(backend, logits_dtype=torch.float32), found("reference", logits_dtype=torch.float32)
    size = 4 * (double.abs() @ heavy.abs().T).amax(-1) + exact.log_probs.abs()  # sums of products, and of exponentials
    for name in ("log_probs", "entropy"):
        values = [getattr(each, name) for each in (actual, plain, exact)]
        assert values[0].dtype == torch.float32
        assert_accurate(*values, size * (1 if name == "log_probs" else 1 + exact.entropy), name)
    if dtypes[0] == dtypes[1]:
        rounded = (found(backend).log_probs.double() - exact.log_probs).abs().max()
        assert rounded > 20 * (actual.log_probs.double() - exact.log_probs).abs().max()


LOSSES = {
    "known": (("hidden", "weight"), ek.recipes.EGPO.loss),
    "late": (("hidden", "weight"), ek.PolicyLossConfig(ratio="sequence", entropy_coef=0.1)),
    "frozen": (("hidden",), ek.recipes.EGPO.loss),
    "frozen, late": (("hidden",), ek.PolicyLossConfig(ratio="sequence")),
}


@pytest.mark.parametrize("chunks", [None, 5])
@pytest.mark.parametrize("kind", ["plain", "scale and cap", "adapters"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtypes", PAIRS[::2] + PAIRS[3:], ids=str)
@FAST_BACKEND
def test_gradients_are_no_worse_than_those_of_16_bit_logits(dtypes, name, kind, chunks, backend):
    trains, config = LOSSES[name]
    hidden, weight, tokens, options = layer(*dtypes, kind)
    advantages = torch.linspace(-1, 1, 4, device=DEVICE)
    double, heavy, exactly = wide(hidden, weight, options)
    old = ek.linear_token_log_probs(double, heavy, tokens, **exactly).log_probs - 0.1

    def run(hidden, weight, options, backend, **more):
        leaves = {"hidden": hidden.clone(), "weight": weight.clone()}
        for leaf in trains:
            leaves[leaf].requires_grad_()
        loss, _ = ek.linear_policy_loss(
            *leaves.values(), tokens, advantages, old_log_probs=old.to(more.pop("old", torch.float32)), config=config,
            grad_scale=1024.0, backend=backend, **options, **more,
        )  # fmt: skip
        (1024.0 * loss).backward()
        return loss.detach(), {leaf: leaves[leaf].grad for leaf in trains}

    exact, wanted = run(double, heavy, exactly, "reference", old=torch.float64)
    narrow = wide(hidden, weight, options, dtypes[0])
    rounded, plain = run(*narrow, "reference")
    more = {} if chunks is None else {"max_chunk_bytes": chunks * VOCAB * 6}
    loss, actual = run(hidden, weight, options, backend, logits_dtype=torch.float32, **more)
    assert (loss - exact).abs() <= (rounded - exact).abs() + 1e-5 * exact.abs() + 1e-6
    for leaf in trains:
        assert actual[leaf].dtype == {"hidden": hidden, "weight": weight}[leaf].dtype
        # Each term is a logit's gradient times an entry of the other factor, and those of a row cancel.
        size = 1024.0 * (double.abs().max() + heavy.abs().max())
        assert_accurate(actual[leaf], plain[leaf].to(actual[leaf].dtype), wanted[leaf], size * torch.ones(()), leaf)


def test_no_copy_of_the_weight_in_float32():
    hidden, weight, tokens, _ = layer(torch.bfloat16, torch.bfloat16)
    weight = weight.cpu().repeat(400, 4)  # [38800, 192]: 30 MB in float32
    hidden, tokens = hidden.cpu().repeat(1, 1, 4), tokens.cpu()

    def run():
        with torch.no_grad():
            ek.linear_token_log_probs(hidden, weight, tokens, logits_dtype=torch.float32, max_chunk_bytes=1 << 20)

    slab = 4 * heads.SLAB * weight.shape[1]
    assert peak_bytes(run) < (1 << 20) + 2 * slab < 4 * weight.numel()


@FAST_BACKEND
def test_as_many_products_as_without(backend):
    """One for the logits, one for each gradient; only rows that count."""
    hidden, weight, tokens, _ = layer(torch.bfloat16, torch.bfloat16)
    mask = torch.arange(24).view(4, 6).to(DEVICE) % 2 == 0

    def count(**more):
        leaves = [each.clone().requires_grad_() for each in (hidden, weight)]

        def run():
            ek.linear_policy_loss(
                *leaves, tokens, torch.ones(4, device=DEVICE), mask, backend=backend, **more
            ).loss.backward()

        return sorted(products(run))

    assert count(logits_dtype=torch.float32) == count()


@FAST_BACKEND
def test_the_same_dtype_changes_nothing(backend):
    hidden, weight, tokens, _ = layer(torch.float32, torch.float32)
    plain, named = (
        ek.linear_token_log_probs(hidden, weight, tokens, backend=backend, logits_dtype=dtype).log_probs
        for dtype in (None, torch.float32)
    )
    assert_bits(named, plain, "log_probs")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(weight_dtype):
    """A dtype of logits that was asked for is not autocast's to choose; norms give float32 there."""
    hidden, weight, tokens, _ = layer(torch.bfloat16, weight_dtype)
    wanted = ek.linear_token_log_probs(hidden, weight, tokens, logits_dtype=torch.float32).log_probs
    with torch.autocast(DEVICE.split(":")[0], torch.bfloat16):
        for given in (hidden, hidden.float()):
            found = ek.linear_token_log_probs(given, weight, tokens, logits_dtype=torch.float32).log_probs
            assert_rounding(found, wanted)
        narrow = ek.linear_token_log_probs(hidden, weight, tokens).log_probs
    assert (narrow - wanted).abs().max() > 1e-3


def test_whole_groups_and_packed():
    hidden, weight, tokens, _ = layer(torch.bfloat16, torch.bfloat16)
    rewards = torch.tensor([1.0, 0, 0, 1], device=DEVICE)
    given = {"logits_dtype": torch.float32}
    padded = ek.linear_egpo_loss(hidden, weight, tokens, 2, rewards, **given).loss
    packed = ek.linear_egpo_loss(
        hidden.flatten(0, 1),
        weight,
        tokens.flatten(),
        2,
        rewards,
        cu_seqlens=6 * torch.arange(5, device=DEVICE),
        **given,
    ).loss
    assert_rounding(packed, padded)
    logits = torch.nn.functional.linear(hidden.float(), weight.float())
    assert_rounding(padded, ek.egpo_loss(logits, tokens, 2, rewards).loss)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BAD = [
    (BF16, BF16, BF16, ValueError, "logits_dtype is torch.bfloat16 with hidden of torch.bfloat16"),
    (BF16, BF16, FP64, ValueError, "it must be torch.float32"),
    (FP64, FP64, FP32, ValueError, "no more than 32 bits"),
    (BF16, BF16, "float32", ValueError, "logits_dtype is 'float32'"),
    (FP32, BF16, FP32, TypeError, "weight has dtype torch.bfloat16; it must be torch.float32"),
    (BF16, FP16, FP32, TypeError, "weight has dtype torch.float16; it must be torch.bfloat16"),
    (BF16, FP32, None, TypeError, "weight has dtype torch.float32; it must be torch.bfloat16"),
]


@pytest.mark.cpu
@pytest.mark.parametrize("hidden_dtype, weight_dtype, logits_dtype, error, message", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_that_do_not_go_together(hidden_dtype, weight_dtype, logits_dtype, error, message, backend):
    hidden, weight, tokens, _ = layer(hidden_dtype, weight_dtype)
    with pytest.raises(error, match=message):
        ek.linear_token_log_probs(hidden, weight, tokens, logits_dtype=logits_dtype, backend=backend)
