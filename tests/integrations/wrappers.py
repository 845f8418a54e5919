"""What tests put around a model and its head, and the model."""

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.integrations.models import Batch, make_batch, make_model


def pair(name: str = "Llama") -> tuple[nn.Module, Batch]:
    """A model in float64 and a batch for it."""
    model = make_model(name)
    batch = make_batch(model).double()
    return model.double(), batch


def patch(module: nn.Module, wrapper: Callable[..., Any]) -> None:
    """Put a function in place of a module's forward, on the instance."""
    module.forward = wrapper(module.forward)


def halved(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that scales what another gives."""
    return lambda *inputs, **named: forward(*inputs, **named) * 0.5
