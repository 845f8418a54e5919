"""Set-up for every test."""

import os

# Triton reads this when a kernel's module is imported, so it stands before every other import. With
# TRITON_INTERPRET=0 the kernels are compiled, which needs a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
