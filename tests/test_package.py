"""The package as a package: who imports whom, what an import costs, what ships, what the README promises."""

import ast
import functools
import importlib.util
import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "egpo_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))

BACKENDS = {"reference", "portable", "triton"}

# Lowest first: a room may import itself and those below it, none beside it. Whatever lies in egpo_kernels is here.
FLOORS = (
    {"config"},
    {"inputs"},
    {"formulas"},
    BACKENDS | {"rollouts", "recipes"},
    {"parallel"},
    {"engine"},
    {"linear"},
    {"api"},
    {"__init__"},
    # Nobody imports these.
    {"integrations", "diagnostics", "command"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Inside a room that holds a path from inputs to a loss, likewise, lowest first.
STEPS = {
    "config": ("fields", "results", "settings", "recipes"),
    "inputs": ("segments", "validation", "values", "layout"),
    "formulas": (
        "arrays",
        "tables",
        "kept",
        "shards",
        "lazy",
        "reduction",
        "rows",
        "selection",
        "surrogates",
        "metrics",
        "token_metrics",
        "uncertainty",
        "groups",
        "group_metrics",
        "advantages",
        "whole_groups",
    ),
    "engine": (
        "dispatch",
        "kinds",
        "operator",
        "row_ops",
        "rows",
        "given_ops",
        "memory",
        "kept",
        "ops",
        "autograd",
        "groups",
        "calls",
        "support",
        "losses",
        "logits",
        "reports",
    ),
    "parallel": ("exchange", "shard", "reading", "hidden", "sharded", "whole"),
}


def relative(path):
    return str(path.relative_to(ROOT))


def module_exists(dotted):
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    """Dotted names of the modules that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.startswith("egpo_kernels.") and module_exists(inner) else node.module


@functools.cache
def imports():
    """File -> the modules of ours that it imports, as parts of their dotted names, ours left out."""
    found = {}
    for path in SOURCES:
        ours = [module.split(".") for module in imported_modules(path)]
        found[path] = [rest or ["__init__"] for top, *rest in ours if top == "egpo_kernels"]
    return found


def run_python(code, *args):
    """Run code in a fresh interpreter at the repository root."""
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


# Imports.


def test_imports_are_absolute():
    for path in SOURCES:
        list(imported_modules(path))


def test_every_file_has_a_floor():
    assert {room_of(path) for path in SOURCES} == set(FLOOR)


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_imports_point_down(room):
    for path, modules in imports().items():
        if room_of(path) == room:
            above = sorted({there for there, *_ in modules if there != room and FLOOR[there] >= FLOOR[room]})
            assert not above, f"{relative(path)} reaches up or sideways to {above}"


@pytest.mark.parametrize("room", sorted(STEPS))
def test_imports_inside_a_room_point_down(room):
    files = {path.stem: modules for path, modules in imports().items() if room_of(path) == room}
    assert set(files) == {"__init__", *STEPS[room]}
    for name, modules in files.items():
        beside = [module for there, *rest in modules if there == room for module in rest]
        below = STEPS[room][: STEPS[room].index(name)] if name in STEPS[room] else ()
        assert set(beside) <= set(below), f"{room}/{name}.py reaches up to {sorted(set(beside) - set(below))}"


@pytest.mark.parametrize("room", sorted(BACKENDS))
def test_backends_do_not_know_one_another(room):
    known = {there for path, modules in imports().items() if room_of(path) == room for there, *_ in modules}
    assert known and not known & (BACKENDS - {room})


def test_only_declared_dependencies_are_imported():
    allowed = {"egpo_kernels", "torch", "numpy", "triton", *sys.stdlib_module_names}
    for path in SOURCES:
        if room_of(path) != "integrations":
            # The command looks better with rich, and does without.
            extra = {module.split(".")[0] for module in imported_modules(path)} - allowed
            extra -= {"rich"} if room_of(path) == "command" else set()
            assert not extra, f"{relative(path)} imports {sorted(extra)}"


def test_import_is_light():
    code = """
import sys
import torch, numpy
before = set(sys.modules)
import egpo_kernels
print(*sorted(set(sys.modules) - before))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    new = done.stdout.split()
    assert "egpo_kernels" in new
    heavy = {"triton", "transformers", "peft", "accelerate", "trl", "verl", "skyrl", "openrlhf", "areal", "swift"}
    heavy |= {"matplotlib", "sklearn", "scipy"}
    ours = ("egpo_kernels.triton", "egpo_kernels.diagnostics", "egpo_kernels.integrations", "egpo_kernels.command")
    found = [name for name in new if name.split(".")[0] in heavy or name.startswith(ours)]
    assert not found


# The folder called triton.


# Someone puts egpo_kernels/ itself, not its parent, on sys.path.
SHADOWED = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
importlib.import_module("triton")
"""
# Someone loads the folder under a name of their own.
RENAMED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("kernels", sys.argv[1] + "/triton/__init__.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


@pytest.mark.parametrize("code", [SHADOWED, RENAMED], ids=["shadowed", "renamed"])
def test_triton_folder_refuses_another_name(code):
    done = run_python(code, str(PACKAGE))
    assert done.returncode != 0, "it was imported"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "egpo_kernels.triton" in last, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton has no wheel for this system")
def test_real_triton_is_not_shadowed():
    code = """
import triton, triton.language
import egpo_kernels.triton
print(triton.__file__)
print(egpo_kernels.triton.__file__)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    real, ours = map(Path, done.stdout.splitlines())
    assert PACKAGE not in real.parents
    assert ours == PACKAGE / "triton" / "__init__.py"


def test_nothing_else_is_called_triton():
    assert not list(PACKAGE.rglob("__main__.py"))
    for folder in ("tests", "benchmarks", "demo"):
        found = [path for path in (ROOT / folder).rglob("triton*") if path.stem == "triton"]
        assert not found


# What a reader meets.


@pytest.mark.parametrize("folder", ["egpo_kernels", "benchmarks", "demo", "tests"])
def test_files_are_short(folder):
    long = {relative(path) for path in (ROOT / folder).rglob("*.py") if len(path.read_text().splitlines()) > 300}
    assert not long


def test_public_names_are_documented():
    import egpo_kernels  # here, so that the tests above also run on a package that does not import

    assert len(set(egpo_kernels.__all__)) == len(egpo_kernels.__all__)
    for name in egpo_kernels.__all__:
        value = getattr(egpo_kernels, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            doc = value.__doc__ or ""
            # Dataclasses and named tuples write a docstring of their own: "Name(field, ...)".
            assert doc.strip() and not doc.startswith(f"{name}("), f"egpo_kernels.{name} has no docstring"


def test_wheel_ships_the_package_and_nothing_else(tmp_path):
    from hatchling.builders.wheel import WheelBuilder  # here: a machine with a GPU may have none

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode()
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == {relative(path) for path in SOURCES} | {"egpo_kernels/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.M)
    assert sorted(required) == ["numpy", "torch>=2.11"]


# The commands of README, CONTRIBUTING and the pages.


def code_in(text):
    """The fenced blocks and inline code of a Markdown text, one string each."""
    fence = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S)
    return fence.findall(text) + re.findall(r"`([^`\n]+)`", fence.sub("", text))


def runnable(module):
    """Whether `python -m module` finds something, here or among the installed packages."""
    path = ROOT.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file() or path.is_dir():
        return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("name", [relative(path) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))])
def test_documented_commands_exist(name):
    code = "\n".join(code_in((ROOT / name).read_text()))
    start = r"^[ \t]*(?:\$ )?(?:\w+=\S+ )*"  # a prompt and variables may stand before a command
    targets = set(re.findall(rf"{start}make ([a-z][\w-]*)", code, re.M))
    modules = set(re.findall(r"\bpython3? -m ([\w.]+)", code))
    scripts = set(re.findall(r"\bpython3? ((?:[\w.-]+/)*[\w.-]+\.py)\b", code))
    if name in ("README.md", "CONTRIBUTING.md"):
        assert {"test", "demo"} <= targets
    if name.startswith("docs/"):  # a trainer's own command is the trainer's
        modules = {module for module in modules if (ROOT / module.split(".")[0]).is_dir()}
    known = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert not targets - known
    assert not [module for module in modules if not runnable(module)]
    assert not [script for script in scripts if not (ROOT / script).is_file()]
