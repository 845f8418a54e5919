"""Every kernel against `reference` in float64: what is asked of it, on which batches, and what came of it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from egpo_kernels.command import calls, parts, terms, variants
from egpo_kernels.command.accuracy import Judgement, judge, unfit
from egpo_kernels.command.batches import Batch, Case, Problem, make_problem
from egpo_kernels.command.scores import make_groups, make_scores
from egpo_kernels.config.recipes import RECIPES
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig, Recipe

PLAIN = PolicyLossConfig()
# Where the ratio is clipped and the KL clamped, the gradient comes through the entropy alone.
BOTH_TERMS = PolicyLossConfig(kl_coef=0.1, kl_max=variants.KL_MAX, entropy_coef=0.01)
SCALE = 1024.0
"""Of a loss in float16, whose gradient would be too small for it; a power of two rounds nothing."""
ODD, LARGE = {"cpu": 1031, "gpu": 32003}, 151936
"""Vocabularies: one that no block divides, of several blocks, and one that no cache holds many rows of."""
TEMPERATURE = 0.7

PER_POSITION = ("log_probs", "entropy", "gradient of logits", "gradient of hidden", "gradient of log_probs")
"""Outputs that are exactly 0 where a position does not count."""


class Check(NamedTuple):
    """What is asked: a call, and the coefficients that its terms follow from."""

    what: str
    run: Callable[[Batch, str], calls.Outputs]
    coefficients: Callable[[Problem], terms.Coefficients]
    problems: list[Problem]


class Verdict(NamedTuple):
    """Of one check on all its batches: the worst of them, what was wrong where."""

    what: str
    on: str
    output: str
    worst: Judgement
    wrong: list[str]


def checks(device: torch.device, interpreted: bool) -> list[Check]:
    """All of them; interpreted on small batches."""
    cases = _cases(device, interpreted)
    problems = problems_of_logits(device, interpreted)
    # In bfloat16 too, which the interpreter does not round to as devices do.
    layers = [make_problem(device, cases[number], linear=True) for number in ((0, 1) if interpreted else (0, 2))]
    of_layers = [*_of_hidden(layers), *_of_kept(device, cases[0]), *_of_parts(problems[:1])]
    return [*of_logits(problems), *of_layers, *_of_log_probs(device), *_of_groups(device)]


def problems_of_logits(device: torch.device, interpreted: bool) -> list[Problem]:
    """What the kernels over logits are checked on."""
    return [make_problem(device, case) for case in _cases(device, interpreted)]


def _cases(device: torch.device, interpreted: bool) -> list[Case]:
    odd = ODD["cpu" if device.type == "cpu" else "gpu"]
    length, short = 3 if interpreted else 8, 2 if device.type == "cpu" else 16
    cases = [
        Case(torch.float32, odd, length, temperature=TEMPERATURE),
        Case(torch.float16, odd, length, packed=True),
        Case(torch.bfloat16, odd, length, packed=True),
        Case(torch.bfloat16, LARGE, short),
    ]
    return cases[:2] if interpreted else cases


def _loss(what: str, problems: list[Problem], recipe: Recipe | PolicyLossConfig, **options: Any) -> Check:
    old, times = options.get("old", True), options.get("times", 1.0)
    size = partial(terms.of_loss, recipe=recipe, old=old, times=times)
    return Check(what, partial(calls.loss, recipe=recipe, **options), size, problems)


def of_logits(problems: list[Problem]) -> Iterator[Check]:
    """Those of the kernels over logits."""
    for entropy, name in ((False, "token_log_probs"), (True, "token_log_probs, entropy")):
        yield Check(name, partial(calls.token_log_probs, entropy=entropy), terms.of_log_probs, problems)
    yield Check("token_log_probs, no gradient", calls.scores, terms.of_log_probs, problems)
    loss = partial(_loss, problems=problems)
    scaled: dict[str, Any] = {"times": SCALE, "grad_scale": SCALE}
    yield loss("logits_policy_loss, one pass", recipe=PLAIN, **scaled)
    yield loss("logits_policy_loss, in place, active rows", recipe=PLAIN, inplace=True, metrics="active", **scaled)
    yield loss(
        "logits_policy_loss, on-policy, other upstream", recipe=PLAIN, old=False, times=-2 * SCALE, grad_scale=SCALE
    )
    yield loss("logits_policy_loss, KL and entropy bonus", recipe=BOTH_TERMS, **scaled)
    pooled = PolicyLossConfig(ratio="sequence")
    yield loss("logits_policy_loss, sequence ratio, no metrics", recipe=pooled, times=SCALE, metrics="none")
    yield loss("egpo_loss", recipe=RECIPES["egpo"], **scaled)
    yield loss("egpo_loss, on-policy", recipe=RECIPES["egpo"], old=False, **scaled)


def _of_hidden(problems: list[Problem]) -> Iterator[Check]:
    yield Check("linear_token_log_probs", partial(calls.token_log_probs, entropy=True), terms.of_log_probs, problems)
    loss = partial(_loss, problems=problems, times=SCALE, grad_scale=SCALE)
    yield loss("linear_policy_loss, head trains", recipe=PLAIN)
    yield loss("linear_policy_loss, head frozen", recipe=PLAIN, trains=False)
    yield loss("linear_policy_loss, sequence ratio", recipe=PolicyLossConfig(ratio="sequence"))
    yield loss("linear_policy_loss, sequence ratio, frozen", recipe=PolicyLossConfig(ratio="sequence"), trains=False)
    yield loss("linear_egpo_loss", recipe=RECIPES["egpo"])


def _of_kept(device: torch.device, case: Case) -> Iterator[Check]:
    """Rows with a record of what a sampler kept, and without."""
    on, of_hidden = ([make_problem(device, case._replace(kept=True), linear)] for linear in (False, True))
    scores = partial(calls.token_log_probs, entropy=True)
    yield Check("token_log_probs, kept tokens", scores, terms.of_log_probs, on)
    yield _loss("logits_policy_loss, kept tokens", on, PLAIN)
    yield _loss("linear_policy_loss, kept tokens", of_hidden, PLAIN)


def _of_parts(problems: list[Problem]) -> Iterator[Check]:
    """A vocabulary of which each rank has a part."""
    yield Check("token_log_probs, vocabulary in parts", parts.token_log_probs, terms.of_log_probs, problems)


def _of_log_probs(device: torch.device) -> Iterator[Check]:
    def check(name: str, config: PolicyLossConfig, on: list[Problem]) -> Check:
        run, size = partial(calls.policy_loss, config=config), partial(terms.of_loss, recipe=config)
        return Check(f"policy_loss, {name}", run, size, on)

    scores = [make_scores(device, packed) for packed in (False, True)]
    for name, config in variants.losses().items():
        yield check(name, config, scores)
    yield check("rollout weights", PLAIN, [make_scores(device, False, weighted=True)])


def _of_groups(device: torch.device) -> Iterator[Check]:
    def check(name: str, config: AdvantageConfig, on: list[Problem]) -> Check:
        return Check(
            f"group_advantages, {name}", partial(calls.group_advantages, config=config), terms.of_log_probs, on
        )

    batches = [make_groups(device, packed) for packed in (False, True)]
    for name, config in variants.advantages().items():
        yield check(name, config, batches)
    yield check("correct given", RECIPES["egpo"].advantage, [make_groups(device, False, judged=True)])


def verdict(check: Check, backend: str) -> Verdict:
    """Run it, and the reference twice; a call that raises is wrong."""
    found: list[tuple[str, str, Judgement]] = []
    for problem in check.problems:
        try:
            found += [(problem.title, name, one) for name, one in _judged(check, problem, backend)]
        except Exception as error:
            found.append((problem.title, "call", unfit(f"{type(error).__name__}: {error}")))
    on, output, worst = max(found, key=lambda one: (bool(one[2].wrong), one[2].share))
    wrong = [f"{check.what} on {title}: {name}: {one.wrong}" for title, name, one in found if one.wrong]
    return Verdict(check.what, on, output, worst, wrong)


def _judged(check: Check, problem: Problem, backend: str) -> Iterator[tuple[str, Judgement]]:
    exact = check.run(problem.exact, calls.REFERENCE)
    plain, found = (check.run(problem.given, one) for one in (calls.REFERENCE, backend))
    sizes = terms.of_outputs(problem, check.coefficients(problem), exact)
    if found.keys() != exact.keys():
        yield "outputs", unfit(f"{sorted(found)} where reference has {sorted(exact)}")
    for name in [name for name in exact if name in found]:
        yield name, judge(found[name], plain[name], exact[name], sizes[name])
        if name in PER_POSITION and found[name][~problem.given.mask].any():
            yield name, unfit("not 0 at positions that the mask leaves out")
