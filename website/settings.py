"""What griffe cannot read from the source of a settings class: the defaults that its fields have."""

import dataclasses
from typing import Any

import griffe

import egpo_kernels


class Settings(griffe.Extension):
    """Shows the fields of public dataclasses as arguments, with the defaults that Python knows."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Come before griffe makes signatures of the fields."""
        for name in egpo_kernels.__all__:
            made = getattr(egpo_kernels, name)
            if dataclasses.is_dataclass(made):
                found = pkg[f"{made.__module__}.{name}".removeprefix("egpo_kernels.")]
                found.docstring.value = found.docstring.value.replace("\nAttributes:\n", "\nArgs: Settings:\n")
                for field in dataclasses.fields(made):
                    found[field.name].value = shown(field.default)


def shown(default: Any) -> str:
    """A default as one writes it; a half of a recipe at its defaults by its class alone."""
    return f"{type(default).__name__}()" if dataclasses.is_dataclass(default) else repr(default)
