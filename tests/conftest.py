"""Kernels are interpreted on CPU tensors; TRITON_INTERPRET=0 runs them compiled, on a machine with a GPU."""

import os

# Before anything imports triton: @triton.jit looks at it when it decorates.
os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.support.interpreter import round_bfloat16_to_nearest

round_bfloat16_to_nearest()
