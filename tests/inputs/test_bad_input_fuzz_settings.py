"""Garbage in settings, recipes and metrics: refused by name, or an object that says the same when read back."""

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import egpo_kernels as ek
from tests.support import strategies
from tests.support.calls import call, valid
from tests.support.fuzz import CALM, refusal, untouched
from tests.support.garbage import GARBAGE, garbage_for

KINDS = {ek.AdvantageConfig: strategies.advantage_configs(), ek.PolicyLossConfig: strategies.loss_configs()}
FIELDS = {kind: [field.name for field in dataclasses.fields(kind) if field.init] for kind in KINDS}
ALL_FIELDS = [name for names in FIELDS.values() for name in names]
KEYS = st.one_of(st.sampled_from(ALL_FIELDS), st.sampled_from(["name", "advantage", "loss", "json", "", 3, None, (1,)]))


def attempt(make, names):
    """What ``make`` returns; None where it refuses, which must name one of ``names``."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        refusal(error, names)
        return None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, **CALM)
@given(data=st.data())
def test_garbage_in_settings(kind, data):
    fields = data.draw(KINDS[kind]).to_dict()
    names = data.draw(st.lists(st.sampled_from(FIELDS[kind]), min_size=1, max_size=3, unique=True))
    fields |= {name: data.draw(GARBAGE, label=name) for name in names}
    for make in (lambda: kind(**fields), lambda: kind.from_dict(fields)):
        made = attempt(make, [f"{kind.__name__}.{name}" for name in FIELDS[kind]])
        if made is not None:
            assert kind.from_dict(json.loads(json.dumps(made.to_dict()))) == made and hash(made) == hash(made)


@settings(max_examples=300, **CALM)
@given(data=st.data())
def test_garbage_in_recipes(data):
    recipe = data.draw(st.sampled_from(list(ek.recipes.RECIPES.values())))
    changes = data.draw(st.dictionaries(KEYS.filter(lambda key: isinstance(key, str)), GARBAGE, max_size=2))
    made = attempt(lambda: recipe.replace(**changes), [*ALL_FIELDS, "name", "Recipe"])
    assert made is None or ek.Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    for parts in (data.draw(GARBAGE), data.draw(st.dictionaries(KEYS, GARBAGE, max_size=2))):
        before = dict(parts) if isinstance(parts, dict) else {}
        read = attempt(
            lambda parts=parts: ek.Recipe.from_dict(parts), [*ALL_FIELDS, "Recipe", *(kind.__name__ for kind in KINDS)]
        )
        assert read is None or isinstance(read, ek.Recipe)
        assert all(parts[key] is value for key, value in before.items())
    found = attempt(lambda: ek.recipes.get(data.draw(GARBAGE)), ["recipe"])
    assert found is None or isinstance(found, ek.Recipe)


def parts():
    """The metrics of two micro-batches."""
    whole = call("egpo_loss", valid("egpo_loss", vocab=5)).metrics
    return [dict(whole), dict(call("policy_loss", valid("policy_loss", vocab=5)).metrics)]


@settings(max_examples=300, **CALM)
@given(data=st.data())
def test_garbage_in_metrics(data):
    metrics = parts()
    for number in data.draw(st.lists(st.integers(0, 1), max_size=2)):
        key = data.draw(st.sampled_from(list(metrics[number])))
        metrics[number][key] = data.draw(garbage_for(metrics[number][key]), label=key)
        if data.draw(st.booleans()):
            del metrics[number][data.draw(st.sampled_from(list(metrics[number])))]
        if data.draw(st.booleans()):
            metrics[number][data.draw(KEYS)] = torch.ones(())
    given_metrics = data.draw(st.one_of(st.just(metrics), st.just(metrics), st.just(metrics), GARBAGE))
    unchanged = [untouched(part) for part in metrics]
    merged = attempt(lambda: ek.combine_metrics(given_metrics), ["metrics"])
    for check in unchanged:
        check(succeeded=True)
    if merged is not None:
        assert all(value.dim() == 0 and re.search(r"/(mean|min|max|sum)$", key) for key, value in merged.items())
