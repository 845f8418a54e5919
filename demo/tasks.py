"""Arithmetic prompts from reasoning-gym, and the reward: 1 for an extracted answer that scores exactly 1, else 0."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import reasoning_gym

# An item of a reasoning-gym dataset depends on seed + index alone, so neighbouring seeds would give the same items.
SEED_STRIDE = 1_000_003
FIXED_SEED = 1
SHOTS = 2


@dataclass(frozen=True)
class Task:
    """One reasoning-gym dataset at one difficulty, and how many of its prompts a training step takes."""

    label: str
    dataset: str
    terms: int
    digits: int
    prompts_per_step: int

    def items(self, seed: int) -> Iterator[dict]:
        """An endless stream of items; questions may repeat."""
        dataset = self._dataset(seed)
        return (dataset[index] for index in itertools.count())

    def score(self, answer: str | None, item: dict) -> float:
        """reasoning-gym's own score, 0 to 1; it gives part of a point to a text that contains the answer."""
        return self._dataset(FIXED_SEED).score_answer(answer, item)

    def _dataset(self, seed: int):
        return reasoning_gym.create_dataset(
            self.dataset,
            seed=seed,
            min_terms=self.terms,
            max_terms=self.terms,
            min_digits=self.digits,
            max_digits=self.digits,
        )


# The mix is chosen so that mixed, all-wrong and all-correct groups all occur at this model size.
TASKS = (
    Task("sum of 2", "chain_sum", terms=2, digits=1, prompts_per_step=5),
    Task("product of 2", "products", terms=2, digits=1, prompts_per_step=2),
    Task("sum of 3", "chain_sum", terms=3, digits=2, prompts_per_step=1),
)


@dataclass(frozen=True)
class Problem:
    """A question with its task and the two-shot prompt that asks it."""

    task: Task
    item: dict
    prompt: str

    @property
    def question(self) -> str:
        return self.item["question"]

    @property
    def expected(self) -> str:
        return self.item["answer"]

    def reward(self, text: str) -> float:
        """1.0 if the answer extracted from `text` scores exactly 1, else 0.0."""
        return float(self.task.score(extract_answer(text), self.item) == 1.0)


def extract_answer(text: str) -> str | None:
    """The first line of `text` when it is one integer and nothing else, else None.

    >>> extract_answer(" -12\\n"), extract_answer(" 5 apples"), extract_answer(" 1.5")
    ('-12', None, None)
    """
    match = re.fullmatch(r"\s*([+-]?\d+)\s*\.?\s*", text.split("\n")[0])
    return match.group(1) if match else None


class ProblemSet:
    """Held-out problems, the same in every run, and training problems that never ask a held-out or shown question."""

    def __init__(self, seed: int, held_out_per_prompt: int):
        self.held_out: list[Problem] = []
        self._training: list[tuple[Task, Iterator[Problem]]] = []
        for task in TASKS:
            distinct = _distinct(task.items(FIXED_SEED))
            shown = list(itertools.islice(distinct, SHOTS))
            kept = list(itertools.islice(distinct, held_out_per_prompt * task.prompts_per_step))
            prefix = "".join(_ask(item) + f" {item['answer']}\n" for item in shown)
            self.held_out += [Problem(task, item, prefix + _ask(item)) for item in kept]
            reserved = {item["question"] for item in shown + kept}
            self._training.append((task, _training_stream(task, seed, prefix, reserved)))

    def next_batch(self) -> list[Problem]:
        """The P problems of the next training step, in the order of TASKS."""
        return [next(stream) for task, stream in self._training for _ in range(task.prompts_per_step)]


def _training_stream(task: Task, seed: int, prefix: str, reserved: set[str]) -> Iterator[Problem]:
    for item in task.items(SEED_STRIDE * (seed + 1)):
        if item["question"] not in reserved:
            yield Problem(task, item, prefix + _ask(item))


def _distinct(items: Iterator[dict]) -> Iterator[dict]:
    seen = set()
    for item in items:
        if item["question"] not in seen:
            seen.add(item["question"])
            yield item


def _ask(item: dict) -> str:
    return f"Question: {item['question']}\nAnswer:"
