"""A training step of verl's own worker and FSDP2 engine, on a CPU; test_verl_engine.py starts it as a process."""

import os
import sys
import types
from functools import partial

import torch
import torch.distributed as dist
import verl.models.transformers.monkey_patch
import verl.workers.engine.fsdp
from transformers import LlamaConfig, LlamaForCausalLM
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.workers import config as settings
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from egpo_kernels.integrations.verl import engine_loss
from tests.support.accuracy import assert_rounding


def nothing(*_: object, **__: object) -> int:
    return 0


class PlatformCPU(PlatformCUDA):
    """What verl's engine asks of a device; verl has no CPU of its own, but lets plugins bring a platform."""

    device_name = "cpu"
    device_module = types.SimpleNamespace(
        **{name: nothing for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated")},
        **{name: nothing for name in ("memory_reserved", "empty_cache", "synchronize", "manual_seed", "set_device")},
        mem_get_info=lambda *_: (0, 0),
        current_device=nothing,
        is_available=lambda: True,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
    )
    is_available = lambda self: True  # noqa: E731
    current_device = lambda self: torch.device("cpu")  # noqa: E731
    device_count = lambda self: 1  # noqa: E731
    communication_backend_name = lambda self: "gloo"  # noqa: E731
    set_device = synchronize = empty_cache = nothing


VOCAB, PROMPTS, RESPONSES = 64, [2, 3, 2, 4, 3, 2, 3, 3], [5, 3, 6, 4, 1, 6, 2, 5]


def make_worker(folder: str) -> TrainingWorker:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=1, **shape)).save_pretrained(folder)
    eager = {"attn_implementation": "eager"}
    worker = TrainingWorker(
        settings.TrainingWorkerConfig(
            model_type="language_model",
            model_config=settings.HFModelConfig(
                path=folder, load_tokenizer=False, use_remove_padding=False, override_config=eager
            ),
            engine_config=settings.FSDPEngineConfig(
                strategy="fsdp2",
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=4,
                use_torch_compile=False,
                model_dtype="fp32",
                mixed_precision={"param_dtype": "fp32"},
            ),
            optimizer_config=settings.FSDPOptimizerConfig(lr=1e-3, total_training_steps=4),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    worker.flops_counter = None  # it knows no CPU
    return worker


def make_data():
    generator = torch.Generator().manual_seed(1)

    def nested(rows):
        return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)

    def noise(length):
        return 0.3 * torch.randn(length, generator=generator)

    prompts, responses = (
        [torch.randint(VOCAB, (n,), generator=generator) for n in all] for all in (PROMPTS, RESPONSES)
    )
    pairs = list(zip(PROMPTS, RESPONSES, strict=True))
    tensors = {
        "prompts": nested(prompts),
        "responses": nested(responses),
        "input_ids": nested(torch.cat(both) for both in zip(prompts, responses, strict=True)),
        "position_ids": nested(torch.arange(before + after) for before, after in pairs),
        "loss_mask": nested((torch.arange(before + after) >= before).long() for before, after in pairs),
        "response_mask": nested(torch.ones(length).long() for length in RESPONSES),
        "old_log_probs": nested(noise(length) - 4.2 for length in RESPONSES),
        "ref_log_prob": nested(noise(length) - 4.2 for length in RESPONSES),
        "advantages": nested(torch.full((length,), float(noise(1))) for length in RESPONSES),
    }
    others = {"global_batch_size": 8, "temperature": 1.0, "calculate_entropy": True}
    return tu.get_tensordict(tensors, others | {"pad_mode": DatasetPadMode.NO_PADDING})


def step(worker, start, loss, loss_mode):
    """Metrics and gradients, in two micro-batches."""
    worker.engine.module.load_state_dict(start)
    bonus = {"entropy_coeff": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.1}
    policy_loss = settings.PolicyLossConfig(loss_mode=loss_mode)
    actor = settings.FSDPActorConfig(rollout_n=4, ppo_micro_batch_size_per_gpu=4, policy_loss=policy_loss, **bonus)
    worker.set_loss_fn(partial(loss, config=actor))
    gradients = []

    def keep(*_: object) -> None:
        gradients.extend(each.grad.full_tensor().flatten().clone() for each in worker.engine.module.parameters())

    hook = worker.engine.optimizer.register_step_pre_hook(keep)
    metrics = tu.get(worker.train_batch(make_data()), "metrics")
    hook.remove()
    return metrics, torch.cat(gradients)


def main(folder: str) -> None:
    set_platform(PlatformCPU())
    dist.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=0, world_size=1)
    engines = EngineRegistry._engines["language_model"]["fsdp2"]
    engines["cpu"] = engines["cuda"]
    verl.models.transformers.monkey_patch.is_trl_available = lambda: False  # verl wants an older one
    worker = make_worker(f"{folder}/model")
    start = {name: value.clone() for name, value in worker.engine.module.state_dict().items()}
    metrics, gradient = step(worker, start, engine_loss, "egpo")
    assert gradient.abs().max() > 1e-3 and metrics["actor/pg_clipfrac"]
    moved = [
        (value - start[name]).full_tensor().abs().max() for name, value in worker.engine.module.state_dict().items()
    ]
    assert max(moved) > 0
    for loss_mode in ("egpo", "vanilla"):
        theirs, expected = step(worker, start, ppo_loss, loss_mode)
        assert_rounding(gradient, expected)
        assert_rounding(torch.tensor([metrics["loss"], 1.0]), torch.tensor([theirs["loss"], 1.0]))
        assert theirs.keys() <= metrics.keys()
    print("the same step")
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo's may outlive the interpreter


if __name__ == "__main__":
    main(sys.argv[1])
