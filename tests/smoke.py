"""Import, a loss and a gradient by every backend that is here, beside the reference: python tests/smoke.py

For Pythons and installs that the test suite's tools are not on.
"""

import importlib.util
import platform
from pathlib import Path

import torch

import egpo_kernels as ek


def gradients(backend: str) -> list[torch.Tensor]:
    """Loss and gradient of whole groups, from logits and from hidden states."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (4, 5), generator=generator)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    hidden, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((4, 5, 6), (11, 6)))
    logits = torch.nn.functional.linear(hidden, weight).detach().requires_grad_()
    first = ek.egpo_loss(logits, tokens, 2, rewards, backend=backend)
    second = ek.linear_egpo_loss(hidden, weight, tokens, 2, rewards, backend=backend)
    (first.loss + second.loss).backward()
    return [first.loss.detach(), second.loss.detach(), logits.grad, hidden.grad, weight.grad]


def main() -> None:
    """Compare and say what was compared."""
    triton = importlib.util.find_spec("triton") is not None
    expected = gradients("reference")
    for backend in ("auto", "portable"):
        for found, wanted in zip(gradients(backend), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    if not triton:
        try:
            gradients("triton")
            raise AssertionError("backend='triton' ran without triton")
        except RuntimeError as error:
            assert "triton is not installed" in str(error)
    here = f"Python {platform.python_version()}, torch {torch.__version__}, triton {'here' if triton else 'not'}"
    print(f"egpo_kernels {ek.__version__} of {Path(ek.__file__).parent}, {here}: fine")


if __name__ == "__main__":
    main()
