"""The argument lists that the public functions repeat, which readers and editors want whole, say the same thing."""

import inspect
import re

import pytest

import egpo_kernels as ek

FUNCTIONS = {name: getattr(ek, name) for name in ek.__all__ if inspect.isfunction(getattr(ek, name))}
HEAD = ["bias", "lora", "logit_scale", "logit_softcap", "logits_dtype"]
LIMITS = ["hidden_grad", "sequence_parallel", "num_active", "max_chunk_bytes"]
PAIRS = ["egpo_loss", "policy_loss", "token_log_probs"]


def parameters(function):
    return dict(inspect.signature(function).parameters)


def described(function):
    """The arguments of a docstring, each with its text in one line."""
    text = inspect.getdoc(function)
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section[1] if section else "", re.DOTALL | re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_list_the_arguments_in_order(name):
    assert list(described(FUNCTIONS[name])) == list(parameters(FUNCTIONS[name]))


@pytest.mark.parametrize("name", PAIRS)
def test_a_linear_function_takes_what_its_twin_takes(name):
    """Hidden states and weight for logits, head, ranks and limits added, ``inplace_grad`` left out: all else alike."""
    twin = parameters(FUNCTIONS.get(f"logits_{name}", FUNCTIONS[name]))
    linear = parameters(FUNCTIONS[f"linear_{name}"])
    own = ["hidden", "weight", *HEAD, *LIMITS]
    shared = [parameter for parameter in linear if parameter not in own]
    assert shared == [parameter for parameter in twin if parameter not in ("logits", "inplace_grad")]
    assert [linear[parameter] for parameter in shared] == [twin[parameter] for parameter in shared]
    assert [parameter for parameter in linear if parameter in own] == own
    first = parameters(ek.linear_policy_loss)
    assert [linear[parameter] for parameter in own] == [first[parameter] for parameter in own]


def test_an_argument_has_one_default_and_one_type():
    """Whichever function takes it: what the losses share by name is the same thing everywhere."""
    losses = [FUNCTIONS[f"{kind}{name}"] for name in PAIRS for kind in ("", "linear_")] + [ek.logits_policy_loss]
    seen = {}
    for function in losses:
        for name, parameter in parameters(function).items():
            if parameter.default is not inspect.Parameter.empty and name != "entropy":
                first = seen.setdefault(name, parameter)
                assert (parameter.default, parameter.annotation) == (first.default, first.annotation), name
    assert {"mask", "temperature", "grad_scale", "num_tokens"} <= set(seen)


@pytest.mark.parametrize("function", [ek.linear_policy_loss, ek.egpo_loss], ids=["linear_policy_loss", "egpo_loss"])
def test_the_losses_describe_an_argument_in_one_way(function):
    """`logits_policy_loss` says what an argument is; the others say so too, and perhaps more, or whom to ask."""
    whole = described(ek.logits_policy_loss)
    shared = {name: words for name, words in described(function).items() if name in whole}
    assert len(shared) >= 13
    for name, words in shared.items():
        assert words.startswith(whole[name].rstrip(".")) or "; see `logits_policy_loss`." in words, f"{name}: {words}"
