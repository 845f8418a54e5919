"""Faults that `egpo-kernels check` must find: a setting left out, a bound not held, a kind of batch not thought of."""

import inspect

import pytest
import torch

from egpo_kernels import portable
from egpo_kernels.api import groups
from egpo_kernels.command import checks
from egpo_kernels.config.results import Rows
from egpo_kernels.engine import losses
from egpo_kernels.inputs.segments import Segments

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def every():
    return {check.what: check for check in checks.checks(torch.device("cpu"), True)}


def broken(monkeypatch, name, before=None, after=None, where=portable):
    """Have a function called with arguments that ``before`` changed, its result changed by ``after``."""
    original = getattr(where, name)

    def wrong(*arguments):
        bound = inspect.signature(original).bind(*arguments).arguments
        if before is not None:
            bound |= before(bound)
        found = original(**bound)
        return found if after is None else after(found, bound)

    monkeypatch.setattr(where, name, wrong)


def rows(change):
    return lambda given: {"rows": given["rows"]._replace(**change(given))}


def without(field):
    """What rows are made of, as if the caller had not given a field."""
    place = Rows._fields.index(field)

    def change(given):
        material = given["material"]
        return {"material": material._replace(given=[*material.given[:place], None, *material.given[place + 1 :]])}

    return change


def config(**settings):
    return lambda given: {"config": type(given["config"])(**given["config"].to_dict() | settings)}


def constant(**values):
    return lambda given: values


def unlike_reference(**changes):
    """What the engine was given for a backend is lost, as if the backend had not heard of it."""

    def change(given):
        backend = given["backend"] if "backend" in given else given["call"].backend
        if backend == "reference":
            return {}
        for name in ("options", "per_token"):
            if name in given and set(changes) <= set(given[name]._fields):
                return {name: given[name]._replace(**changes)}
        return changes

    return change


def opposite_signs(given):
    """To trim where the other sign of the advantage would: minus the loss of minus the advantages."""
    return {"rows": given["rows"]._replace(advantages=-given["rows"].advantages)}


def negated(found, given):
    loss, vector, slope, *others = found
    return -loss, vector, -slope, *others


def k1_falling(found, given):
    """The derivative of minus the estimate."""
    loss, vector, slope, *others = found
    return loss, vector, slope - 2 * given["config"].kl_coef * given["rows"].factor * given["rows"].mask, *others


def last_masked(given):
    mask = given["rows"].mask.clone()
    offsets = given["segments"].bounds(mask.device)
    mask.view(-1)[(offsets[1:] - 1)[offsets[1:] > offsets[:-1]]] = False
    return {"rows": given["rows"]._replace(mask=mask)}


def only_by_log_prob(given):
    slope, bonus = given["upstream"]
    return {} if bonus is None else {"upstream": [slope, torch.where(slope == 0, 0.0, bonus)]}


def zeroed_without_slope(found, given):
    rows, config = portable.token_rows(given["material"]), given["material"].purpose.config
    log_probs = portable.row_statistics(given["logits"], rows, given["temperature"], False)[0]
    segments = Segments(len(log_probs), 1)
    slope, _ = portable.policy_loss_gradient(log_probs, rows, segments, config, 1.0, False)
    given["out"].view(-1, given["out"].shape[-1])[slope == 0] = 0
    return found


def never_minus_infinity(found, given):
    return (found[0].clamp(min=-1e4), *found[1:])


def finite_logits(given):
    return {"logits": given["logits"].nan_to_num(neginf=-20.0)}


TEMPERATURE = [
    ("row_statistics", "token_log_probs", "log_probs"),
    ("logits_gradient", "token_log_probs", "gradient of logits"),
    ("row_statistics", "linear_token_log_probs", "log_probs"),
]
ONE_PASS = ("logits_policy_loss, one pass", "gradient of logits")
ALWAYS_1, NO_HEAT = constant(temperature=1.0), rows(lambda given: {"temperature": None})
UNWEIGHTED = rows(lambda given: {"rollout_weights": None})
NAN_IS_0 = rows(lambda given: {"rollout_weights": torch.nan_to_num(given["rows"].rollout_weights, 0.0)})
K1_SIGN = rows(lambda given: {"ref_log_probs": 2 * given["log_probs"] - given["rows"].ref_log_probs})
AT_ONCE, SLOPE = "policy_loss_and_gradient", "gradient of log_probs"
BOTH = (AT_ONCE, "loss"), (AT_ONCE, SLOPE)
# A loss for each token has its gradient made in backward.
APART = ("policy_loss", "loss"), ("policy_loss_gradient", SLOPE)
OF_LOSS = [
    ("rollout weights", UNWEIGHTED),
    ("rollout weights", NAN_IS_0),
    ("dual clip", config(dual_clip=None)),
    ("dapo", config(clip_high=0.2)),
    ("dapo", config(clip_low=0.3)),
    ("cispo", config(clip_high=1e3)),
    ("cispo, both bounds", config(ratio_cap=1e3)),
    ("cispo, both bounds", config(clip_low=1.0)),
    ("gmpo", config(clip_low=1.0)),
    ("gmpo", config(clip_high=1e3)),
    ("bounded log-ratios", config(max_log_ratio=20.0)),
    ("kl k1, kl_max", config(kl_max=None)),
    ("kl k2, kl_max", config(kl_max=None)),
    ("kl k3, kl_max", config(kl_max=None)),
    ("kl k2", config(kl="k3")),
    ("kl_times_ratio True", config(kl_times_ratio="on_policy")),
    ("gspo", last_masked),
    ("grpo", last_masked),
]
FAULTS = [
    *((name, ALWAYS_1, None, what, output) for name, what, output in TEMPERATURE),
    ("logits_policy_loss", ALWAYS_1, None, *ONE_PASS),
    ("logits_policy_loss", without("temperature"), None, *ONE_PASS),
    *((name, NO_HEAT, None, what, output) for name, what, output in TEMPERATURE),
    *((name, change, None, f"policy_loss, {what}", out) for what, change in OF_LOSS for name, out in BOTH),
    *((name, config(clip_high=1e3), None, "policy_loss, reduction none", out) for name, out in APART),
    (AT_ONCE, config(kl_times_ratio=False), None, "policy_loss, kl_times_ratio True", SLOPE),
    (AT_ONCE, config(kl_times_ratio=False), None, "policy_loss, kl_times_ratio on_policy", SLOPE),
    (AT_ONCE, K1_SIGN, None, "policy_loss, kl k1", "loss"),
    (AT_ONCE, None, k1_falling, "policy_loss, kl k1", SLOPE),
    (AT_ONCE, opposite_signs, negated, "policy_loss, gmpo", "loss"),
    (AT_ONCE, opposite_signs, negated, "policy_loss, gmpo", SLOPE),
    ("logits_policy_loss", without("rollout_weights"), None, *ONE_PASS),
    ("logits_gradient", only_by_log_prob, None, "token_log_probs, entropy", "gradient of logits"),
    ("logits_policy_loss", None, zeroed_without_slope, "logits_policy_loss, KL and entropy bonus", "gradient"),
    ("row_statistics", None, never_minus_infinity, "token_log_probs", "log_probs"),
    ("row_statistics", finite_logits, None, "token_log_probs, entropy", "entropy"),
    ("group_advantages", constant(correct=None), None, "group_advantages, correct given", "advantages"),
    ("group_advantages", constant(tolerance=0.5), None, "group_advantages, grpo", "advantages"),
    ("group_advantages", constant(tolerance=0.0), None, "group_advantages, grpo", "advantages"),
    ("group_advantages", config(singleton="raw"), None, "group_advantages, grpo", "advantages"),
    ("group_advantages", config(singleton="zero"), None, "group_advantages, singleton raw", "advantages"),
    ("group_advantages", config(all_wrong="negative_no_correct"), None, "group_advantages, egpo", "advantages"),
    ("group_advantages", config(all_wrong="negative"), None, "group_advantages, all_wrong negative_no_correct", "base"),
    ("group_advantages", config(scale="group_std"), None, "group_advantages, lite_ppo", "advantages"),
    ("group_advantages", config(uncertainty_eps=1e-5), None, "group_advantages, other numbers", "weights"),
    (
        "group_advantages",
        lambda given: {"rewards": given["rewards"].nan_to_num(0.0, posinf=0.0)},
        None,
        "group_advantages, rloo",
        "advantages",
    ),
    (
        "group_advantages",
        lambda given: {"measured": given["measured"]._replace(mask=None, tokens=None)},
        None,
        "group_advantages, reinforce_pp_baseline",
        "advantages",
    ),
]


def ids(faults):
    return [f"{number}-{fault[0]}-{fault[-2].partition(', ')[2]}" for number, fault in enumerate(faults)]


@pytest.mark.parametrize(("name", "before", "after", "what", "output"), FAULTS, ids=ids(FAULTS))
def test_a_fault_of_a_kernel_is_found(every, monkeypatch, name, before, after, what, output):
    broken(monkeypatch, name, before, after)
    wrong = checks.verdict(every[what], "portable").wrong
    assert any(output in line for line in wrong), wrong


LEFT_OUT = [
    (groups, "advantages_of_groups", {"entropy_mask": None}, "group_advantages, egpo", "uncertainty"),
    (losses, "advantages_of_groups", {"entropy_mask": None}, "egpo_loss", "metrics"),
    (losses, "advantages_of_groups", {"correct": None}, "egpo_loss", "metrics"),
    (losses, "loss_rows", {"num_tokens": None}, "policy_loss, egpo", "loss"),
    (losses, "loss_rows", {"num_tokens": None}, "logits_policy_loss, one pass", "gradient of logits"),
    (losses, "loss_rows", {"num_sequences": None}, "policy_loss, grpo", "loss"),
    (losses, "loss_rows", {"num_sequences": None}, "policy_loss, rloo", "loss"),
    (losses, "loss_rows", {"num_sequences": None}, "policy_loss, dr_grpo", "loss"),
    (losses, "loss_rows", {"metrics": "all"}, "logits_policy_loss, in place, active rows", "metrics"),
]


@pytest.mark.parametrize(("where", "name", "lost", "what", "output"), LEFT_OUT, ids=lambda it: str(it)[:40])
def test_what_a_caller_gave_is_missed(every, monkeypatch, where, name, lost, what, output):
    broken(monkeypatch, name, unlike_reference(**lost), where=where)
    wrong = checks.verdict(every[what], "portable").wrong
    assert any(output in line for line in wrong), wrong


def test_what_breaks_nothing_is_no_fault(every, monkeypatch):
    for name in ("row_statistics", "policy_loss", "policy_loss_gradient", "group_advantages"):
        broken(monkeypatch, name, constant(), lambda found, given: found)
    for what in ("token_log_probs, entropy", "policy_loss, gspo", "group_advantages, egpo"):
        assert not checks.verdict(every[what], "portable").wrong
