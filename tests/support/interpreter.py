"""The Triton interpreter, mended where it differs from every GPU: bfloat16 rounds to nearest even, not towards zero."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_original = interpreter._convert_float


def _convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """Convert between float32 and bfloat16 (held as uint16 by the interpreter) as the hardware does."""
    if (source, target) == (tl.float32, tl.bfloat16):
        values = torch.from_numpy(np.ascontiguousarray(data.view(np.float32)))
        return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    if (source, target) == (tl.bfloat16, tl.float32):
        values = torch.from_numpy(np.ascontiguousarray(data.view(np.int16))).view(torch.bfloat16)
        return values.float().view(torch.int32).numpy().view(np.uint32).reshape(data.shape)
    return _original(data, source, target, rounding_mode)


def round_bfloat16_to_nearest() -> None:
    """Replace the interpreter's conversion."""
    interpreter._convert_float = _convert_float
