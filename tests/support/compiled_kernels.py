"""Every row kernel compiled for a GPU that need not be there; prints a JSON line per variant. Run as a process.

    python -m tests.support.compiled_kernels sm_90
"""

import json
import sys
from typing import Any, NamedTuple

import torch
import triton.language as tl

from egpo_kernels.triton.logits_gradient import logits_gradient_kernel
from egpo_kernels.triton.logits_policy_loss import logits_policy_loss_kernel
from egpo_kernels.triton.row_statistics import row_statistics_kernel
from egpo_kernels.triton.settings import RowPointers
from egpo_kernels.triton.softmax import Matrix, launch_options
from egpo_kernels.triton.surrogates import SURROGATES
from tests.support.offline import compile_kernel

VOCAB = 151936
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class Variant(NamedTuple):
    """One compilation: the kernel's function, its run-time types and its compile-time values."""

    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]


def rows(compute: str, full: bool) -> RowPointers:
    """Types of the row pointers; ``full`` gives every optional tensor."""
    vector, optional = f"*{compute}:16", f"*{compute}:16" if full else None
    return RowPointers("*u8:16", "*i64:16", optional, vector, vector, optional, optional, optional)


def variants(dtype: str, full: bool, entropy: bool) -> dict[str, Variant]:
    """The three row kernels for one dtype; ``entropy`` computes it and lets a gradient through it."""
    compute = "fp64" if dtype == "fp64" else "fp32"
    vector, where = f"*{compute}:16", Matrix(f"*{dtype}:16", "i64:16", "i32:16")
    sizes = {"length": "i32", "vocab": "i32:16"}
    options = launch_options(VOCAB, DTYPES[dtype])
    common = {"DTYPE": getattr(tl, {"fp32": "float32", "fp64": "float64"}[compute]), "BLOCK_V": options["BLOCK_V"]}
    shared = {"logits": where, "rows": rows(compute, full), "settings_ptr": vector, **sizes}
    outputs = {"log_probs_ptr": vector, "entropy_ptr": vector}
    gradient = {"out": where, "out_length": "i32", "num_rows": "i32"}
    return {
        "row_statistics": Variant(
            row_statistics_kernel,
            {**shared, **outputs, "maximum_ptr": vector, "sum_exp_ptr": vector},
            {**common, "ENTROPY": entropy},
        ),
        "logits_gradient": Variant(
            logits_gradient_kernel,
            {
                **shared,
                **gradient,
                **{f"{name}_ptr": vector for name in ("maximum", "sum_exp", "entropy", "slope")},
                "bonus_ptr": vector if entropy else None,
            },
            common,
        ),
        "logits_policy_loss": Variant(
            logits_policy_loss_kernel,
            {**shared, **gradient, **outputs},
            {**common, "SURROGATE": SURROGATES["clip"], "KL": "k3", "ENTROPY": entropy, "TILTED": entropy},
        ),
    }


def main(target: str) -> None:
    """Compile every variant for ``target``."""
    for dtype, torch_dtype in DTYPES.items():
        for full in (False, True):
            for entropy in (False, True):
                for name, variant in variants(dtype, full, entropy).items():
                    warps = launch_options(VOCAB, torch_dtype)["num_warps"]
                    compiled = compile_kernel(*variant, target, num_warps=warps)
                    row = {"kernel": name, "dtype": dtype, "full": full, "entropy": entropy, **compiled._asdict()}
                    print(json.dumps({key: value for key, value in row.items() if key != "sass"}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
