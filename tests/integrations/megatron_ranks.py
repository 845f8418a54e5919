"""What each of two processes does in `test_megatron`: its half of a vocabulary by others' parts and by ours, under the
names of those parts. Each result is held to the accuracy rule against whole rows in float64, theirs as ours.
"""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import egpo_kernels as ek
from tests.integrations.megatron_layer import megatron, megatron_layer, megatron_layer_in_sequence
from tests.integrations.passes import Passes
from tests.integrations.ranks import RANKS, leave
from tests.integrations.split_vocabulary import (
    PADDED,
    VOCAB,
    Problem,
    Sending,
    Sent,
    columns,
    make_problem,
    reduced,
    sent_by,
    told,
)
from tests.support.accuracy import assert_rounding
from tests.support.page import blocks

BONUS = ek.recipes.EGPO.replace(entropy_coef=0.01)


def check_logits(problem: Problem, scores: Callable[[Tensor], Sequence[Tensor]], group: Any, their_sent: Sent) -> None:
    """Others' log-probs (and entropy) of a rank's logits ``[S, T, V / P]``, and a loss from them, beside ours."""
    part, shard = {"logits": (..., columns())}, problem.shard
    (log_probs, *entropy), sent = sent_by(lambda: scores(shard))
    assert sent == their_sent, sent
    problem.hold_scores(log_probs, *entropy)
    loss = problem.loss(log_probs, *entropy)
    _, sent = sent_by(lambda: loss.backward(problem.case.upstream))
    assert sent == [], sent
    problem.hold(part, loss=loss, logits=shard.grad)
    check_ours(problem, group, bool(entropy))


def check_ours(problem: Problem, group: Any, want_entropy: bool) -> None:
    """Ours of the same: log-probs in one exchange, a loss in one, and nothing in backward."""
    part, shard, case = {"logits": (..., columns())}, problem.shard, problem.case
    counted = case.counted.view(case.tokens.shape)
    given = {"vocab_group": group, "mask": counted, "return_entropy": want_entropy}
    found, sent = sent_by(lambda: ek.token_log_probs(shard.detach(), case.tokens, **given))
    assert sent == [told(problem.tokens)], sent
    problem.hold_scores(*found[: 1 + want_entropy])
    loss, sent = sent_by(lambda: problem.our_loss(shard, vocab_group=group))
    assert sent == [told(problem.tokens)], sent
    _, sent = sent_by(lambda: loss.backward(case.upstream))
    assert sent == [], sent
    problem.hold(part, loss=loss, logits=shard.grad)


def megatron_cross_entropy(dtype: torch.dtype) -> None:
    """It writes over float32 logits, so it gets a copy."""
    parts, group = megatron()
    problem = make_problem(ek.recipes.EGPO, dtype)

    def scores(logits: Tensor) -> list[Tensor]:
        return [-parts.vocab_parallel_cross_entropy(logits.clone(), problem.case.tokens)]

    check_logits(problem, scores, group, reduced(problem.tokens, 1, 1, 1))


def megatron_fused_cross_entropy() -> None:
    """Values and what is sent; it rounds the gradient of float32 logits to bfloat16, which no rule allows."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    _, group = megatron()
    problem = make_problem(ek.recipes.EGPO)
    case, shard = problem.case, problem.shard
    found, sent = sent_by(lambda: -fused_vocab_parallel_cross_entropy(shard.clone(), case.tokens, group))
    assert sent == reduced(problem.tokens, 1, 2), sent
    problem.hold_scores(found)
    assert sent_by(found.sum().backward)[1] == []
    assert torch.equal(shard.grad, shard.grad.bfloat16().float())


def verl_scores() -> None:
    """verl's log-probs and entropy of what Megatron gives, which it copies for that."""
    from verl.utils.megatron.tensor_parallel import vocab_parallel_entropy, vocab_parallel_log_probs_from_logits

    _, group = megatron()
    problem = make_problem(BONUS)

    def scores(logits: Tensor) -> list[Tensor]:
        kept = logits.clone()
        entropy = vocab_parallel_entropy(logits.clone())
        return [vocab_parallel_log_probs_from_logits(kept, problem.case.tokens), entropy]

    check_logits(problem, scores, group, reduced(problem.tokens, 1, 1, 1, 1, 1, 1))


def verl_engine() -> None:
    """The page's engine and the class that it changes, on what Megatron hands them; verl's writes over the logits."""
    (block,) = (block for block in blocks("docs/verl.md") if "EngineRegistry.register" in block)
    space: dict[str, Any] = {}
    exec(compile(block, "docs/verl.md", "exec"), space)
    engines = space["OneExchangeEngine"], space["MegatronEngineWithLMHead"]
    problem = make_problem(BONUS)
    rows, tokens = problem.tokens, problem.case.tokens
    heat = torch.full(tokens.shape, 0.8)
    heat[0, 0] = 0  # padding
    given = dict.fromkeys(("calculate_sum_pi_squared", "distillation_use_topk", "distillation_only"), False)
    given |= {"calculate_entropy": True, "logits_processor_func": None, "batch": None, "data_format": "bshd"}
    found = []
    for kind, wanted in zip(engines, ([told(rows)], reduced(rows, *[1] * 6)), strict=True):
        engine, shard = object.__new__(kind), problem.shard
        engine.engine_config = SimpleNamespace(entropy_from_logits_with_chunking=False)
        logits = shard * 1.0
        scores, sent = sent_by(functools.partial(kind._lm_head_logits_processor, engine, logits, tokens, heat, **given))
        assert sent == wanted, sent
        numbers = {name: value[heat > 0.5] for name, value in scores.items()}
        (numbers["log_probs"].sum() - 0.3 * numbers["entropy"].sum()).backward()
        found.append(numbers | {"gradient": shard.grad})
    for name, value in found[0].items():
        assert_rounding(value.detach(), found[1][name].detach())


def padded_columns() -> None:
    """Without the true size they count, as with Megatron; with it they are not there."""
    _, group = megatron()
    problem = make_problem(ek.recipes.EGPO, vocab=VOCAB)
    shard = make_problem(ek.recipes.EGPO).shard
    problem.our_loss(shard, vocab_group=group, vocab_size=VOCAB).backward(problem.case.upstream)
    own = slice(columns().start, min(columns().stop, VOCAB))
    width = own.stop - own.start
    problem.hold({"logits": (..., own)}, logits=shard.grad[..., :width])
    assert (shard.grad[..., width:] == 0).all()


def torchtitan_cross_entropy() -> None:
    from torchtitan.components.loss import _LossParallelCrossEntropy

    _, group = megatron()
    problem = make_problem(ek.recipes.EGPO)
    tokens = problem.case.tokens

    def scores(logits: Tensor) -> list[Tensor]:
        found = _LossParallelCrossEntropy.apply(logits.flatten(0, 1), tokens.flatten(), group, PADDED, "none")
        return [-found.view(tokens.shape)]

    check_logits(problem, scores, group, reduced(problem.tokens, 1, 1, 1))


def loss_parallel_cross_entropy() -> None:
    """Logits that are a DTensor, which ours takes as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    _, group = megatron()
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    problem = make_problem(ek.recipes.EGPO)
    tokens = problem.case.tokens

    def scores(logits: Tensor) -> list[Tensor]:
        split = DTensor.from_local(logits.flatten(0, 1), mesh, (Shard(-1),), run_check=False)
        found = torch.nn.functional.cross_entropy(split, tokens.flatten(), reduction="none")
        return [-found.to_local().view(tokens.shape)]

    with loss_parallel():
        check_logits(problem, scores, group, reduced(problem.tokens, 1, 1, 1))
    shard = problem.shard
    split = DTensor.from_local(shard, mesh, (Shard(-1),), run_check=False)
    loss, sent = sent_by(lambda: problem.our_loss(split))
    assert sent == [told(problem.tokens)], sent
    loss.backward(problem.case.upstream)
    problem.hold({"logits": (..., columns())}, loss=loss, logits=shard.grad)


def passes_over_a_shard() -> None:
    """Reads and writes by others, forward and backward, of log-probs (verl: and entropy) from float32 and bfloat16."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel
    from torchtitan.components.loss import _LossParallelCrossEntropy
    from verl.utils.megatron.tensor_parallel import vocab_parallel_entropy, vocab_parallel_log_probs_from_logits

    parts, group = megatron()
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    tokens = make_problem(ek.recipes.EGPO).case.tokens

    def verl(logits: Tensor) -> Tensor:
        kept = logits.clone()
        entropy = vocab_parallel_entropy(logits)
        return vocab_parallel_log_probs_from_logits(kept, tokens) + entropy

    def torchtitan(logits: Tensor) -> Tensor:
        flat = logits.flatten(0, 1).float()
        return _LossParallelCrossEntropy.apply(flat, tokens.flatten(), group, PADDED, "none")

    def parallel(logits: Tensor) -> Tensor:
        split = DTensor.from_local(logits.flatten(0, 1).float(), mesh, (Shard(-1),), run_check=False)
        return torch.nn.functional.cross_entropy(split, tokens.flatten(), reduction="none").to_local()

    wanted = {
        lambda logits: parts.vocab_parallel_cross_entropy(logits, tokens): ((6, 4), (8, 6)),
        lambda logits: fused_vocab_parallel_cross_entropy(logits, tokens, group): ((8, 6), (8, 6)),
        verl: ((23, 15), (25, 17)),
        torchtitan: ((9, 7), (11, 9)),
        parallel: ((9, 7), (11, 9)),
    }
    for function, counts in wanted.items():
        for dtype, count in zip((torch.float32, torch.bfloat16), counts, strict=True):
            logits = make_problem(ek.recipes.EGPO, dtype).shard * 1.0
            with loss_parallel(), Passes(logits.numel()) as seen:
                torch.autograd.grad(function(logits).sum(), logits)
            assert (seen.reads, seen.writes) == count, (function, dtype, seen.reads, seen.writes)


def start(rank: int, folder: Path, ways: list[str]) -> None:
    """Entry point of a process: one after the other, for starting takes longer than all of them."""
    # Kernels that are fused by a compiler are not what is compared.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1"}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Where Megatron puts the memory of sequence parallelism.
    torch.cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    Sending.watch()
    for way in ways:
        try:
            WAYS[way]()
        except Exception as error:
            raise AssertionError(way) from error
    leave()


WAYS: dict[str, Callable[[], None]] = {
    "megatron: cross entropy": lambda: megatron_cross_entropy(torch.float32),
    "megatron: cross entropy, bfloat16": lambda: megatron_cross_entropy(torch.bfloat16),
    "megatron: fused cross entropy": megatron_fused_cross_entropy,
    "megatron: output layer": megatron_layer,
    "megatron: output layer, sequence parallel": megatron_layer_in_sequence,
    "padded columns": padded_columns,
    "verl: log-probs and entropy": verl_scores,
    "verl: the page's engine": verl_engine,
    "torchtitan: cross entropy": torchtitan_cross_entropy,
    "torch: loss_parallel": loss_parallel_cross_entropy,
    "passes over a shard": passes_over_a_shard,
}
