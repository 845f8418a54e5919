"""A vocabulary whose columns two processes share: what is expected of each, and what they send one another."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import egpo_kernels as ek
from tests.integrations.ranks import RANKS
from tests.support.accuracy import assert_accurate
from tests.support.case import Case
from tests.support.make_case import make_case
from tests.support.runs import alone
from tests.support.terms import token_terms

VOCAB, PADDED, WIDTH = 60, 64, 16

Sent = list[tuple[str, int]]
"""Collectives and the bytes of the buffer that a rank gives each, in their order."""


class Sending(TorchDispatchMode):
    """Collects what is sent while it is on: functional collectives here, others as the process group is called."""

    sent: ClassVar[Sent] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        name = str(function).removeprefix("_c10d_functional.").split(".")[0].removesuffix("_into_tensor")
        if str(function).startswith("_c10d_functional") and name in ("all_reduce", "all_gather"):
            self.sent.append((name, args[0].nbytes))
        return function(*args, **(kwargs or {}))

    @classmethod
    def watch(cls) -> None:
        for method, place in {"allreduce": 0, "all_gather_single": 1, "reduce_scatter_single": 1}.items():
            setattr(dist.ProcessGroup, method, cls._watched(method, place))

    @classmethod
    def _watched(cls, method: str, place: int) -> Callable[..., Any]:
        real = getattr(dist.ProcessGroup, method)
        name = method.removesuffix("_single").replace("allreduce", "all_reduce")

        def called(group: Any, *given: Any) -> Any:
            tensor = given[place][0] if isinstance(given[place], list) else given[place]
            cls.sent.append((name, tensor.nbytes))
            return real(group, *given)

        return called


def sent_by(function: Callable[[], Any]) -> tuple[Any, Sent]:
    """A result, and what was sent for it."""
    Sending.sent.clear()
    with Sending():
        found = function()
    return found, list(Sending.sent)


class Expected(NamedTuple):
    """A whole result by the plainest code in its own dtype and in float64, and the sizes of its terms."""

    plain: Tensor
    exact: Tensor
    terms: Tensor

    def hold(self, actual: Tensor, name: str, part: Any = ...) -> None:
        """Hold a rank's ``part`` to the accuracy rule."""
        assert_accurate(actual, self.plain[part], self.exact[part], self.terms.expand(self.exact.shape)[part], name)


class Problem(NamedTuple):
    """A case whose logits are ``hidden @ weight.T``, exact in float32, and what is expected of it."""

    case: Case
    hidden: Tensor
    weight: Tensor
    expected: dict[str, Expected]

    @property
    def shard(self) -> Tensor:
        """This rank's columns of the logits, a leaf."""
        return self.case.logits[..., columns()].clone().requires_grad_()

    @property
    def tokens(self) -> int:
        return self.case.tokens.numel()

    def hold(self, part: dict[str, Any], **actual: Tensor | None) -> None:
        """Hold results to the accuracy rule, of which this rank has this ``part``, or all."""
        for name, value in actual.items():
            assert value is not None, name
            self.expected[name].hold(value.detach(), name, part.get(name, ...))

    def hold_scores(self, *scores: Tensor) -> None:
        """Log-probs and maybe entropy, where tokens count."""
        counted = self.case.counted.view(self.case.tokens.shape)
        for name, value in zip(("log_probs", "entropy"), scores, strict=False):
            self.hold({}, **{name: torch.where(counted, value, 0.0)})

    def loss(self, log_probs: Tensor, entropy: Tensor | None = None) -> Tensor:
        """The policy loss of others' log-probs."""
        case = self.case
        given = {**case.loss_arguments(), "entropy": entropy, "config": case.recipe.loss}
        return ek.policy_loss(log_probs, advantages=case.advantages, mask=case.mask, **given).loss

    def our_loss(self, logits: Tensor, **given: Any) -> Tensor:
        case = self.case
        given |= {**case.loss_arguments(), "config": case.recipe.loss, "metrics": "none"}
        return ek.logits_policy_loss(logits, case.tokens, case.advantages, case.mask, **given).loss

    def our_linear_loss(self, hidden: Tensor, weight: Tensor, **given: Any) -> Tensor:
        case = self.case
        given |= {**case.loss_arguments(), "config": case.recipe.loss, "metrics": "none"}
        return ek.linear_policy_loss(hidden, weight, case.tokens, case.advantages, case.mask, **given).loss


def columns() -> slice:
    """Those of this rank, padding included."""
    return slice(dist.get_rank() * PADDED // RANKS, (dist.get_rank() + 1) * PADDED // RANKS)


def make_problem(recipe: ek.Recipe, dtype: torch.dtype = torch.float32, vocab: int = PADDED) -> Problem:
    """The same on all ranks; ``vocab`` columns count."""
    case = make_case(11, group_sizes=(4, 3), length=6, vocab=VOCAB, recipe=recipe, temperature="one", old="near")
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/32 below 32: no product is rounded.
    hidden = torch.randint(-8, 9, (*case.tokens.shape, WIDTH), generator=generator) / 4
    weight = torch.randint(-8, 9, (PADDED, WIDTH), generator=generator) / 8
    logits = (hidden @ weight.T).to(dtype)[..., :vocab]
    # With an advantage of 0 a row may be left out.
    moved = case.replace(logits=logits, advantages=case.advantages + 0.5)
    shift = (moved.log_probs() - case.log_probs()).view(case.tokens.shape)
    names = [name for name in ("old_log_probs", "ref_log_probs") if getattr(case, name) is not None]
    case = moved.replace(**{name: (getattr(case, name) + shift).float() for name in names})
    return Problem(case, hidden, weight, expect(case, hidden, weight[:vocab]))


def expect(case: Case, hidden: Tensor, weight: Tensor) -> dict[str, Expected]:
    """By `reference`, and for the layer by autograd."""
    double, counted = case.double(), case.counted.view(case.tokens.shape)
    given = torch.where(case.counted, double.rows(case.advantages), 0.0)
    terms = token_terms(double, given, torch.zeros_like(given))
    size = (terms.logits * case.upstream.abs()).view(case.logits.shape)
    plain, exact = alone(case, "reference"), alone(double, "reference")
    scores = [
        ek.token_log_probs(each.logits, case.tokens, mask=counted, return_entropy=True, backend="reference")
        for each in (case, double)
    ]
    found = {
        "loss": Expected(plain["loss"], exact["loss"], terms.loss.sum()),
        "logits": Expected(plain["gradient"], exact["gradient"], size),
        "log_probs": Expected(scores[0][0], scores[1][0], terms.log_probs.view(counted.shape)),
        "entropy": Expected(scores[0][1], scores[1][1], terms.entropy.view(counted.shape)),
    }
    if case.logits.dtype == torch.float32:
        for name, product, other in (("hidden", "stv,vh->sth", weight), ("weight", "stv,sth->vh", hidden)):
            found[name] = Expected(
                torch.einsum(product, plain["gradient"], other),
                torch.einsum(product, exact["gradient"], other.double()),
                torch.einsum(product, size + exact["gradient"].abs(), other.double().abs()),
            )
    return found


def told(rows: int) -> tuple[str, int]:
    """Our one exchange: 4 numbers a row, and a header for up to 1024 rows."""
    return "all_gather", 16 * (rows + 1)


def reduced(rows: int, *numbers: int) -> Sent:
    """All-reduces of so many float32 a row."""
    return [("all_reduce", 4 * count * rows) for count in numbers]
