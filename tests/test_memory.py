"""What clients keep: staging, committing, and rows that a checkpoint refers to."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from torch import Tensor

from atoll.errors import RunError
from atoll.memory import PINS, ClientMemory
from atoll.vectors import Layout

LAYOUT = Layout(("variate", "head"), ((2,), (1,)))
DEFAULT = torch.tensor([0.5, 0.5, -1.0], dtype=torch.float64)


def row(value: float) -> Tensor:
    return torch.full((3,), float(value), dtype=torch.float64)


def keep(memory: ClientMemory, **values: float) -> None:
    memory.stage(list(values), torch.stack([row(v) for v in values.values()]))
    memory.commit()


def read(memory: ClientMemory, *clients: str) -> list[float]:
    rows = memory.rows(list(clients), DEFAULT)
    assert rows.shape == (len(clients), 3)
    return [float(r[0]) for r in rows]


@pytest.fixture(params=["ram", "file"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> ClientMemory:
    path = tmp_path / "folder" / "memory.bin" if request.param == "file" else None
    return ClientMemory(LAYOUT, torch.float64, path)


def test_a_first_visit_finds_the_default(memory: ClientMemory) -> None:
    keep(memory, b=2)
    rows = memory.rows(["a", "b", "c"], DEFAULT)
    assert torch.equal(rows[0], DEFAULT) and torch.equal(rows[1], row(2)) and torch.equal(rows[2], DEFAULT)
    rows.fill_(9)
    assert read(memory, "a", "b") == [0.5, 2.0], "rows are copies"
    assert len(memory) == 1 and "b" in memory and "a" not in memory


def test_staged_rows_wait_for_the_commit(memory: ClientMemory) -> None:
    keep(memory, a=1)
    memory.stage(["a", "b"], torch.stack((row(5), row(6))))
    assert read(memory, "a", "b") == [1.0, 0.5]
    version = memory.version
    memory.commit()
    assert read(memory, "a", "b") == [5.0, 6.0] and memory.version == version + 1


def test_discarded_rows_leave_no_trace(memory: ClientMemory) -> None:
    keep(memory, a=1)
    version = memory.version
    memory.stage(["a", "b"], torch.stack((row(5), row(6))))
    memory.discard()
    assert read(memory, "a", "b") == [1.0, 0.5] and len(memory) == 1 and memory.version == version
    memory.commit()
    assert read(memory, "a", "b") == [1.0, 0.5]


def test_the_last_of_several_stagings_counts(memory: ClientMemory) -> None:
    memory.stage(["a"], row(1)[None])
    memory.stage(["a"], row(2)[None])
    memory.commit()
    assert read(memory, "a") == [2.0]


def test_no_fields_keep_nothing() -> None:
    nothing = ClientMemory(Layout((), ()), torch.float32)
    nothing.stage(["a"], torch.empty(1, 0))
    nothing.commit()
    assert len(nothing) == 0 and nothing.version == 0
    assert nothing.rows(["a", "b"], torch.empty(0)).shape == (2, 0)


def test_slots_do_not_grow_with_rounds(memory: ClientMemory) -> None:
    clients = [f"c{i}" for i in range(20)]
    for value in range(300):
        memory.stage(clients, torch.stack([row(value)] * 20))
        memory.discard() if value % 7 == 3 else memory.commit()
        if value % 5 == 0:
            memory.flush()
            memory.pin()
    slots = list(memory.index.values())
    assert len(set(slots)) == 20
    # The present rows, the staged ones and those of each pinned checkpoint, doubled by growth.
    assert max(slots) < 2 * 20 * (PINS + 2)
    assert memory._capacity <= 2 * 20 * (PINS + 2)  # pyright: ignore[reportPrivateUsage]


def test_a_pinned_index_keeps_its_rows_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "memory.bin"
    memory = ClientMemory(LAYOUT, torch.float64, path)
    keep(memory, a=1, b=2)
    memory.flush()
    memory.pin()
    index = memory.index
    for value in range(10, 60):
        keep(memory, a=value, b=-value, **{f"c{value}": value})
    memory.flush()
    reopened = ClientMemory(LAYOUT, torch.float64, path, index)
    assert read(reopened, "a", "b", "c10") == [1.0, 2.0, 0.5]
    keep(reopened, a=7, c=8)
    assert read(reopened, "a", "b", "c") == [7.0, 2.0, 8.0]
    again = ClientMemory(LAYOUT, torch.float64, path, index)
    assert read(again, "a", "b") == [1.0, 2.0], "what came after the checkpoint must not touch its rows"


def test_the_checkpoint_before_the_last_can_still_be_read(tmp_path: Path) -> None:
    path = tmp_path / "memory.bin"
    memory = ClientMemory(LAYOUT, torch.float64, path)
    indices: list[dict[str, int]] = []
    for value in range(1, 6):
        keep(memory, a=value, b=10 * value)
        memory.flush()
        memory.pin()
        indices.append(memory.index)
        keep(memory, a=-1, b=-1)
        keep(memory, a=-2, b=-2)
        for age in range(1, min(PINS, len(indices)) + 1):
            found = ClientMemory(LAYOUT, torch.float64, path, indices[-age])
            assert read(found, "a", "b") == [float(value - age + 1), 10.0 * (value - age + 1)]


def test_rows_have_their_dtype_on_disk(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        path = tmp_path / f"{dtype}.bin"
        memory = ClientMemory(LAYOUT, dtype, path)
        memory.stage(["a"], torch.full((1, 3), 0.1, dtype=dtype))
        memory.commit()
        memory.flush()
        rows = ClientMemory(LAYOUT, dtype, path, memory.index).rows(["a"], torch.zeros(3, dtype=dtype))
        assert rows.dtype == dtype and torch.equal(rows, torch.full((1, 3), 0.1, dtype=dtype))


def test_a_short_or_missing_file_is_a_damaged_memory(tmp_path: Path) -> None:
    path = tmp_path / "memory.bin"
    memory = ClientMemory(LAYOUT, torch.float64, path)
    keep(memory, a=1, b=2)
    memory.flush()
    index = memory.index
    path.write_bytes(path.read_bytes()[:24])
    with pytest.raises(RunError, match="damaged"):
        ClientMemory(LAYOUT, torch.float64, path, index)
    path.unlink()
    with pytest.raises(RunError, match=r"damaged|missing"):
        ClientMemory(LAYOUT, torch.float64, path, index)


class Model(RuleBasedStateMachine):
    """The memory against a dictionary, with pins."""

    clients = Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.memory = ClientMemory(LAYOUT, torch.float64)
        self.committed: dict[str, float] = {}
        self.staged: dict[str, float] = {}
        self.pinned: list[tuple[dict[str, int], dict[str, float]]] = []

    @rule(names=st.sets(st.sampled_from("abcdef"), min_size=1), value=st.integers(1, 99))
    def stage(self, names: set[str], value: int) -> None:
        self.memory.stage(sorted(names), torch.stack([row(value + ord(n)) for n in sorted(names)]))
        self.staged |= {n: float(value + ord(n)) for n in names}

    @rule()
    def commit(self) -> None:
        self.memory.commit()
        self.committed |= self.staged
        self.staged = {}

    @rule()
    def discard(self) -> None:
        self.memory.discard()
        self.staged = {}

    @rule()
    def pin(self) -> None:
        self.memory.pin()
        self.pinned = [*self.pinned, (self.memory.index, dict(self.committed))][-PINS:]

    @invariant()
    def rows_are_the_committed_ones(self) -> None:
        names = sorted("abcdef")
        assert read(self.memory, *names) == [self.committed.get(n, 0.5) for n in names]

    @invariant()
    def pinned_slots_still_hold_their_rows(self) -> None:
        table = self.memory._table  # pyright: ignore[reportPrivateUsage]
        for index, values in self.pinned:
            assert {n: float(table[slot][0]) for n, slot in index.items()} == values


TestAgainstADictionary = Model.TestCase
TestAgainstADictionary.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
