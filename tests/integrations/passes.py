"""How often torch's own operators go over memory of one size: what a chain of them costs that no compiler joins."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NUMBER_A_ROW = ("index", "index_put_", "gather", "scatter_")
SHAPE_ALONE = ("zeros_like", "new_zeros", "new_full")


class Passes(TorchDispatchMode):
    """Counts reads and writes of tensors of ``size`` numbers while it is on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.reads, self.writes = size, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        found = function(*args, **(kwargs or {}))
        schema = function._schema
        given = dict(zip((each.name for each in schema.arguments), args, strict=False)) | (kwargs or {})
        changed = [each.name for each in schema.arguments if each.alias_info and each.alias_info.is_write]
        is_view = not changed and any(each.alias_info for each in schema.returns)
        name = schema.name.removeprefix("aten::")
        if not is_view and name not in NUMBER_A_ROW and not name.startswith("empty"):
            if name not in SHAPE_ALONE:
                self.reads += self._whole([value for key, value in given.items() if key != "out"])
            self.writes += self._whole([given[key] for key in changed] if changed else found)
        return found

    def _whole(self, values: Any) -> int:
        return sum(isinstance(each, Tensor) and each.numel() == self.size for each in tree_leaves(values))
