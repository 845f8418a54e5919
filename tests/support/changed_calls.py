"""A call of `logits_policy_loss` or `token_log_probs`, and many that differ in an argument or in what is around."""

import contextlib
import enum
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import egpo_kernels as ek

S, T, V = 3, 4, 11


class Backend(str, enum.Enum):
    """Names as configurations have them; from Python 3.12 on an f-string says ``Backend.portable``."""

    portable = "portable"

    def __format__(self, spec):
        return str(self)


class Wrapped(Tensor):
    """A subclass as those that wrap models make them."""


class Settings(ek.PolicyLossConfig):
    """Settings that say something else than their fields."""

    has_bonus = True


def arguments():
    """Of a loss; everything is made anew, since a gradient may be written over the logits."""
    torch.manual_seed(0)
    made = {
        "logits": torch.randn(S, T, V).requires_grad_(), "tokens": torch.randint(V, (S, T)),
        "advantages": torch.tensor([1.0, -0.5, 0.0]), "mask": torch.rand(S, T) < 0.8,
        "old_log_probs": torch.randn(S, T), "ref_log_probs": None, "rollout_weights": None,
    }  # fmt: skip
    return made | {"cu_seqlens": None, "temperature": 1.0, "config": ek.PolicyLossConfig()}


def same(name, change):
    """Change an argument to something made of it."""
    return lambda given: given.update({name: change(given[name])})


def to(**values):
    """Change arguments to these."""
    return lambda given: given.update(values)


def negated(values):
    """The values as a view that is still to be negated."""
    return torch.view_as_complex(torch.stack([torch.zeros_like(values), -values], -1)).conj().imag


def made_in_inference_mode(values):
    with torch.inference_mode():
        return values.clone()


def leaf(change):
    """Logits made of the logits, which are leaves again."""
    return same("logits", lambda values: change(values.detach()).requires_grad_())


def everywhere(change):
    """A change of each tensor beside the logits; one that is not there is made first."""
    for name in ("tokens", "advantages", "mask", "old_log_probs", "ref_log_probs", "rollout_weights"):

        def changed(given, name=name):
            values = given[name]
            if values is None:
                values = torch.rand(S, T)
            given[name] = change(values)

        yield name, changed


def all_given(given):
    given.update(
        ref_log_probs=torch.randn(S, T), rollout_weights=torch.rand(S), config=ek.PolicyLossConfig(kl_coef=0.1)
    )


def all_per_token(given):
    all_given(given)
    given.update(advantages=torch.randn(S, T), rollout_weights=torch.rand(S, T))


def short_mask(given):
    given.update(mask=given["mask"][:, 0])


def resized(given, sequences, length, vocab):
    """The same for other sizes."""
    for name, values in given.items():
        if isinstance(values, Tensor):
            sizes = (sequences, length, vocab)[: values.dim()]
            repeated = values.detach().repeat([2] * values.dim())
            given[name] = repeated[tuple(slice(size) for size in sizes)].contiguous()
    given["tokens"] %= vocab
    given["logits"].requires_grad_()


CHANGES = {"nothing": to()}
for kind, change in {
    "parameter": lambda values: torch.nn.Parameter(values, requires_grad=False),
    "subclass": lambda values: values.as_subclass(Wrapped),
    "inference": made_in_inference_mode,
    "sparse": lambda values: values.to_sparse(),
    "nested": lambda values: torch.nested.nested_tensor(list(values)),
    "meta": lambda values: values.to("meta"),
    "none": lambda values: None,
    "list": lambda values: values.tolist(),
    "double": lambda values: values.double(),
    "half": lambda values: values.half(),
    "int": lambda values: values.int(),
    "bool": lambda values: values.bool(),
    "complex": lambda values: values.to(torch.complex64),
    "short": lambda values: values[:, :-1] if values.dim() == 2 else values[:-1],
    "transposed": lambda values: values.t(),
    "column": lambda values: values[:, :1] if values.dim() == 2 else values[:, None],
    "one each": lambda values: values[:, 0] if values.dim() == 2 else values,
    "one for all": lambda values: values.flatten()[0],
    "per token": lambda values: values if values.dim() == 2 else values[:, None].expand(S, T),
    "columns first": lambda values: values.t().contiguous().t(),
    "negated": lambda values: negated(values.float()),
    "differentiated": lambda values: values.float().requires_grad_(),
    "out of range": lambda values: values + 1000,
}.items():
    CHANGES |= {f"{name}: {kind}": changed for name, changed in everywhere(change)}
CHANGES |= {f"logits: {name}": leaf(change) for name, change in {
    "double": Tensor.double, "half": Tensor.half, "bfloat16": Tensor.bfloat16, "negated": negated,
    "vocabulary apart": lambda values: values.transpose(1, 2).contiguous().transpose(1, 2),
    "other rows": lambda values: values.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda values: torch.cat([values, values], 1)[:, :T],
    "overlapping": lambda values: values.as_strided((S, T, V), (V, V, 1)),
    "of one": lambda values: values[..., :1], "of none": lambda values: values[..., :0],
    "packed": lambda values: values.flatten(0, 1), "parameter": torch.nn.Parameter,
    "subclass": lambda values: values.as_subclass(Wrapped), "sparse": lambda values: values.to_sparse(),
    "no sequences": lambda values: values[:0],
}.items()}  # fmt: skip
CHANGES |= {
    "logits: constants": same("logits", Tensor.detach),
    "logits: constants, in place": lambda given: given.update(logits=given["logits"].detach(), inplace_grad=True),
    "logits: ints": same("logits", lambda values: values.detach().int()),
    "logits: nested": same("logits", lambda values: torch.nested.nested_tensor(list(values.detach()))),
    "logits: none": to(logits=None),
    "logits: inference": same("logits", lambda values: made_in_inference_mode(values.detach())),
    "packed": lambda given: given.update(
        {name: it.flatten(0, 1) for name, it in given.items() if isinstance(it, Tensor) and it.dim() > 1},
        cu_seqlens=torch.tensor([0, T, 2 * T, 3 * T]),
    ),
    "cu_seqlens": to(cu_seqlens=torch.tensor([0, T])),
}  # fmt: skip
for value in (2, 2.5, True, 0.0, -1.0, np.float32(2), float("nan"), 1e300, "1", None, torch.tensor(2.0), torch.ones(S)):
    CHANGES |= {f"{name}: {value!r}": to(**{name: value}) for name in ("temperature", "grad_scale")}
    CHANGES |= {f"{name}: {value!r}": to(**{name: value}) for name in ("num_tokens", "num_sequences")}
for value in (True, False, 1, 0, np.bool_(True), "True", None, [True], torch.tensor(True)):
    CHANGES[f"inplace_grad: {value!r}"] = to(inplace_grad=value)
for value in ("all", "active", "none", "some", "", None, True, ["all"], np.str_("none")):
    CHANGES[f"metrics: {value!r}"] = to(metrics=value)
for value in (
    Backend.portable,
    "auto",
    "portable",
    "reference",
    np.str_("portable"),
    "other",
    None,
    1,
    ["portable"],
    np.str_("reference"),
):
    CHANGES[f"backend: {value!r}"] = to(backend=value)
for changed in (
    {"clip_high": 0.3}, {"kl_coef": 0.1}, {"entropy_coef": 0.1}, {"reduction": "none"}, {"reduction": "sum"},
    {"reduction": "seq_mean_token_sum_norm"}, {"reduction": "seq_mean_token_sum_norm", "norm_length": 7.0},
    {"reduction": "seq_mean_token_mean"}, {"ratio": "sequence"}, {"surrogate": "gmpo"}, {"dual_clip": 3.0},
):  # fmt: skip
    CHANGES[f"config: {changed}"] = to(config=ek.PolicyLossConfig(**changed))
CHANGES |= {
    "config: a subclass": to(config=Settings()),
    "config: a recipe": to(config=ek.recipes.EGPO),
    "config: none": to(config=None),
}
CHANGES |= {
    "with a KL": to(config=ek.PolicyLossConfig(kl_coef=0.1), ref_log_probs=torch.full((S, T), -2.0)),
    "half and a scale": lambda given: (leaf(Tensor.half)(given), given.update(grad_scale=8.0)),
    "in place, overlapping": lambda given: (CHANGES["logits: overlapping"](given), given.update(inplace_grad=True)),
    "in place, other rows": lambda given: (CHANGES["logits: other rows"](given), given.update(inplace_grad=True)),
    **{
        f"{sizes}: {name}": lambda given, sizes=sizes, change=change: (change(given), resized(given, *sizes))
        for sizes in ((3, 1, 11), (2, 3, 7), (1, 4, 11), (0, 4, 11), (3, 0, 11), (4, 1, 5))
        for name, change in (("", to()), ("all", all_given), ("per token", all_per_token), ("short", short_mask))
    },
    "two wrong: counts, scale": to(num_tokens=-1, grad_scale=-1.0),
    "two wrong: heat, counts": to(temperature=-1.0, num_tokens=-1),
    "two wrong: heat, scale": to(temperature=-1.0, grad_scale=-1.0),
    "two wrong: overlap, scale": lambda given: (CHANGES["in place, overlapping"](given), given.update(grad_scale=-1.0)),
    "nothing counts": to(mask=torch.zeros(S, T, dtype=torch.bool), num_tokens=0),
    "tokens for a mask": to(mask=torch.ones(S, T, dtype=torch.long), tokens=None),
    "with an entropy": to(return_entropy=True),
    "entropy: none": to(return_entropy=None), "entropy: 1": to(return_entropy=1),
}  # fmt: skip
AROUND = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "reference by environment": lambda: mock.patch.dict("os.environ", EGPO_KERNELS_BACKEND="reference"),
    "unknown by environment": lambda: mock.patch.dict("os.environ", EGPO_KERNELS_BACKEND="unknown"),
    "triton by environment": lambda: mock.patch.dict("os.environ", EGPO_KERNELS_BACKEND="triton", TRITON_INTERPRET="0"),
}
CALLS = [(change, "") for change in CHANGES]
CALLS += [(change, around) for around in AROUND for change in ("nothing", "inplace_grad: True")]
