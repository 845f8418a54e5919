"""Launch every kernel once on small inputs: what compute-sanitizer watches.

python -m benchmarks.gpu.every_kernel cuda 40009
"""

import sys

import torch

import egpo_kernels.triton as backend
from benchmarks.counts.launches import (
    VOCAB,
    Size,
    launch_groups,
    launch_kept,
    launch_log_probs,
    launch_logits,
    launch_rows,
    launch_shards,
    make_rows,
)
from benchmarks.ring import switched_on
from egpo_kernels import AdvantageConfig, PolicyLossConfig
from egpo_kernels.triton.launch import architecture

CONFIG = PolicyLossConfig(ratio="sequence", kl_coef=0.1, entropy_coef=0.1)
SPREAD = PolicyLossConfig(ratio="sequence", reduction="seq_mean_token_mean")
WHITENED = AdvantageConfig(scale="batch_whiten", renorm="after")
SIZE = Size(3, 5)


def launch_in_place(device: str, vocab: int) -> None:
    """The gradient over the logits, with tokens at both ends: where one warp could overtake another."""
    logits = torch.zeros(*SIZE, vocab, dtype=torch.bfloat16, device=device)
    rows = make_rows(torch.float32, True, SIZE, device)
    rows = rows._replace(tokens=torch.arange(rows.mask.numel(), device=device) * (vocab // rows.mask.numel()))
    log_probs, entropy, maximum, sum_exp = backend.row_statistics(logits, rows, 1.0, True)
    upstream = [torch.ones_like(log_probs), torch.ones_like(log_probs)]
    backend.logits_gradient(logits, rows, [maximum, sum_exp, entropy], upstream, 1.0, logits)
    backend.logits_loss_gradient(logits, rows, CONFIG, 1.0, 1.0, True, logits)


def main(device: str = "cuda", vocab: str = "40009") -> None:
    """Launch, wait, and say that it is done."""
    launch_logits(torch.bfloat16, True, CONFIG, SIZE, int(vocab), device=device)
    launch_in_place(device, int(vocab))
    launch_rows(torch.float32, True, SPREAD, SIZE, device=device)
    launch_log_probs(torch.float32, True, CONFIG, SIZE, device=device)
    launch_groups(torch.float32, WHITENED, True, SIZE, device=device)
    launch_kept(torch.bfloat16, True, SIZE, device=device)
    launch_shards(torch.bfloat16, True, SIZE, int(vocab), device=device)
    if architecture(torch.device(device)) == "sm_90":
        with switched_on():
            launch_in_place(device, VOCAB)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel was launched")


if __name__ == "__main__":
    main(*sys.argv[1:])
