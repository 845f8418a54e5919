"""`egpo-kernels info`: what is installed, on what, and which backend answers: the head of a bug report."""

import json
import os
import platform
from importlib import metadata
from typing import Any

import torch
from torch.utils import collect_env

import egpo_kernels as ek
from egpo_kernels.command.screen import Screen
from egpo_kernels.engine.dispatch import auto_backend, choose_backend

NEEDED = ("triton", "numpy")
STACKS = (
    "transformers", "trl", "verl", "openrlhf", "skyrl", "areal", "ms-swift", "slime", "prime-rl", "nemo-rl",
    "accelerate", "peft", "liger-kernel",
)  # fmt: skip
"""Training stacks that pages of the documentation are about, and what these call."""
VARIABLES = (
    "TRITON_INTERPRET", "TRITON_DEBUG", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_COMPILE_DISABLE", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip
"""Beside every EGPO_KERNELS_*: what changes which code runs, and how."""

Facts = dict[str, Any]


def facts() -> dict[str, Facts]:
    """By section, names and values."""
    return {
        "versions": versions(),
        "platform": {"system": platform.system(), "libc": " ".join(platform.libc_ver()), "machine": platform.machine()},
        "environment variables": environment(),
        "devices": {str(device): describe(device) for device in devices()},
    }


def versions() -> Facts:
    """Of this package, of what it runs on, and of installed training stacks, none of which is imported."""
    found: Facts = {"egpo_kernels": ek.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {"CUDA of torch": torch.version.cuda, "HIP of torch": torch.version.hip}
    found |= {name: version(name) or "not installed" for name in NEEDED}
    found |= {name: version(name) for name in STACKS}
    return {name: str(known) for name, known in found.items() if known is not None}


def version(package: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> Facts:
    """Variables that are set and change what runs."""
    ours = sorted(name for name in os.environ if name.startswith("EGPO_KERNELS_"))
    return {name: os.environ[name] for name in (*ours, *VARIABLES) if name in os.environ}


def devices() -> list[torch.device]:
    """The CPU, and every device of the accelerator that torch sees."""
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        found += [torch.device(accelerator.type, number) for number in range(torch.accelerator.device_count())]
    return found


def describe(device: torch.device) -> Facts:
    """What torch can tell of a device, and which backend ``auto`` takes on it, and why."""
    found: Facts = {}
    if device.type == "cpu":
        found = {"instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    elif device.type in ("cuda", "xpu"):
        properties = torch.get_device_module(device.type).get_device_properties(device)
        found = {"name": properties.name, "memory": f"{properties.total_memory / 2**30:.1f} GiB"}
    if device.type == "cuda":
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["driver"] = _driver()
    backend, why = answer(device)
    return {**found, "auto takes": backend, "because": why}


def _driver() -> str:
    found = None if torch.version.hip else collect_env.get_nvidia_driver_version(collect_env.run)
    return found or "unknown"


def answer(device: torch.device) -> tuple[str, str]:
    """Which backend ``auto`` takes, or none where a call would raise, and why."""
    try:
        backend, why = auto_backend(device)
        choose_backend(backend, device)
    except (ValueError, RuntimeError) as error:
        return "none", str(error)
    return backend, why


def show(screen: Screen, as_json: bool) -> int:
    """Write the facts; always exit status 0."""
    found = facts()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    devices = found.pop("devices")
    for section, entries in [*found.items(), *devices.items()]:
        screen.line(section, "bold")
        for name, value in entries.items() or [("none is set", "")]:
            screen.line(f"  {name:<16}  {value}".rstrip())
    return 0
