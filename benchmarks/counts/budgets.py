"""What our launch cases, kernels and public functions may cost. A worse figure fails
`tests/benchmarks/test_budgets.py`; a better one asks to be written down here: a limit more than `SLACK` above its
figure fails too.

The figures are those of the pinned triton (pyproject.toml): another version's compiler may land elsewhere.
"""

from typing import Any, NamedTuple

SLACK = 1.15
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of the widest load, and of every load of a sweep over the logits.
WIDTH = 16


class CaseBudget(NamedTuple):
    """Launches; passes over the logits; sums over the sweeps on sm_90, per element."""

    launches: int
    over_logits: int = 0
    read: float = 0
    read_as_issued: float = 0
    written: float = 0
    extra: float = 0
    instructions: float = 0
    special: float = 0


class KernelBudget(NamedTuple):
    """The most of any case, by target as in `TARGETS`; the stack holds nothing but spills."""

    registers: tuple[int, int, int, int]
    shared: tuple[int, int, int, int] = (0, 0, 0, 0)
    stack: tuple[int, int, int, int] = (0, 0, 0, 0)


class CallBudget(NamedTuple):
    """Launches of a public function, forward and backward: of our kernels, and of torch's own."""

    launches: int
    operations: int


# In the order of the fields above.
CASES = {
    "value": CaseBudget(4, 1, 1, 1, 0, 0, 7.5, 1.1),
    "value, entropy reported": CaseBudget(4, 1, 1, 1, 0, 0, 9.5, 1.1),
    "one pass": CaseBudget(5, 1, 1, 2, 1, 1, 13, 2.2),
    "one pass, in place": CaseBudget(5, 1, 1, 2, 1, 0, 13, 2.2),
    "one pass, entropy reported": CaseBudget(5, 1, 1, 2, 1, 1, 15.1, 2.2),
    "one pass, entropy in the loss": CaseBudget(5, 1, 1, 2, 1, 1, 17.1, 2.2),
    "one pass, another upstream gradient": CaseBudget(5, 2, 2, 3, 2, 1, 33.1, 2.2),
    "one pass, cispo": CaseBudget(5, 1, 1, 2, 1, 1, 13, 2.2),
    "one pass, sapo": CaseBudget(5, 1, 1, 2, 1, 1, 13, 2.2),
    "gmpo": CaseBudget(9, 2, 2, 2, 1, 1, 13.4, 2.2),
    "sequence ratio": CaseBudget(9, 2, 2, 2, 1, 1, 13.4, 2.2),
    "sequence ratio, in place": CaseBudget(9, 2, 2, 2, 1, 0, 13.4, 2.2),
    "token_log_probs": CaseBudget(3, 2, 2, 2, 1, 1, 13.4, 2.2),
    "token_log_probs, entropy": CaseBudget(3, 2, 2, 2, 1, 1, 17.6, 2.2),
    # Of rows that all keep some: the sweeps are compiled in, and nobody goes through them.
    "one pass, kept tokens": CaseBudget(11, 3, 0, 0, 1, 1, 40.7, 2.4),
    # Extra is the output layer and its gradient.
    "hidden states, kept tokens": CaseBudget(14, extra=44),
    "vocabulary split over ranks": CaseBudget(8, 2, 2, 2, 1, 1, 13.4, 2.2),
    "policy_loss": CaseBudget(4),
    "group_advantages": CaseBudget(3),
    "policy_loss, float64": CaseBudget(6),
    "policy_loss, float64, on-policy": CaseBudget(6),
    "group_advantages, float64": CaseBudget(3),
    "group_advantages, unweighted": CaseBudget(3),
    "group_advantages, renormalised": CaseBudget(3),
    "group_advantages, whitened": CaseBudget(5),
}

KERNELS = {
    # Shared memory of the kernels over logits: the blocks on their way. Registers are what the programs that are to
    # share a multiprocessor leave to a thread: of the one-pass kernel there is one, with 255 at the most.
    "row_statistics_kernel": KernelBudget((90, 90, 88, 56), (16384, 16384, 16384, 64)),
    "logits_gradient_kernel": KernelBudget((128, 128, 128, 59)),
    "logits_policy_loss_kernel": KernelBudget((208, 208, 208, 71), (65536, 65536, 65536, 64)),
    "token_rows_kernel": KernelBudget((62, 48, 48, 52), (4096, 4096, 4096, 32)),
    "sequence_counts_kernel": KernelBudget((32, 32, 32, 22), (32, 32, 32, 32)),
    "rescale_kernel": KernelBudget((112, 112, 96, 64)),
    "policy_loss_kernel": KernelBudget((48, 56, 56, 30), (64, 64, 64, 32)),
    "policy_loss_gradient_kernel": KernelBudget((28, 26, 26, 25)),
    "sequence_kernel": KernelBudget((49, 64, 64, 27), (128, 128, 128, 128)),
    "segment_mean_kernel": KernelBudget((34, 34, 32, 24), (64, 64, 64, 64)),
    "unscaled_base_kernel": KernelBudget((64, 64, 64, 30), (256, 256, 256, 128)),
    "group_advantages_kernel": KernelBudget((160, 160, 152, 70), (512, 512, 512, 256)),
    "kept_entries_kernel": KernelBudget((58, 58, 58, 22)),
    "kept_logits_kernel": KernelBudget((48, 50, 50, 22)),
    "kept_statistics_kernel": KernelBudget((29, 32, 30, 22)),
    "kept_gradient_kernel": KernelBudget((36, 36, 36, 22)),
    "put_kept_kernel": KernelBudget((58, 50, 50, 24), (1024, 1024, 1024, 0)),
    "kept_metrics_kernel": KernelBudget((50, 54, 54, 14)),
    "gathered_products_kernel": KernelBudget((48, 48, 48, 34), (64, 64, 64, 64)),
    "gathered_sums_kernel": KernelBudget((48, 48, 48, 32), (4096, 4096, 4096, 4096)),
    "shard_headers_kernel": KernelBudget((40, 40, 40, 29), (32, 32, 32, 32)),
    "shard_statistics_kernel": KernelBudget((71, 71, 67, 38), (16384, 16384, 16384, 64)),
    "merge_shards_kernel": KernelBudget((32, 32, 32, 19), (16, 16, 16, 8)),
    "combine_kernel": KernelBudget((120, 120, 120, 72), (1024, 1024, 1024, 2048)),
}

CALLS = {
    "egpo_loss, padded": CallBudget(8, 1),
    "group_advantages, padded": CallBudget(3, 0),
    "linear_egpo_loss, padded": CallBudget(9, 11),
    "linear_policy_loss, padded": CallBudget(6, 11),
    "linear_token_log_probs, padded": CallBudget(2, 18),
    "logits_policy_loss, padded": CallBudget(5, 1),
    "policy_loss, padded": CallBudget(4, 1),
    "token_log_probs, padded": CallBudget(2, 0),
    "logits_policy_loss, padded, no metrics": CallBudget(5, 1),
    "egpo_loss, padded, no metrics": CallBudget(7, 1),
    "egpo_loss, packed": CallBudget(8, 11),
    "group_advantages, packed": CallBudget(3, 10),
    "linear_egpo_loss, packed": CallBudget(9, 21),
    "linear_policy_loss, packed": CallBudget(6, 20),
    "linear_token_log_probs, packed": CallBudget(2, 18),
    "logits_policy_loss, packed": CallBudget(5, 10),
    "policy_loss, packed": CallBudget(4, 10),
    "token_log_probs, packed": CallBudget(2, 0),
    "logits_policy_loss, packed, no metrics": CallBudget(5, 10),
    "egpo_loss, packed, no metrics": CallBudget(7, 11),
    "token_log_probs, padded, kept tokens": CallBudget(9, 22),
    "logits_policy_loss, padded, kept tokens": CallBudget(13, 19),
    "linear_policy_loss, padded, kept tokens": CallBudget(15, 56),
    "token_log_probs, padded, split": CallBudget(4, 3),
    "logits_policy_loss, padded, split": CallBudget(8, 6),
    "linear_policy_loss, padded, split": CallBudget(10, 16),
}


def problem(owner: str, name: str, value: float, limit: float) -> str | None:
    """What is wrong with a counted figure, if anything."""
    here = f"{owner}: {name} {value:g}, budget {limit:g}"
    if value > limit:
        return f"{here}: worse than its budget"
    if value * SLACK < limit:
        return f"{here}: better than its budget by more than {SLACK - 1:.0%}; write the new figure down"
    return None


def case_problems(case: dict[str, Any]) -> list[str]:
    """What is wrong with a case of `collect.collect`."""
    sweeps = case.get("sweeps", [])
    found = CaseBudget(
        launches=len(case["launches"]),
        over_logits=sum(case["over_logits"]),
        **{name: case["passes"][name] for name in ("read", "read_as_issued", "written", "extra")},
        instructions=sum(sweep["instructions"] for sweep in sweeps),
        special=sum(sweep["special"] for sweep in sweeps),
    )
    figures = zip(CaseBudget._fields, found, CASES[case["name"]], strict=True)
    return list(filter(None, (problem(case["name"], *figure) for figure in figures)))


def kernel_problems(cases: list[dict[str, Any]], kernel: str) -> list[str]:
    """What is wrong with a kernel's largest figures of all cases."""
    found = []
    for place, target in enumerate(TARGETS):
        rows = [row for case in cases for row in case["targets"][target] if row["kernel"] == kernel]
        for name, limits in KERNELS[kernel]._asdict().items():
            found.append(problem(f"{kernel} on {target}", name, max(row[name] for row in rows), limits[place]))
    return list(filter(None, found))


def call_problems(call: dict[str, Any]) -> list[str]:
    """What is wrong with the launches of a call of `calls.cases`."""
    limits = CALLS[call["name"]]._asdict().items()
    return list(filter(None, (problem(call["name"], name, len(call[name]), limit) for name, limit in limits)))
