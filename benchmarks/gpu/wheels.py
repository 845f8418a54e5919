"""What a machine without a package index may lack: taken along as wheels, installed beside its own packages.

make wheels                          # where there is an index: fetches them into .whl
python -m benchmarks.gpu.wheels      # prints what `make wheels` fetches, as pyproject.toml pins it
"""

import importlib
import sys
from pathlib import Path

from benchmarks.gpu.process import SITE, run
from benchmarks.machine import ROOT
from egpo_kernels.command.info import version

WHEELS = ROOT / ".whl"
# Rivals go without what they depend on, of which the machine's torch is the most; the rest with it.
RIVALS = ("liger-kernel", "trl", "cut-cross-entropy")
TOOLS = ("matplotlib", "rich", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis")
LIMIT = 60


def pins(names: tuple[str, ...]) -> list[str]:
    """These packages with the versions that pyproject.toml pins."""
    import tomllib  # Python 3.11, as work on the repository needs

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {pin.partition("==")[0]: pin for extra in extras.values() for pin in extra if "==" in pin}
    return [known[name] for name in names]


def lacking() -> list[Path]:
    """Wheels of what is not installed: the machine's own packages stay what they are."""
    found = sorted(WHEELS.glob("*.whl")) if WHEELS.is_dir() else []
    return [wheel for wheel in found if version(wheel.name.partition("-")[0].replace("_", "-")) is None]


def install(log: Path) -> str | None:
    """Install them into a folder of their own, and say what came of it; None where there was nothing to install."""
    if SITE.is_dir():
        sys.path.append(str(SITE))
    wheels = [str(wheel) for wheel in lacking()]
    if not wheels:
        return None
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(SITE)]
    done = run([sys.executable, "-m", "pip", "install", "--quiet", *options, *wheels], LIMIT, log, {})
    if str(SITE) not in sys.path:
        sys.path.append(str(SITE))
    importlib.invalidate_caches()
    names = ", ".join(Path(wheel).name.partition("-")[0] for wheel in wheels)
    return f"{names}: {done['status']} {done.get('reason', '')}".rstrip()


if __name__ == "__main__":
    print("\n".join(pins(RIVALS if sys.argv[1:] == ["rivals"] else TOOLS)))
