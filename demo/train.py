"""One training step: sample, reward, advantages over whole groups, then a loss for each micro-batch.

Shapes: P prompts a step, G answers a prompt, S = P * G answers, T padded answer length.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import egpo_kernels
from demo.model import Answers, LanguageModel, Prompts
from demo.settings import Settings
from demo.tasks import TASKS, Problem, ProblemSet, extract_answer
from egpo_kernels import recipes

GROUP_SIZE = 8
MICRO_BATCH_PROMPTS = 2
TEMPERATURE = 1.0
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
COMPARED = (recipes.EGPO, recipes.GRPO)


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind: a record of numbers, and a record for each of its S answers."""

    record: dict
    rollouts: list[dict]


class Trainer:
    """The policy, its optimizer and the stream of problems."""

    def __init__(self, policy: LanguageModel, problems: ProblemSet, settings: Settings):
        self.policy = policy
        self.problems = problems
        self.settings = settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE)

    def step(self, number: int) -> StepResult:
        """Samples P * G answers, takes one optimizer step on them; `number` counts from 1."""
        start = time.perf_counter()
        problems = self.problems.next_batch()
        prompts = self.policy.encode([problem.prompt for problem in problems])
        answers = self.policy.sample(prompts, GROUP_SIZE, TEMPERATURE, self.settings.top_p, self.generator)
        asked = [problem for problem in problems for _ in range(GROUP_SIZE)]
        rewards = torch.tensor([problem.reward(text) for problem, text in zip(asked, answers.texts, strict=True)])
        group = self._advantages(self.settings.recipe, rewards, answers)
        # Every step samples anew and updates once, so a later one would say the same, at the price of a forward.
        drift = {"drift": self._drift(prompts, answers)} if number == 1 else {}
        loss, policy_metrics = self._backward(prompts, answers, group.advantages)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        record = {
            "kind": "step",
            "step": number,
            "reward": rewards.mean().item(),
            "loss": loss,
            **drift,
            "grad_norm": grad_norm.item(),
            "share_with_gradient": {
                recipe.name: (self._advantages(recipe, rewards, answers).advantages != 0).float().mean().item()
                for recipe in COMPARED
            },
            "untagged": egpo_kernels.response_spans(
                answers.tokens, self.policy.thinking_tag, answers.mask
            ).untagged.item(),
            "metrics": {key: value.item() for key, value in {**group.metrics, **policy_metrics}.items()},
            "seconds": time.perf_counter() - start,
        }
        return StepResult(record, _rollouts(number, asked, answers, rewards, group))

    def evaluate(self, number: int) -> dict:
        """Mean reward of greedy answers to the held-out problems, after `number` optimizer steps."""
        problems = self.problems.held_out
        texts = self.policy.greedy(self.policy.encode([problem.prompt for problem in problems]))
        rewards = {task.label: [] for task in TASKS}
        for problem, text in zip(problems, texts, strict=True):
            rewards[problem.task.label].append(problem.reward(text))
        return {
            "kind": "held_out",
            "step": number,
            "reward": sum(map(sum, rewards.values())) / len(problems),
            "prompts": len(problems),
            "by_task": {label: {"reward": sum(r) / len(r), "prompts": len(r)} for label, r in rewards.items()},
        }

    def _advantages(self, recipe: recipes.Recipe, rewards: torch.Tensor, answers: Answers):
        """Advantages and their company over whole groups; rewards float32 [S]."""
        return egpo_kernels.group_advantages(
            GROUP_SIZE,
            rewards,
            answers.log_probs,
            answers.mask,
            entropy=answers.entropies,
            config=recipe.advantage,
        )

    def _micro_batches(self, prompts: Prompts, answers: Answers) -> Iterator[tuple[Prompts, slice, dict]]:
        """Some of the prompts, their answers, and what log-probs and losses of these are given alike."""
        for first in range(0, prompts.ids.shape[0], MICRO_BATCH_PROMPTS):
            last = first + MICRO_BATCH_PROMPTS
            rows = slice(first * GROUP_SIZE, last * GROUP_SIZE)
            support = answers.support(rows) if self.settings.replay else None
            yield (
                prompts.select(first, last),
                rows,
                {"mask": answers.mask[rows], "temperature": TEMPERATURE, "support": support},
            )

    def _drift(self, prompts: Prompts, answers: Answers) -> float:
        """Mean of |log ratio|: the loss's log-probs of the sampled tokens against the sampler's own."""
        total = 0.0
        for asked, rows, given in self._micro_batches(prompts, answers):
            log_ratio = self.policy.log_probs(asked, answers.tokens[rows], **given) - answers.log_probs[rows]
            total += log_ratio[given["mask"]].abs().sum().item()
        return total / answers.mask.sum().item()

    def _backward(self, prompts: Prompts, answers: Answers, advantages: torch.Tensor) -> tuple[float, dict]:
        """Accumulates the gradient micro-batch by micro-batch; returns the batch's loss and merged metrics."""
        loss, metrics = 0.0, []
        for asked, rows, given in self._micro_batches(prompts, answers):
            # One optimizer step a batch: the policy that sampled is the one trained, so there are no old log-probs.
            # Only after truncated sampling: the ratio to the sampler's is 1 there if what was kept is replayed.
            output = self.policy.loss(
                asked,
                answers.tokens[rows],
                advantages=advantages[rows],
                old_log_probs=None if answers.kept is None else answers.log_probs[rows],
                config=self.settings.recipe.loss,
                num_tokens=answers.mask.sum(),
                num_sequences=len(answers.texts),
                **given,
            )
            output.loss.backward()
            loss += output.loss.item()
            metrics.append(output.metrics)
        return loss, egpo_kernels.combine_metrics(metrics)


def _rollouts(number: int, asked: list[Problem], answers: Answers, rewards: torch.Tensor, group) -> list[dict]:
    """One record an answer, with its tokens that count, their log-probs and entropies, and what was kept for them."""
    return [
        {
            "step": number,
            "group": index // GROUP_SIZE,
            "task": problem.task.label,
            "question": problem.question,
            "expected": problem.expected,
            "text": answers.texts[index],
            "extracted": extract_answer(answers.texts[index]),
            "reward": rewards[index].item(),
            "uncertainty": group.uncertainty[index].item(),
            "weight": group.weights[index].item(),
            "base_advantage": group.base[index].item(),
            "advantage": group.advantages[index].item(),
            "tokens": answers.tokens[index][answers.mask[index]].tolist(),
            "ended": answers.ended[index].item(),
            "log_probs": answers.log_probs[index][answers.mask[index]].tolist(),
            "entropies": answers.entropies[index][answers.mask[index]].tolist(),
            **({} if answers.kept is None else {"kept": answers.kept[index]}),
        }
        for index, problem in enumerate(asked)
    ]
