"""What `make gpu` takes along to a machine without a package index: only what is lacking there is installed."""

import sys
import zipfile

import pytest

from benchmarks.gpu import plan, process, wheels
from benchmarks.gpu.process import run


def make_wheel(folder, name):
    """A wheel with a module of that name."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "VALUE = 7\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


def test_only_wheels_of_what_is_not_installed_are_installed(tmp_path, monkeypatch):
    for module in (wheels, process):
        monkeypatch.setattr(module, "SITE", tmp_path / "site")
    monkeypatch.setattr(wheels, "WHEELS", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert wheels.install(tmp_path / "log.txt") is None
    for name in ("taken_along", "torch", "pytest"):
        make_wheel(tmp_path, name)
    assert [wheel.name.partition("-")[0] for wheel in wheels.lacking()] == ["taken_along"]
    assert wheels.install(tmp_path / "log.txt") == "taken_along: passed", (tmp_path / "log.txt").read_text()
    assert plan.installed("taken_along") and wheels.install(tmp_path / "log.txt") is None
    # What the stages run finds it too.
    done = run([sys.executable, "-c", "import taken_along; print(taken_along.VALUE)"], 60, tmp_path / "log.txt", {})
    assert done["status"] == "passed" and (tmp_path / "log.txt").read_text() == "7\n"
    # A wheel that cannot be installed is said, and everything else goes on.
    (tmp_path / "spoilt-1.0-py3-none-any.whl").write_text("no archive")
    assert wheels.install(tmp_path / "log.txt").startswith("spoilt: failed exit status 1")


def test_what_is_taken_along_is_pinned():
    pytest.importorskip("tomllib")
    assert wheels.pins(wheels.RIVALS) == [pin for pin in wheels.pins(wheels.RIVALS) if "==" in pin]
    assert {pin.partition("==")[0] for pin in wheels.pins(wheels.TOOLS)} == set(wheels.TOOLS)
