"""The ring's own source run as plain Python, its arithmetic replaced by bookkeeping: which block does each step take?

    walk(Batch(blocks=5, slots=3, ...)).check()
    walk(batch, source().replace("launch.slots - 1", "launch.slots"))    # a mutation, which must not pass

A logit is its own address. What a step takes must be the addresses of the very block of the very row; what is stored,
those of the place it is stored to. Copies land as late as they may (`tests.support.copies`); in place, a logit that has
been overwritten is no address any more.
"""

import ast
import inspect
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from egpo_kernels.triton import ring
from tests.support.copies import Copies, Slot

SPOILT, ZERO, NOTHING, WRITTEN = -1, -2, -3, -4
WIDTH = 2


class Batch(NamedTuple):
    """Rows of ``vocab`` logits: counted or not, with a gradient or not."""

    vocab: int
    slots: int
    programs: int
    counted: list[bool]
    live: list[bool]
    in_place: bool


class Values(np.ndarray):
    """Numbers that have no other dtype to go to."""

    def to(self, dtype: Any) -> "Values":
        return self


def values(array: Any) -> Values:
    return np.asarray(array).view(Values)


class Pointer:
    """Into some array: places of a row. Of whatever words."""

    def __init__(self, array: np.ndarray, place: Any = 0) -> None:
        self.array, self.place = array, place
        self.dtype = SimpleNamespace(element_ty="float16")

    def to(self, dtype: Any, bitcast: bool) -> "Pointer":
        return self

    def __add__(self, places: Any) -> "Pointer":
        return Pointer(self.array, self.place + places)


class Walk:
    """One launch; also what the source calls ``gl``, ``tl``, ``async_copy`` and the rest."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.program, self.copies = batch, 0, Copies()
        rows = len(batch.counted)
        self.logits = np.arange(rows * batch.vocab)
        self.out = self.logits if batch.in_place else np.full_like(self.logits, NOTHING)
        self.stored = np.full(rows * batch.vocab, NOTHING)
        self.fetched = np.zeros(rows * batch.vocab, dtype=int)
        self.row, self.taken = -1, []

    # Of the language.

    bfloat16, int32, float32, int64 = "bfloat16", "int32", "float32", "int64"

    def program_id(self, axis: int) -> int:
        return self.program

    def num_programs(self, axis: int) -> int:
        return self.batch.programs

    def arange(self, start: int, end: int, layout: None) -> np.ndarray:
        return np.arange(start, end)

    def where(self, condition: Any, one: Any, other: Any) -> Any:
        if isinstance(one, np.ndarray):
            return values(np.where(condition, one, other if other != float("-inf") else NOTHING))
        return one if condition else other

    def multiple_of(self, value: Any, divisor: int) -> Any:
        return value

    def full(self, shape: list[int], value: float, dtype: Any, layout: None) -> np.ndarray:
        return values(np.full(shape, ZERO))

    def load(self, pointer: Pointer, mask: bool = True, other: Any = None) -> Any:
        return pointer.array[pointer.place] if mask else other

    def store(self, pointer: Pointer, stored: Any, mask: Any = None, eviction_policy: str = "") -> None:
        if mask is None:
            return
        places, inside = np.broadcast_arrays(pointer.place, mask)
        assert (self.stored[places[inside]] == NOTHING).all(), "stored twice"
        self.stored[places[inside]] = stored[inside]
        pointer.array[places[inside]] = WRITTEN

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: None) -> Any:
        slots = [Slot(tuple(shape[1:]), dtype, values(np.full(shape[1:], SPOILT))) for _ in range(shape[0])]
        return SimpleNamespace(index=lambda place: slots[place])

    def pointer_type(self, element: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *arguments, **options: None
        raise AttributeError(name)

    # Of cp.async.

    def copy_block(self, slot: Slot, pointer: Pointer, mask: Any) -> None:
        places, inside = np.broadcast_arrays(pointer.place, mask)
        assert places.shape == slot.shape

        def read() -> np.ndarray:
            self.fetched[places[inside]] += 1
            return values(np.where(inside, pointer.array[np.where(inside, places, 0)], ZERO))

        self.copies.ask(slot, values(np.full(slot.shape, SPOILT)), read)

    def commit_group(self) -> None:
        self.copies.commit()

    def wait_group(self, under_way: int) -> None:
        self.copies.wait(under_way)

    # Of the package: what is arithmetic there.

    def row_pointer(self, matrix: Any, row: int, length: int, aligned: bool) -> Pointer:
        return Pointer(matrix.array, row * self.batch.vocab)

    def load_token(self, rows: Any, row: int, *_: Any) -> tuple[int, int]:
        self.row, self.taken = row, []
        return 0, 0

    def merge_block(self, found: Any, z: np.ndarray, *_: Any) -> Any:
        self.taken.append(z.ravel())
        return found

    def even_row(self, *_: Any) -> Any:
        taken = np.concatenate(self.taken)
        own = np.arange(self.batch.vocab) + self.row * self.batch.vocab
        assert (taken[: self.batch.vocab] == own).all(), "the sweep for statistics took another block"
        assert (taken[self.batch.vocab :] == NOTHING).all(), "it counted what is not in the row"
        return SimpleNamespace(maximum=0)

    def row_derivatives(self, rows: Any, row: int, *_: Any) -> tuple[int, int]:
        return int(self.batch.live[row]), 0

    def gradient_of(self, z: np.ndarray, *_: Any) -> np.ndarray:
        return z

    def names(self) -> dict[str, Any]:
        """What the source may use, without what it defines itself."""
        own = {name: getattr(self, name) for name in dir(self) if not name.startswith("_")}
        return own | {
            "gl": self, "tl": self, "async_copy": self, "LOG2_E": 1, "START": 0,
            "read_settings": lambda *_: None,
            "row_inverse_temperature": lambda *_: 1,
            "token_statistics": lambda *_: (0, 0),
            "levels": lambda *_: (0, 0),
            "write_token": lambda *_: None,
            "RowStatistics": lambda *_: None,
        }  # fmt: skip

    def run(self, kernel: Any) -> None:
        """Every program, one after the other."""
        batch = self.batch
        block = WIDTH * 2
        launch = SimpleNamespace(
            threads=1, strips=2, width=WIDTH, slots=batch.slots, end=2 if batch.vocab % block else 0
        )
        extent = SimpleNamespace(vocab=batch.vocab, full=batch.vocab // block * block)
        kind = SimpleNamespace(dtype=SimpleNamespace(element_ty="float16"))
        logits, out = (SimpleNamespace(array=array, ptr=kind) for array in (self.logits, self.out))
        rows = SimpleNamespace(mask_ptr=Pointer(np.array(batch.counted)))
        for self.program in range(min(batch.programs, len(batch.counted))):
            self.copies = Copies()
            kernel(
                logits, out, rows, Pointer(self.out), Pointer(self.out), None, None, 1, 1, len(batch.counted),
                extent, launch, None, None, True, True,
            )  # fmt: skip
            assert self.copies.landed, "a program ended with copies under way"

    def check(self) -> None:
        """Everything was stored, once and in its place, and nothing was read oftener than said."""
        batch = self.batch
        shape = (len(batch.counted), batch.vocab)
        block = np.arange(batch.vocab) // (2 * WIDTH)
        dropped = -(-batch.vocab // (2 * WIDTH)) - batch.slots
        for row, (counted, live) in enumerate(zip(batch.counted, batch.live, strict=True)):
            own = np.arange(batch.vocab) + row * batch.vocab
            stored, fetched = self.stored.reshape(shape)[row], self.fetched.reshape(shape)[row]
            assert (stored == (own if counted and live else ZERO)).all(), "another block was stored"
            assert (fetched == int(counted) + int(counted and live) * (block < dropped)).all(), (
                "read too often or seldom"
            )


def source() -> str:
    """The functions of the ring as they stand in its file, without decorators and annotations."""
    tree = ast.parse(inspect.getsource(ring))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(ast.Module(functions, [])):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(ast.Module(functions, []))


def walk(batch: Batch, text: str) -> Walk:
    """Run the source over a batch; raises where a step takes what it should not."""
    made = Walk(batch)
    names = made.names()
    exec(compile(text, "ring", "exec"), names)
    made.run(names["ring_policy_loss_kernel"])
    made.check()
    return made
