"""An output layer that tensor parallelism splits over the vocabulary: by torch's hooks, or by transformers' own.

What stands before the head's product runs in a fused call too: it brings whole hidden states, and sums their gradient.
What stands behind it moves logits from rank to rank, of which a fused call has none: there it is left out.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from egpo_kernels.inputs.validation import is_distributed
from egpo_kernels.integrations.fused_call import thread
from egpo_kernels.integrations.heads import head_arguments
from egpo_kernels.parallel.reading import describe

IN_HOOKS, IN_FORWARD = "transformers.integrations.tensor_parallel", "transformers.distributed.tensor_parallel"
"""Where transformers has its styles, by version: the older puts them into hooks, the later around a forward."""
STYLES = ("torch.distributed.tensor.parallel.", IN_HOOKS, IN_FORWARD)
"""Modules whose functions around a head move its tensors from rank to rank, and leave numbers alone."""
REGISTER = ("torch.distributed.tensor._api", IN_HOOKS)
"""Modules that register hooks around others' functions."""


class Plan(NamedTuple):
    """A head that transformers' tensor parallelism splits: its style, over which ranks, and ids of the vocabulary.

    ``within``: whether the style stands in the head's forward, where later versions have it, and not in its hooks.
    """

    style: Any
    mesh: Any
    vocab: int
    within: bool

    def received(self, head: Any, hidden: Any) -> Any:
        """Hidden states as the style hands them to the product."""
        if not self.within:
            return hidden  # as the hook before left them
        return self.style.transform_inputs_pre_forward(head, (hidden,), {}, self.mesh)[0][0]

    def columns(self, rows: int) -> dict[str, Any]:
        """Where the ``rows`` of a plain weight are; transformers gives all ranks but the last as many.

        Raises:
            ValueError: It has others: a head that is tied to embeddings stays whole.
        """
        ranks, rank = self.mesh.size(), self.mesh.get_local_rank()
        most = -(-self.vocab // ranks)
        start = min(rank * most, self.vocab)
        expected = min(most, self.vocab - start)
        if rows != expected:
            raise ValueError(
                f"the head's weight has {rows} rows on rank {rank} of {ranks}, and its plan splits {self.vocab}; it "
                f"must have {expected}: leave lm_head out of tp_plan where its weight is that of whole embeddings"
            )
        even = {"vocab_group": self.mesh.get_group(), "hidden_grad": "partial"}
        return even if ranks * most == self.vocab else even | {"vocab_start": start, "vocab_size": self.vocab}


def origin(function: Any) -> Any:
    """What a hook calls in the end: partials and the lambdas of `REGISTER` are others' functions."""
    inner = getattr(function, "func", function)
    if inner is _unless_fused:
        return origin(function.args[0])
    if getattr(inner, "__module__", None) in REGISTER and inspect.isfunction(inner):
        inside = inspect.getclosurevars(inner).nonlocals
        inner = inside.get("input_fn", inside.get("output_fn", inner))
    return inner if inner is function else origin(inner)


def module_of(function: Any) -> str:
    """The module in which a function or a callable's type was written."""
    found = origin(function)
    return str(getattr(found, "__module__", None) or type(found).__module__)


def moves(function: Any) -> bool:
    """Whether a hook is one of `STYLES`."""
    return module_of(function).startswith(STYLES)


def aside(hook: Any) -> Any:
    """A head's forward hook, which a fused call goes by where it `moves` logits."""
    known = getattr(hook, "func", None) is _unless_fused
    return functools.partial(_unless_fused, hook) if moves(hook) and not known else hook


def _unless_fused(hook: Callable[..., Any], head: Any, *given: Any) -> Any:
    return None if thread() in head._policy_calls else hook(head, *given)


def product(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What transformers has put a style around; any other forward is returned as it is."""
    inside = _inside(forward)
    return inside["original_forward"] if inside else forward


def _inside(forward: Any) -> dict[str, Any]:
    if not (inspect.isfunction(forward) and forward.__module__ == IN_FORWARD):
        return {}
    return dict(inspect.getclosurevars(forward).nonlocals)


def plan_of(model: Any, head: Any) -> Plan | None:
    """How transformers splits a model's head; None: it does not, though others may.

    Raises:
        ValueError: By a style that does more than split the vocabulary, or is not known.
    """
    inside, hooked = _inside(head.forward), "_hf_tp_plan" in head.__dict__
    if inside:
        style, mesh = inside["self"], inside["mesh"]
    elif hooked:
        from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

        style, mesh = ALL_PARALLEL_STYLES[head._hf_tp_plan], head._hf_device_mesh
    else:
        return head.__dict__.get("_policy_plan")  # of a forward that is within ours
    kind = type(style)
    if kind.__name__ == "TensorParallelLayer" and kind.__module__.startswith(STYLES):
        return None  # which leaves all as it is
    if kind.__name__ != "ColwiseParallel" or not kind.__module__.startswith(STYLES):
        raise ValueError(
            f"the head's style in tp_plan is a {kind.__module__}.{kind.__name__}; it must be 'colwise' or "
            "'colwise_gather_output', or lm_head must be left out of the plan"
        )
    return Plan(style, mesh, model.config.get_text_config().vocab_size, bool(inside))


def met(head: Any, hidden: Any) -> tuple[Any, dict[str, Any]]:
    """This rank's hidden states, and what they meet, as arguments of a linear function.

    Raises:
        ValueError: A weight that is split in another way.
    """
    found, plan = head_arguments(head), head.__dict__.get("_policy_plan")
    if plan is not None:
        hidden = plan.received(head, hidden)
    weight = found["weight"]
    if not is_distributed(weight):
        return hidden, found if plan is None else found | plan.columns(weight.shape[0])
    mesh = weight.device_mesh
    meant = hidden.device_mesh if is_distributed(hidden) else getattr(plan, "mesh", None)
    if meant != mesh or not (weight.placements[0].is_replicate() or weight.placements[0].is_shard(0)):
        return hidden, found  # which the function refuses, and says what it must be
    if mesh.ndim > 1:
        raise ValueError(
            f"the head's weight is {describe(weight)} in its forward; it must be split by a mesh of one dimension: "
            "mesh['tp'], with fully_shard over the others"
        )
    split = weight.placements[0].is_shard()
    if is_distributed(hidden):
        hidden = _whole(hidden, split)
    return hidden, found | ({"vocab_group": mesh.get_group(), "hidden_grad": "partial"} if split else {})


def _whole(hidden: Any, partial: bool) -> Tensor:
    """All hidden states of a DTensor, which sums their gradient where that is ``partial``, and parts it."""
    from torch.distributed.tensor import Partial, Replicate

    whole: Tensor = hidden.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial() if partial else Replicate()])  # type: ignore[attr-defined]
