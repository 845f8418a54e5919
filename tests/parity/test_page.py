"""The page for users of other trainers says what the tests run, and names what exists."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import egpo_kernels
from egpo_kernels.config.settings import AdvantageConfig, PolicyLossConfig
from tests.parity.page import PAGE, TRAINERS, drawn

FIELDS = [*dataclasses.fields(AdvantageConfig), *dataclasses.fields(PolicyLossConfig)]


def test_the_page_holds_the_tables():
    text = PAGE.read_text()
    for name in TRAINERS:
        assert f"<!-- options: {name} -->" in text and f"<!-- parity: {name} -->" in text
    assert drawn(text) == text, "run python -m tests.parity.page"


@pytest.mark.parametrize("name", TRAINERS)
def test_every_difference_is_shown_by_a_test(name):
    tree = ast.parse((Path(__file__).parent / f"test_{name}.py").read_text())
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    shown = {test for test in tests if test.startswith(f"test_{name}_")}
    assert shown == {f"test_{key}" for key in TRAINERS[name].differences}


def parameters():
    for function in vars(egpo_kernels).values():
        if inspect.isfunction(function):
            yield from inspect.signature(function).parameters


@pytest.mark.parametrize("name", TRAINERS)
def test_our_names_in_the_table_of_options_exist(name):
    names = {field.name for field in FIELDS} | set(vars(egpo_kernels)) | set(parameters()) | {"logits"}
    values = {value for field in FIELDS for value in field.metadata.get("choices", ())} | {"clamp", "mask"}
    for option in TRAINERS[name].options:
        for code in re.findall(r"`([^`]+)`", option.ours):
            assert set(re.findall(r'"(\w+)"', code)) <= values, code
            assert set(re.findall(r'(?<!["\w.])[a-z]\w*(?!["\w])', code)) <= names | values, code
