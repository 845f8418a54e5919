"""docs/command.md shows what the command prints, and explains all of it."""

import re

import pytest
import torch

from egpo_kernels.command import check, checks, info
from egpo_kernels.command.main import parser
from tests.support.page import PAGES

pytestmark = pytest.mark.cpu
PAGE = PAGES["docs/command.md"]


def example(command):
    """What the page says a command prints, line by line."""
    (text,) = re.findall(rf"^```text\n\$ {re.escape(command)}\n(.*?)^```", PAGE, re.M | re.S)
    return text.splitlines()


def test_info_is_shown_as_it_is_printed():
    shown = example("egpo-kernels info")
    found = info.facts()
    titles = [line for line in shown if not line.startswith("  ")]
    assert titles == [*(section for section in found if section != "devices"), "cpu"]
    labels = [line[2:18].rstrip() for line in shown if line.startswith("  ")]
    always = {"egpo_kernels", "python", "torch", *info.NEEDED, *found["platform"], *info.describe(torch.device("cpu"))}
    assert always <= set(labels) <= always | set(info.STACKS) | {"none is set"}
    backend, why = info.auto_backend(torch.device("cpu"))
    assert [f"  {'auto takes':<16}  {backend}", f"  {'because':<16}  {why}"] == shown[-2:]


def test_check_is_shown_as_it_is_printed():
    shown = example("egpo-kernels check")
    assert shown[0].startswith("cpu: instructions ") and shown[1:4] == ["", "portable", check.HEAD.rstrip()]
    end = shown.index("", 4)
    rows = [re.split(r"  +", line) for line in shown[4:end]]
    assert [check.ROW.format(*row) for row in rows] == shown[4:end]
    every = checks.checks(torch.device("cpu"), False)
    assert [row[0] for row in rows] == [one.what for one in every]
    for (_, on, _, error, allowed, verdict), one in zip(rows, every, strict=True):
        assert on in {problem.title for problem in one.problems}
        assert float(error) <= float(allowed) and verdict == "ok"
    rates = [
        re.fullmatch(r"(.+?)  +\[256, 151936\] bfloat16 +[\d.]+ GB/s +\d+% of the copy", it)
        for it in shown[end + 1 : -2]
    ]
    assert [it[1] for it in rates] == ["plain copy", "token_log_probs, entropy", "logits_policy_loss, one pass"]
    assert shown[-2] == "" and re.fullmatch(r"all right, in \d+ s", shown[-1])


def test_every_command_of_the_page_exists():
    for command in re.findall(r"`egpo-kernels ([^`]+)`", PAGE):
        parser().parse_args(command.split())
