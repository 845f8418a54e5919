"""EGPO in TRL's trainer: SmolLM2-135M on small sums, on a CPU: `python -m demo.trl --steps 2`."""

import argparse
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from demo.model import LanguageModel
from demo.tasks import ProblemSet, extract_answer
from egpo_kernels.integrations.trl import EGPOTrainer

GROUP_SIZE = 8
PROMPTS = 4
SHOWN = ("loss", "grad_norm", "reward", "entropy", "egpo/uncertainty/gap/mean", "egpo/groups/all_wrong/sum")


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for an answer that is the right number and nothing else."""
    return [float(extract_answer(text) == wanted) for text, wanted in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.trl", description=__doc__)
    parser.add_argument("--recipe", default="egpo", help="the method, by name")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps, 32 answers each")
    parser.add_argument("--out", default="demo-out/trl", help="folder of TRL's output")
    given = parser.parse_args()
    problems = ProblemSet(seed=0, held_out_per_prompt=1)
    asked = [problem for _ in range(given.steps) for problem in problems.next_batch()[::2]]
    policy = LanguageModel.load(fused_linear=False)
    trainer = EGPOTrainer(
        model=policy.model,
        recipe=given.recipe,
        reward_funcs=right,
        args=GRPOConfig(
            output_dir=given.out,
            num_generations=GROUP_SIZE,
            per_device_train_batch_size=GROUP_SIZE,
            gradient_accumulation_steps=PROMPTS,
            max_completion_length=8,
            max_steps=given.steps,
            learning_rate=1e-5,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"prompt": each.prompt, "answer": each.expected} for each in asked]),
        processing_class=policy.tokenizer,
    )
    trainer.train()
    for step in trainer.state.log_history[:-1]:
        print(
            f"step {step['step']}:",
            ", ".join(f"{name} {step[name]:.4g}" for name in SHOWN if step.get(name) is not None),
        )


if __name__ == "__main__":
    main()
