"""Settings: dataclasses whose fields say what they may hold and are checked when an object is made."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from reprlib import repr as shown
from typing import Any, TypeVar

import numpy as np
import torch

Config = TypeVar("Config", bound="Checked")

# Of float32: the smallest that can be divided by, and the largest.
TINY, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def choice(*values: str) -> Any:
    """A field that holds one of ``values``, the first by default."""
    return dataclasses.field(default=values[0], metadata={"choices": values})


def number(
    default: float | None, low: float, high: float = math.inf, *, open_low: bool = False, optional: bool = False
) -> Any:
    """A field that holds a number in ``[low, high]``, or ``(low, high]``, or None if it is optional."""
    bounds = {"low": low, "high": high, "open_low": open_low, "optional": optional}
    return dataclasses.field(default=default, metadata=bounds)


def renamed(error: Exception, names: Mapping[str, str]) -> str:
    """The message of a setting of `PolicyLossConfig` that was refused, by the name that a training stack has for it."""
    message = str(error)
    for name, theirs in names.items():
        message = message.replace(f"PolicyLossConfig.{name} ", f"{theirs} ")
    return message


def fits_float32(value: float) -> bool:
    """Whether float32 holds the number: it neither overflows nor becomes 0, or too small to divide by."""
    # Not math.isfinite: a traced call has symbolic numbers. An int may be larger than any float.
    return value == 0 or TINY <= abs(value) <= LARGEST


def check_number(
    name: str, value: Any, *, low: float, high: float, open_low: bool = False, optional: bool = False
) -> float | None:
    """Return ``value`` as a float, or raise naming what it must be."""
    if type(value) is float and low < value <= high and TINY <= value <= LARGEST:
        return value  # as almost every number is
    if value is None and optional:
        return None
    value = plain(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (low <= value <= high and fits_float32(value)) or (open_low and value == low):
        wanted = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        wanted += " that float32 holds" + (" or None" if optional else "")
        raise (ValueError if is_number else TypeError)(f"{name} is {shown(value)}; it must be {wanted}")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """Return ``value`` as a float when it is a number above 0."""
    found = check_number(name, value, low=0.0, high=math.inf, open_low=True)
    assert found is not None
    return found


def plain(value: Any) -> Any:
    """A scalar of numpy's as Python's own; anything else as it is."""
    return value.item() if isinstance(value, (np.number, np.bool_)) else value


def entries(value: Any) -> list[Any] | None:
    """What any sequence holds (those of configuration systems are neither list nor tuple); None of anything else."""
    array = isinstance(value, np.ndarray) and value.ndim == 1
    if not array and (not isinstance(value, Sequence) or isinstance(value, (str, bytes))):
        return None
    return [plain(entry) for entry in value]


def check_pair(name: str, value: Any, wanted: str) -> list[Any]:
    """Return both entries of ``value``, any sequence of two."""
    found = entries(value)
    if found is None or len(found) != 2:
        raise TypeError(f"{name} is {shown(value)}; it must be {wanted}")
    return found


def check_bool(name: str, value: Any) -> bool:
    """Return ``value`` when it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {shown(value)}; it must be True or False")
    return bool(value)


class Checked:
    """What the settings classes share: every field is checked when the object is made.

    ``json`` is no field: what rebuilds dataclasses field by field, as sharding wrappers do with arguments, may do so.
    """

    json: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            name, value = f"{type(self).__name__}.{field.name}", getattr(self, field.name)
            choices, is_flag = field.metadata.get("choices", ()), isinstance(field.default, bool)
            if is_flag and not (choices and isinstance(value, str)):
                object.__setattr__(self, field.name, check_bool(name, value))
            elif choices:
                if not isinstance(value, str) or value not in choices:
                    wanted = ("True", "False") * is_flag + tuple(map(repr, choices))
                    raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(wanted)}")
            elif "low" in field.metadata:
                object.__setattr__(self, field.name, check_number(name, value, **field.metadata))
        self._check_together()
        # Opaque operators take strings, not objects: the settings travel as JSON, made once.
        object.__setattr__(self, "json", json.dumps(self.to_dict()))

    def _check_together(self) -> None:
        """Check what involves several fields."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON; `from_dict` reads them back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Make the settings from `to_dict`'s values; fields left out take their defaults."""
        check_keys(cls.__name__, values, [field.name for field in dataclasses.fields(cls)])  # type: ignore[arg-type]
        return cls(**values)


def check_keys(name: str, values: Mapping[str, Any], allowed: list[str]) -> None:
    """Raise when ``values`` is no mapping or holds a key outside ``allowed``."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} is made from {type(values).__name__}; it must be a mapping of its fields")
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise ValueError(f"{name} has no setting {shown(unknown[0])}; it must be one of {', '.join(allowed)}")
