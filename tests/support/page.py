"""What a reader of the documentation has at hand, and the code of its pages."""

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
}


def blocks(page: str) -> list[str]:
    """The fenced Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def markdown(rows: list[list[str]]) -> str:
    """A table, its header first."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def _cut(name: str) -> tuple[str, str, str, str]:
    """The one page that holds a table, and its text around and inside it."""
    (page,) = (page for page, text in PAGES.items() if f"<!-- {name} -->" in text)
    before, rest = PAGES[page].split(f"<!-- {name} -->")
    table, after = rest.split(f"<!-- end of {name} -->")
    return page, before, table.strip(), after


def shown(name: str) -> str:
    """A table that is drawn from data, on whichever page holds it."""
    return _cut(name)[2]


def draw(name: str, table: str) -> None:
    """Put a table into the page that holds it."""
    page, before, _, after = _cut(name)
    (ROOT / page).write_text(f"{before}<!-- {name} -->\n{table}\n<!-- end of {name} -->{after}")


def run(page: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """All blocks of a page, in order, with ``names`` at hand; the names that they leave."""
    assert blocks(page), page
    space = {"__name__": Path(page).stem, **(names or {})}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, block {number}", "exec"), space)
    return space


def at_hand(device: str = "cpu") -> dict[str, Any]:
    """Sixteen answers of six tokens in two groups, a model that is a table, and what a trainer knows of them."""
    generator = torch.Generator().manual_seed(0)
    sequences, length, vocab = 16, 6, 50

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    table = normal(vocab, vocab).requires_grad_()
    input_ids = torch.randint(0, vocab, (sequences, length), generator=generator).to(device)
    mask = (torch.rand(sequences, length, generator=generator) > 0.2).to(device)
    mask[:, 0] = True

    def model(ids: torch.Tensor) -> torch.Tensor:
        return table[ids]

    logits = model(input_ids).detach().requires_grad_()
    now = logits.detach().log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 1, 0, 1] + [0.0] * 8, dtype=torch.float64, device=device)

    def near(spread: float) -> torch.Tensor:
        return now + spread * normal(*now.shape)

    return {
        "torch": torch,
        "table": table,
        "model": model,
        "optimizer": torch.optim.SGD([table], lr=0.1),
        "logits": logits,
        "hidden": normal(sequences, length, 4).requires_grad_(),
        "lm_head": torch.nn.Linear(4, vocab, bias=False, dtype=torch.float64, device=device),
        "tokens": input_ids,
        "input_ids": input_ids,
        "response_mask": mask,
        "mask": mask,
        "micro_batches": torch.arange(sequences, device=device).split(4),
        "groups": torch.arange(sequences, device=device) // 8,
        "rewards": rewards,
        "advantages": rewards - rewards.mean(),
        "old_log_probs": near(0.3),
        "sampler_log_probs": near(0.1),
        "ref_log_probs": near(0.3),
    }
