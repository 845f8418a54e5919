"""Memory for gradients of logits, which on a CPU is that of the last one."""

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from egpo_kernels.inputs.validation import kind_of


def new_gradient(logits: Tensor) -> Tensor:
    """An empty gradient, contiguous in the shape of ``logits``."""
    if not keeps_memory(logits.device) or logits.numel() == 0:
        return logits.new_empty(logits.shape)
    # Touching new memory costs more than the arithmetic: take the last gradient's, once nothing holds it any more;
    # and where it must be new, numpy asks the system for huge pages.
    size = logits.numel() * logits.element_size()
    memory, holder = last_gradient.pop(logits.device, (None, None))
    if memory is None or holder is None or memory.size != size or not holder.expired():
        memory = np.empty(size, np.uint8)
    gradient = torch.from_numpy(memory).view(logits.dtype).view(logits.shape)
    last_gradient[logits.device] = (memory, StorageWeakRef(gradient.untyped_storage()))
    return gradient


def keeps_memory(device: torch.device) -> bool:
    """Whether a gradient's memory is used again."""
    return kind_of(device) == "cpu"


last_gradient: dict[torch.device, tuple[np.ndarray, StorageWeakRef]] = {}
