"""What a caller may pass by mistake: values of any type, and an argument's own tensor twisted in one way."""

import contextlib
import decimal
import fractions
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import egpo_kernels as ek

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
QUANTISED = (torch.qint8, torch.quint8, torch.qint32)


class Tagged(Tensor):
    """A subclass that a framework hands over."""


class Name(str):
    """A string that is more than a string."""


PLAIN = [
    None,
    True,
    False,
    0,
    1,
    2,
    4,
    -1,
    10**30,
    -(2**63),
    2**63 - 1,
    10**400,
    0.5,
    -0.5,
    1e-320,
    1e308,
    1e-38,
    3e38,
    1j,
]
PLAIN += [float("nan"), float("inf"), -float("inf"), "", "x", "none", "egpo", "auto", b"x", Name("all"), Name("triton")]
PLAIN += [(), [], [1, 2], [1, 1, 2, 2], ["a", "a", "b", "b"], [None] * 4, [[1]] * 4, (0.8, 2.0), range(4), {}, {"a": 1}]
PLAIN += [{1, 2}, object(), len, int, torch.float32, torch.Size([4]), slice(4), ..., decimal.Decimal(1)]
PLAIN += [fractions.Fraction(1, 2), np.float32(2), np.float64(2), np.int64(2), np.bool_(True), np.array(4), np.ones(4)]
PLAIN += [np.array(["mean", "b"]), np.array(["none"]), np.ones((4, 2), dtype=int), np.array([None] * 4)]
PLAIN += [np.array([1, 1, 2, 2], dtype="datetime64[s]"), torch.nn.Linear(2, 2), ek.Recipe, ek.AdvantageConfig]
PLAIN += [ek.AdvantageConfig(), ek.PolicyLossConfig(reduction="none"), ek.recipes.GRPO, [torch.ones(4)]]

SPECIAL = [torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e-45, -1.0, 0.0]
IDS = [-1, -100, 99, 2**31, 2**63 - 1, -(2**63)]
SHAPES = [(), (0,), (1,), (4,), (5,), (15,), (4, 1), (4, 4), (0, 4), (4, 0), (4, 4, 5), (4, 0, 5), (4, 4, 1), (4, 4, 0)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Making odd tensors warns; using them must not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in any dtype; uninitialised where torch cannot convert to it."""
    if dtype in QUANTISED:
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, dtype)
    try:
        return tensor.to(dtype)
    except (NotImplementedError, RuntimeError):
        return torch.empty(tensor.shape, dtype=dtype)


def _specials(tensor: Tensor) -> list[Any]:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return SPECIAL
    if tensor.dtype == torch.bool:
        return [True, False]
    info = torch.iinfo(tensor.dtype)
    return [number for number in IDS if info.min <= number <= info.max]


def _related(tensor: Tensor, pick: int) -> Tensor:
    kinds = [[torch.bool], [dtype for dtype in DTYPES if str(dtype).startswith(("torch.int", "torch.uint"))]]
    own = kinds[1] if tensor.dtype != torch.bool else kinds[0] + kinds[1]
    if tensor.dtype.is_floating_point:
        own = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    return tensor.to(own[pick % len(own)])


def _planted(tensor: Tensor, pick: int) -> Tensor:
    changed, values = tensor.clone(), _specials(tensor)
    if changed.numel():
        changed.view(-1)[pick % changed.numel()] = values[pick % len(values)]
    return changed


def _filled(tensor: Tensor, pick: int) -> Tensor:
    return torch.full_like(tensor, _specials(tensor)[pick % len(_specials(tensor))])


def _overlapping(tensor: Tensor, pick: int) -> Tensor:
    """Neighbouring rows share all but one element."""
    return tensor.flatten().as_strided(tensor.shape, [1] * tensor.dim())


def _spread(tensor: Tensor, pick: int) -> Tensor:
    """Every other element of a larger tensor, along one dimension."""
    dim = pick % tensor.dim()
    every_other = (*[slice(None)] * dim, slice(None, None, 2))
    return tensor.repeat_interleave(2, dim)[every_other]


def _inference(tensor: Tensor, pick: int) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


# What a call may well accept: other values, another dtype of the same kind, other memory.
MILD = {
    "related dtype": _related,
    "planted": _planted,
    "filled": _filled,
    "expanded": lambda tensor, pick: tensor.flatten()[:1].reshape([1] * tensor.dim()).expand(tensor.shape),
    "overlapping": _overlapping,
    "spread": _spread,
    "transposed": lambda tensor, pick: tensor.mT.contiguous().mT,
    "flipped": lambda tensor, pick: tensor.flip(pick % tensor.dim()),
    "negated": lambda tensor, pick: torch._neg_view(-tensor),
    "grad": lambda tensor, pick: tensor.clone().requires_grad_(),
    "not a leaf": lambda tensor, pick: tensor.clone().requires_grad_() * 1,
    "parameter": lambda tensor, pick: torch.nn.Parameter(tensor.clone(), tensor.dtype.is_floating_point),
    "subclass": lambda tensor, pick: tensor.as_subclass(Tagged),
    "inference": _inference,
    "no rows": lambda tensor, pick: tensor[:0],
    "no columns": lambda tensor, pick: tensor[..., :0],
}
HARSH = {
    "any dtype": lambda tensor, pick: cast(tensor, DTYPES[pick % len(DTYPES)]),
    "meta": lambda tensor, pick: tensor.to("meta"),
    "sparse": lambda tensor, pick: tensor.to_sparse(),
    "csr": lambda tensor, pick: tensor.to_sparse_csr(),
    "nested": lambda tensor, pick: torch.nested.nested_tensor(list(tensor)),
    "jagged": lambda tensor, pick: torch.nested.nested_tensor(list(tensor), layout=torch.jagged),
    "numpy": lambda tensor, pick: tensor.numpy(),
    "list": lambda tensor, pick: tensor.tolist(),
    "scalar": lambda tensor, pick: tensor.flatten()[0],
    "shorter": lambda tensor, pick: tensor[:-1],
    "longer": lambda tensor, pick: torch.cat([tensor, tensor[:1]]),
    "narrower": lambda tensor, pick: tensor[..., :-1],
    "flat": lambda tensor, pick: tensor.flatten(),
    "batched": lambda tensor, pick: tensor[None],
    "column": lambda tensor, pick: tensor[..., None],
}
TWISTS = MILD | HARSH


def twisted(tensor: Tensor, how: str, pick: int) -> Any:
    """The tensor changed in one way; unchanged where it cannot be."""
    with quiet():
        try:
            return TWISTS[how](tensor, pick)
        except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError):
            return tensor


def fresh(shape: tuple[int, ...], dtype: torch.dtype, pick: int) -> Tensor:
    """A tensor of any dtype and shape, whatever the argument was."""
    with quiet():
        try:
            return _filled(torch.ones(shape, dtype=dtype), pick)
        except (RuntimeError, TypeError):
            return cast(torch.ones(shape), dtype)


PICKS = st.integers(0, 2**20)
FRESH = st.builds(fresh, st.sampled_from(SHAPES), st.sampled_from(DTYPES), PICKS)
GARBAGE = st.one_of(st.sampled_from(PLAIN), FRESH)


def _same(value: Any) -> Any:
    # Repeated strategies in a one_of are drawn as often as one, equal ones of another name are not.
    return value


def garbage_for(value: Any) -> st.SearchStrategy[Any]:
    """Garbage in place of an argument, most of it the argument's own tensor in another guise."""
    if not isinstance(value, Tensor):
        return GARBAGE
    mild, harsh = (st.builds(twisted, st.just(value), st.sampled_from(list(hows)), PICKS) for hows in (MILD, HARSH))
    return st.one_of(mild, mild.map(_same), mild.map(_same), harsh, GARBAGE)
