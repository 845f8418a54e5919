"""Does a remembered launch go to the kernel that Triton would launch? Calls drawn by hypothesis, nothing computed.

python -c "import tests.support.launches as launches; launches.check_calls()"     # without TRITON_INTERPRET

Every launch from memory is also put through Triton's own binder and its own cache, which must name the same kernel;
what host functions worked out for a key is worked out again.
Compiling is left out: a kernel is no more than what it would have been compiled for. Each example forgets everything,
makes a call, and then others that differ from it in a field.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.jit import JITFunction

import egpo_kernels as ek
import egpo_kernels.triton as backend
from benchmarks.counts.launches import Size, launch_groups, launch_log_probs
from benchmarks.counts.stubbed import Driver, stubbed
from egpo_kernels.triton import launcher
from egpo_kernels.triton.launcher import Launches
from tests.support.strategies import advantage_configs, loss_configs

VOCABS = (128, 129, 40)
# Drawn as often as they stand here.
FUNCTIONS = ("logits_policy_loss",) * 6 + ("policy_loss",) * 2 + ("group_advantages",) * 2 + (
    "token_log_probs", "egpo_loss", "linear_policy_loss", "linear_token_log_probs", "empty", "rescale", "rescale",
)  # fmt: skip
SEQUENCE, WHITENED = ek.PolicyLossConfig(ratio="sequence"), ek.AdvantageConfig(scale="batch_whiten")
ESTIMATES = st.builds(ek.PolicyLossConfig, kl_coef=st.just(0.1), kl=st.sampled_from(["k1", "k2", "k3"]))
# Which of the tensors start no access of 16 bytes.
PLACES = ("logits", "rows", "sequences", "upstream")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WHOLE = (torch.long, torch.int32)
KINDS = ("none", "token", "sequence")


class Other(AssertionError):
    """Triton would launch another kernel, or something else would be worked out."""


class Compiled:
    """A kernel that Triton found; launched, it does nothing."""

    function = packed_metadata = None

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: None

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None


def found(kernel: JITFunction, key: Any, signature: Any, device: Any, *_: Any) -> Compiled:
    """In place of `JITFunction._do_compile`: a kernel of its own for each key of Triton's cache."""
    return kernel.device_caches[device][0].setdefault(key, Compiled())


@contextlib.contextmanager
def compared(counted: list[str], left_out: tuple[str, int] | None = None) -> Iterator[SimpleNamespace]:
    """Compare every launch from memory, and what was worked out; the kernel's name is appended to ``counted``.

    ``left_out`` is a host function, and what of its key is not looked at. What is yielded has the number of the current
    device, which stands in keys for the one that all tensors lie on.

    Raises:
        Other: What is remembered is of another call.
    """
    place, init, call = SimpleNamespace(number=0), Launches.__init__, Launches.__call__

    def keyed(self: Launches, *key: Any) -> None:
        device = torch.device("cuda", place.number)
        parts = [device if isinstance(part, torch.device) else part for part in key]
        if left_out is not None and sys._getframe(1).f_code.co_name == left_out[0] and left_out[1] < len(parts):
            del parts[left_out[1]]
        init(self, *parts)

    def checked(self: Launches, kernel: Any, programs: int, arguments: tuple, options: Any = launcher.NOTHING) -> None:
        remembered = self.known.get(self.place)
        if remembered is not None:
            counted.append(kernel.__name__)
            if kernel.run(*arguments, grid=(programs,), warmup=True, **options) is not remembered[0]:
                raise Other(f"{kernel.__name__}: Triton would launch another kernel")
        call(self, kernel, programs, arguments, options)

    def compared_too(self: Launches, function: Callable[..., Any], *arguments: Any) -> Any:
        made = function(*arguments)
        if self.known.setdefault(function, made) != made:
            raise Other(f"{function.__name__} would answer otherwise now")
        return made

    with contextlib.ExitStack() as stack:
        stack.enter_context(stubbed())
        stack.enter_context(mock.patch.object(Driver, "get_current_device", lambda driver: -1 - place.number))
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", found))
        stack.enter_context(mock.patch.object(Launches, "__init__", keyed))
        stack.enter_context(mock.patch.object(Launches, "__call__", checked))
        stack.enter_context(mock.patch.object(Launches, "worked_out", compared_too))
        yield place


FIELDS: dict[str, st.SearchStrategy] = {
    "function": st.sampled_from(FUNCTIONS),
    "sequences": st.sampled_from([1, 2, 4, 0]),
    "length": st.sampled_from([1, 2, 16, 0]),
    "vocab": st.sampled_from(VOCABS),
    "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    "packed": st.booleans(),
    "unaligned": st.sets(st.sampled_from(PLACES), max_size=2),
    "gaps": st.sampled_from([0, 8, 7]),
    "transposed": st.booleans(),
    "mask": st.sampled_from([None, torch.bool, torch.uint8, torch.long, torch.float32]),
    "tokens": st.sampled_from(WHOLE),
    "numbers": st.sampled_from(FLOATS),
    "advantages": st.sampled_from(KINDS[1:]),
    "old": st.sampled_from(KINDS[:2]),
    "ref": st.sampled_from(["token", "token", "none"]),
    "weights": st.sampled_from(KINDS),
    "heat": st.sampled_from(KINDS),
    "support": st.sampled_from([None, None, torch.int32, torch.long]),
    "padded": st.sampled_from([False, False, True]),
    "config": st.one_of(st.just(ek.PolicyLossConfig()), st.just(SEQUENCE), ESTIMATES, loss_configs()),
    "groups": st.sampled_from([*WHOLE, 1]),
    "correct": st.booleans(),
    "entropy": st.booleans(),
    "entropy_mask": st.booleans(),
    "rule": st.one_of(st.just(WHITENED), advantage_configs()),
    "counts": st.sampled_from([None, 3, torch.long, torch.float32]),
    "upstream": st.sampled_from([1.0, 3.0]),
    "metrics": st.sampled_from(["none", "none", "all"]),
    "in_place": st.booleans(),
    "backward": st.sampled_from([True, True, False]),
    "device": st.sampled_from([0, 0, 1]),
}


class Made:
    """Tensors of a call, as its fields want them; what they hold does not matter."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = SimpleNamespace(**fields)
        one = self.fields
        self.rows = (one.sequences * one.length,) if one.packed else (one.sequences, one.length)

    def lying(self, place: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros that start 16 bytes, or a number behind."""
        size, shift = torch.Size(shape).numel(), int(place in self.fields.unaligned)
        return torch.zeros(size + shift, dtype=dtype)[shift:].view(shape)

    def logits(self, width: int, dtype: torch.dtype) -> Tensor:
        """``[..., width]``, maybe with gaps between rows or sequences the other way round."""
        one = self.fields
        shape = self.rows[::-1] if one.transposed else self.rows
        wide = self.lying("logits", (*shape, width + one.gaps), dtype)[..., :width]
        return (wide.transpose(0, 1) if one.transposed and not one.packed else wide).requires_grad_()

    def values(self, kind: str, dtype: torch.dtype) -> Tensor | None:
        """Of tokens or sequences."""
        if kind == "none":
            return None
        if kind == "token":
            return self.lying("rows", self.rows, dtype)
        return self.lying("sequences", (self.fields.sequences,), dtype)

    def count(self) -> Any:
        """Of the whole batch."""
        dtype = self.fields.counts
        return torch.ones((), dtype=dtype) if isinstance(dtype, torch.dtype) else dtype

    def support(self) -> ek.SamplingSupport | None:
        """One kept token for each row."""
        count, dtype = self.fields.sequences * self.fields.length, self.fields.support
        if dtype is None:
            return None
        return ek.SamplingSupport(self.lying("rows", (count,), dtype), torch.arange(count + 1))

    def arguments(self) -> dict[str, Any]:
        """By the names of the public functions' parameters."""
        one = self.fields
        wide = torch.float64 if one.dtype == torch.float64 else torch.float32
        groups = one.groups if isinstance(one.groups, int) else self.values("sequence", one.groups)
        return {
            "logits": self.logits(one.vocab, one.dtype), "hidden": self.logits(16, one.dtype),
            "weight": torch.zeros(one.vocab, 16, dtype=one.dtype, requires_grad=True),
            "log_probs": self.lying("logits", self.rows, wide).requires_grad_(),
            "tokens": self.values("token", one.tokens), "advantages": self.values(one.advantages, one.numbers),
            "mask": None if one.mask is None else self.values("token", one.mask),
            "old_log_probs": self.values(one.old, one.numbers), "ref_log_probs": self.values(one.ref, one.numbers),
            "rollout_weights": self.values(one.weights, one.numbers),
            "temperature": 0.7 if one.heat == "none" else self.values(one.heat, one.numbers),
            # Of kept tokens torch's own operations go by what kernels, stubbed here, would have written.
            "support": self.support(), "vocab_size": one.vocab - 1 if one.padded and one.support is None else None,
            "cu_seqlens": torch.arange(one.sequences + 1) * one.length if one.packed else None,
            "config": one.config, "num_tokens": self.count(), "num_sequences": self.count(),
            "groups": groups, "rewards": self.values("sequence", one.numbers),
            "correct": self.values("sequence", torch.bool) if one.correct else None,
            "entropy": self.values("token", wide) if one.entropy else None,
            "entropy_mask": self.values("token", torch.bool) if one.entropy_mask else None,
            "recipe": ek.Recipe(advantage=one.rule, loss=one.config), "metrics": one.metrics,
            "return_entropy": one.entropy, "inplace_grad": one.in_place, "backend": "triton",
        }  # fmt: skip


def called(fields: dict[str, Any]) -> None:
    """Make a call, and its gradient; what is refused launches nothing."""
    made = Made(fields)
    one = made.fields
    if one.function == "empty":
        launch_log_probs(torch.float32, one.packed, one.config, Size(0, one.length))
        launch_groups(torch.float32, one.rule, one.packed, Size(0, one.length))
    elif one.function == "rescale":
        backend.rescale_(made.logits(one.vocab, one.dtype).detach(), made.lying("upstream", (), one.numbers), 2.0)
    else:
        function = getattr(ek, one.function)
        given = made.arguments()
        if one.function == "group_advantages":
            given["config"] = one.rule
        names = function.__code__.co_varnames[: function.__code__.co_argcount + function.__code__.co_kwonlyargcount]
        with contextlib.suppress(ValueError, TypeError):
            backwards(function(**{name: value for name, value in given.items() if name in names}), made)


def backwards(result: Any, made: Made) -> None:
    """Backward from a result with a gradient that lies somewhere."""
    values = result.loss if isinstance(result, ek.LossOutput) else getattr(result, "log_probs", None)
    if values is None or not values.requires_grad or not made.fields.backward:
        return
    upstream = made.lying("upstream", tuple(values.shape), values.dtype)
    torch.autograd.backward(values, upstream + made.fields.upstream if upstream.dim() == 0 else upstream)


def neighbours(config: ek.PolicyLossConfig) -> Iterator[ek.PolicyLossConfig]:
    """Configs that differ in one choice that kernels are compiled for."""
    chosen = {"surrogate": ("clip", "cispo"), "kl": ("k1", "k3"), "kl_times_ratio": (False, True)}
    for name, choices in (chosen | {"entropy_coef": (0.0, 0.01), "reduction": ("token_mean", "sum")}).items():
        for choice in choices:
            with contextlib.suppress(ValueError):
                yield ek.PolicyLossConfig(**config.to_dict() | {name: choice})


@st.composite
def calls(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A call, others of which each differs from it in a field, and itself again."""
    first = {name: draw(field) for name, field in FIELDS.items()}
    others = [first | {name: draw(field)} for name, field in FIELDS.items()]
    others += [first | {"config": config} for config in neighbours(first["config"])]
    return [first, *(other for other in others if other != first), first]


def check_calls(examples: int = 400, left_out: tuple[str, int] | None = None) -> list[str]:
    """Names of the kernels that were launched from memory, all of which Triton would have launched."""
    assert not triton.knobs.runtime.interpret
    counted: list[str] = []
    # What is known to go wrong need not be made small.
    phases = (Phase.generate,) if left_out else (Phase.generate, Phase.shrink)
    with compared(counted, left_out) as place:

        @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(calls())
        def check(made: list[dict[str, Any]]) -> None:
            launcher._known.clear()
            for fields in made:
                place.number = fields["device"]
                called(fields)

        check()
    return counted


def unnoticed(parts: dict[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    """Of host functions and places in their keys, those that can be left out without `check_calls` raising."""
    found = []
    for function, places in parts.items():
        for place in places:
            try:
                check_calls(1600, (function, place))
            except Other:
                continue
            found.append((function, place))
    return found
