"""Metrics that are filled when somebody looks are a dict to whoever looks, in Python and in C."""

import collections
import copy
import io
import json
import pickle
import threading
from collections.abc import Mapping

import pytest
import torch
from torch.nn.parallel.distributed import _find_tensors
from torch.utils import _pytree as pytree

import egpo_kernels as ek
from egpo_kernels.formulas import metrics
from egpo_kernels.formulas.lazy import LazyMetrics, merged
from egpo_kernels.formulas.tables import GROUP, TOKEN

WITHOUT = ("policy/entropy",)


def numbers(table):
    """1, 2, ...: no count is 0."""
    return torch.arange(1, len(table.keys) + 1, dtype=torch.float32)


def make(table=TOKEN, without=()):
    return metrics.named(numbers(table), table, without)


@pytest.fixture
def lazy():
    """Not looked at."""
    made = make()
    assert type(made) is LazyMetrics and made._parts
    return made


def plain():
    return dict(zip(TOKEN.keys, numbers(TOKEN).unbind(), strict=True))


def keywords(**given):
    return given


def collected(pairs):
    return {key: value for key, value in pairs}


READERS = {
    "dict": dict,
    "unpacked": lambda m: {**m},
    "unpacked beside": lambda m: {"a": torch.ones(()), **m},
    "keywords": lambda m: keywords(**m),
    "update": lambda m: (made := {}, made.update(m))[0],
    "dict.update": lambda m: (made := {}, dict.update(made, m))[0],
    "or": lambda m: m | {},
    "ror": lambda m: {} | m,
    "ior": lambda m: (made := {}, made.__ior__(m))[0],
    "own ior": lambda m: m.__ior__({}),
    "copy": lambda m: m.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "old pickle": lambda m: pickle.loads(pickle.dumps(m, protocol=0)),
    "python pickle": lambda m: pickle.loads(pickle._dumps(m)),
    "items": lambda m: collected(m.items()),
    "keys": lambda m: {key: m[key] for key in m.keys()},  # noqa: SIM118
    "iteration": lambda m: {key: m[key] for key in m},
    "values": lambda m: dict(zip(m, m.values(), strict=True)),
    "get": lambda m: {key: m.get(key) for key in m},
    "reversed": lambda m: {key: m[key] for key in reversed(m)},
    "pop": lambda m: {key: m.pop(key) for key in list(m)},
    "popitem": lambda m: dict(m.popitem() for _ in range(len(m))),
    "setdefault": lambda m: {key: m.setdefault(key, None) for key in list(m)},
    "ChainMap": lambda m: dict(collections.ChainMap({}, m)),
    "OrderedDict": collections.OrderedDict,
    "UserDict": lambda m: collections.UserDict(m).data,
    "mapping": lambda m: {key: m.keys().mapping[key] for key in m},
    "tree_map": lambda m: pytree.tree_map(lambda leaf: leaf, m),
    "paths": lambda m: {path[0].key: leaf for path, leaf in pytree.tree_flatten_with_path(m)[0]},
    "its type": lambda m: type(m)({key: value for key, value in m.items()}),  # accelerate
    "its type, pairs": lambda m: type(m)((key, value) for key, value in m.items()),
    "combined": lambda m: ek.combine_metrics([m]),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_finds_the_values(lazy, read):
    found = read(lazy)
    assert isinstance(found, dict)
    values = {key: float(value) for key, value in found.items() if key != "a"}
    assert values == {key: float(place) for place, key in enumerate(TOKEN.keys, 1)}
    assert not any(value.requires_grad for value in found.values())


def test_looking_at_keys_fills_nothing(lazy):
    assert list(lazy) == list(lazy.keys()) == list(TOKEN.keys) and len(lazy) == len(TOKEN.keys)
    assert "policy/loss/sum" in lazy and "loss" not in lazy and lazy
    assert lazy._parts
    assert isinstance(lazy, dict) and isinstance(lazy, Mapping)
    with pytest.raises(KeyError):
        lazy["loss"]
    assert lazy.get("loss", 3) == 3 and not lazy._parts


def test_comparing_and_showing():
    assert make() == plain() and plain() == make() and make() == make()
    empty = {}
    assert make() != empty and empty != make() and not make().__ne__(plain())
    assert repr(make()) == repr(plain()) and str(make()) == str(plain())
    with pytest.raises(TypeError):
        hash(make())


CHANGES = {
    "set": lambda m: m.__setitem__("policy/loss/sum", 7),
    "delete": lambda m: m.__delitem__("policy/loss/sum"),
    "update": lambda m: m.update({"policy/loss/sum": 7, "mine": 8}),
    "ior": lambda m: m.__ior__({"policy/loss/sum": 7}),
    "pop": lambda m: m.pop("policy/loss/sum"),
    "setdefault": lambda m: m.setdefault("mine", 8),
    "clear": lambda m: m.clear(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_stay(lazy, change):
    wanted = plain()
    change(lazy)
    change(wanted)
    assert lazy == wanted and list(lazy) == list(wanted)


def test_json(lazy):
    """The encoder in C takes a dict whose C size is 0 for empty before it asks for anything."""
    wanted = json.dumps({key: float(place) for place, key in enumerate(TOKEN.keys, 1)})
    assert json.dumps(make(), default=float) == wanted == json.dumps({key: float(value) for key, value in lazy.items()})
    assert json.loads(json.dumps(make(), default=float, indent=1, sort_keys=True)) == json.loads(wanted)


def test_json_past_the_methods(lazy):
    """What reads a dict in C past its methods must fail, not write something else."""
    orjson = pytest.importorskip("orjson")
    with pytest.raises(TypeError):
        orjson.dumps(lazy, default=float)
    assert len(orjson.loads(orjson.dumps(dict(lazy), default=float))) == len(TOKEN.keys)


def test_saved_and_loaded(lazy):
    memory = io.BytesIO()
    torch.save({"metrics": lazy}, memory)
    memory.seek(0)
    assert torch.load(memory, weights_only=True)["metrics"] == plain()
    assert type(pickle.loads(pickle.dumps(make()))) is collections.OrderedDict
    assert type(copy.deepcopy(make())) is type(copy.copy(make())) is type(make().copy()) is dict


def test_trees(lazy):
    output = ek.LossOutput(torch.ones(()), lazy)
    leaves, shape = pytree.tree_flatten(output)
    assert len(leaves) == 1 + len(TOKEN.keys) and type(pytree.tree_unflatten(leaves, shape).metrics) is dict
    assert len(list(_find_tensors(ek.LossOutput(torch.ones(()), make())))) == 1 + len(TOKEN.keys)
    doubled = pytree.tree_map(lambda leaf: 2 * leaf, make())
    assert doubled == {key: 2 * value for key, value in plain().items()}


def test_recursive_helpers(lazy):
    convert = pytest.importorskip("accelerate.utils.operations").convert_to_fp32
    assert convert(lazy) == plain()


def test_a_traced_function_reads_them(lazy):
    read = torch.compile(lambda m: m["policy/loss/sum"] + len(m), backend="eager")
    assert read(lazy) == plain()["policy/loss/sum"] + len(TOKEN.keys)
    assert read(plain()) == plain()["policy/loss/sum"] + len(TOKEN.keys)


def test_keys_are_left_out():
    found = make(TOKEN, WITHOUT)
    assert set(TOKEN.keys) - set(found) == {key for key in TOKEN.keys if key.startswith(WITHOUT)} != set()
    assert found == {key: value for key, value in plain().items() if not key.startswith(WITHOUT)}


def test_merged():
    group, token = make(GROUP), make(TOKEN)
    both = merged(group, token)
    assert type(both) is LazyMetrics and both._parts and group._parts and token._parts
    assert list(both) == [*GROUP.keys, *TOKEN.keys]
    assert both == {**make(GROUP), **make(TOKEN)} == merged(dict(make(GROUP)), make(TOKEN))
    token["policy/loss/sum"] = torch.tensor(-1.0)
    changed = merged(group, token)
    assert changed["policy/loss/sum"] == -1 and len(changed) == len(both)
    again = merged(make(TOKEN), metrics.named(-torch.ones(len(TOKEN.keys)), TOKEN))
    assert again == dict.fromkeys(TOKEN.keys, torch.tensor(-1.0)) and list(again) == list(TOKEN.keys)
    assert merged({}, make(TOKEN)) == plain() and merged({}, {}) == {}


def test_two_look_at_once():
    for _ in range(50):
        made, found, start = make(), [], threading.Barrier(4)

        def look(made=made, found=found, start=start):
            start.wait()
            found.append({key: float(value) for key, value in made.items()})

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [{key: float(value) for key, value in plain().items()}] * 4


def test_values_have_no_gradient():
    vector = torch.ones(len(TOKEN.keys), requires_grad=True) * 2
    assert not any(value.requires_grad for value in metrics.named(vector, TOKEN).values())
