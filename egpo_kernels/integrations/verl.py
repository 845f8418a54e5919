"""verl 0.9.1: policy losses and advantages under names of its own.

verl imports this module by itself, through the entry point ``verl.plugins``; docs/verl.md says what to configure.
"""

import functools
import inspect
import sys
import warnings
from importlib.machinery import ModuleSpec
from typing import Any

import torch
import verl

from egpo_kernels.api.groups import group_advantages
from egpo_kernels.config import recipes
from egpo_kernels.config.settings import AdvantageConfig
from egpo_kernels.inputs.layout import group_ids
from egpo_kernels.integrations.verl_losses import LOSSES, registered_loss
from egpo_kernels.integrations.verl_losses import engine_loss as engine_loss


def egpo_advantages(data: Any, config: Any = None) -> Any:
    """Advantages of a whole rollout batch, times the response mask, with the settings of ``config.egpo``.

    ``token_level_scores``, which include no KL, decide whether a response is correct.

    Args:
        data: verl's ``DataProto``: ``token_level_rewards``, ``response_mask`` and ``old_log_probs`` (or else
            ``rollout_log_probs``) ``[B, R]``, and ``uid`` of each response.
        config: ``config.algorithm`` or an ``AlgoConfig``; its entry ``egpo`` holds ``recipe`` (default ``egpo``) and
            fields of `AdvantageConfig`.

    Returns:
        ``data`` with ``advantages`` and ``returns``, ``[B, R]`` float32.

    Raises:
        ValueError: A wrong setting; a batch without log-probs if the settings need them.
    """
    from omegaconf import OmegaConf

    held: Any = OmegaConf.to_container(OmegaConf.create({"egpo": (config or {}).get("egpo")}), resolve=True)
    given = held["egpo"] or {}
    if not isinstance(given, dict):
        raise ValueError(f"algorithm.egpo is {given!r}; it must be settings by name: +algorithm.egpo.nsr_scale=0.5")
    try:
        base = recipes.get(given.pop("recipe", "egpo")).advantage
        settings = AdvantageConfig.from_dict(base.to_dict() | given)
    except (ValueError, TypeError) as error:
        raise ValueError("algorithm.egpo: " + str(error).replace("AdvantageConfig", "algorithm.egpo")) from error
    batch, mask = data.batch, data.batch["response_mask"]
    rewards = batch["token_level_rewards"].sum(-1)
    scores = batch.get("token_level_scores", batch["token_level_rewards"]).sum(-1)
    log_probs = batch.get("old_log_probs", batch.get("rollout_log_probs", None))
    if log_probs is None and settings.weight != "none":
        raise ValueError(
            "the batch has neither old_log_probs nor rollout_log_probs, which the weight is made of; it must have one: "
            "actor_rollout_ref.rollout.calculate_log_probs=True, or +algorithm.egpo.weight=none"
        )
    correct = scores > settings.correct_threshold
    ids, _ = group_ids(data.non_tensor_batch["uid"], len(rewards), rewards.device, None)
    tokens = rewards.new_zeros(len(rewards)).index_add(0, ids, mask.sum(-1).to(rewards.dtype))
    # verl fills a batch up with groups in which nothing counts: their zeros are no part of the batch's spread.
    rewards = rewards.where(tokens[ids] > 0, torch.nan)
    found = group_advantages(ids, rewards, log_probs, mask, correct=correct, config=settings)
    batch["advantages"] = batch["returns"] = found.advantages[:, None] * mask
    return data


def _register_losses(core_algos: Any) -> None:
    for loss_mode in LOSSES:
        core_algos.register_policy_loss(loss_mode)(functools.partial(registered_loss, loss_mode))


def _wrap_compute_advantage(trainer: Any) -> None:
    original, wanted = trainer.compute_advantage, {"data", "adv_estimator", "norm_adv_by_std_in_grpo", "config"}
    signature = inspect.signature(original)
    if not wanted <= {*signature.parameters}:
        raise TypeError(f"compute_advantage{signature} lacks {', '.join(sorted(wanted - {*signature.parameters}))}")

    @functools.wraps(original)
    def compute_advantage(*inputs: Any, **named: Any) -> Any:
        given = signature.bind(*inputs, **named).arguments
        estimator, config, data = given["adv_estimator"], given.get("config"), given["data"]
        if estimator != "egpo" and (config is None or config.get("egpo") is None):
            return original(*inputs, **named)
        if estimator not in ("egpo", "grpo"):
            raise ValueError(f"algorithm.adv_estimator is {estimator!r} beside algorithm.egpo; it must be egpo or grpo")
        if not given.get("norm_adv_by_std_in_grpo", True):
            raise ValueError(
                "algorithm.norm_adv_by_std_in_grpo is False; it must be True here: set +algorithm.egpo.scale=none"
            )
        if "response_mask" not in data.batch:
            data.batch["response_mask"] = trainer.compute_response_mask(data)
        return egpo_advantages(data, config)

    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and getattr(module, "compute_advantage", None) is original:
            module.compute_advantage = compute_advantage  # type: ignore[attr-defined]


HOOKS = {"verl.trainer.ppo.core_algos": _register_losses, "verl.trainer.ppo.ray_trainer": _wrap_compute_advantage}


def _attach(module: Any) -> None:
    try:
        HOOKS[module.__name__](module)
    except Exception as error:
        # verl tells of a plugin's exception at level DEBUG only.
        warnings.warn(
            f"egpo_kernels adds nothing to {module.__name__} of verl {verl.__version__}: {error!r}. It knows verl "
            "0.9.1: install that, or set VERL_USE_EXTERNAL_PLUGINS=none",
            RuntimeWarning,
            stacklevel=2,
        )


class _Finder:
    """Attaches to verl's modules when they are imported; importing them here would cost every process a second."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec that would be found anyway, its module attached to once it has run."""
        if name not in HOOKS:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not _Finder)
        spec = next(filter(None, others), None)
        loader: Any = spec and spec.loader
        if loader:
            loader.exec_module = functools.partial(_execute, loader.exec_module)
        return spec


def _execute(execute: Any, module: Any) -> None:
    execute(module)
    _attach(module)


for _name in HOOKS.keys() & sys.modules.keys():
    _attach(sys.modules[_name])
sys.meta_path.insert(0, _Finder)
