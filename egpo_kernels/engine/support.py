"""What a sampler kept, as the caller gave it: checked, and brought to where it is used."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from egpo_kernels.config.results import SamplingSupport
from egpo_kernels.engine.calls import Call
from egpo_kernels.formulas.kept import has_record
from egpo_kernels.inputs.layout import Layout, to_device
from egpo_kernels.inputs.validation import check_dense, check_instance, check_tensor


class Support(NamedTuple):
    """Ids ``[M]``, sound offsets ``[N + 1]``, what is NaN where they had to be mended; and, where the host knows, which
    rows ``[N]`` have a record.
    """

    ids: Tensor
    offsets: Tensor
    poison: Tensor
    recorded: Tensor | None


def with_support(call: Call, read: Support) -> Call:
    """The call with what a sampler kept for its rows."""
    poison = read.poison if call.layout.poison is None else read.poison * call.layout.poison
    return call._replace(layout=call.layout._replace(poison=poison), support=(read.ids, read.offsets))


def read_support(support: Any, layout: Layout) -> Support:
    """Check a `SamplingSupport` for the rows of a layout; on the CPU, the host knows which have a record."""
    check_instance("support", support, SamplingSupport)
    count, device = layout.num_rows + 1, layout.device
    ids, offsets = (check_dense(f"support.{name}", value, "integer") for name, value in support._asdict().items())
    if ids.dim() != 1:
        raise ValueError(f"support.ids has shape {list(ids.shape)}; it must be [M], all rows' ids one after another")
    host = ids.device.type == offsets.device.type == "cpu"
    home = ids.device if host else device
    ids = check_tensor("support.ids", ids, "integer", {}, home)
    offsets = check_tensor("support.offsets", offsets, "integer", {"[N + 1]": (count,)}, home)
    offsets, poison = torch.ops.egpo_kernels.support_offsets(offsets, ids.shape[0])
    recorded = has_record(offsets) if host else None
    if host and home != device:
        wanted = "it must be on the logits' device there"
        ids, offsets, poison = (to_device("support", value, device, wanted) for value in (ids, offsets, poison))
    return Support(ids, offsets, poison, recorded)
