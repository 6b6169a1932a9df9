"""Histories and runs to look at."""

import math

import pytest

from atoll.history import Record


def history(rounds: int, *, personal: bool = False, every: int = 1) -> list[Record]:
    """A smooth made-up history."""
    records: list[Record] = []
    for number in range(1, rounds + 1):
        left = math.exp(-4 * number / rounds)
        value = 0.85 - 0.35 * left + 0.01 * math.sin(number)
        spread = {"mean": value - 0.02, "weighted": value, "worst_decile": value - 0.12, "std": 0.06, "undefined": 0.0}
        evaluated = number % every == 0
        records.append(
            Record(
                number,
                4,
                {"loss": 0.3 + 0.4 * left},
                test={"loss": 0.35 + 0.4 * left, "accuracy": value} if evaluated else {},
                spread={"accuracy": spread} if evaluated else {},
                personal={"loss": 0.3, "accuracy": value + 0.03} if personal and evaluated else {},
                personal_spread={"accuracy": spread} if personal and evaluated else {},
                bytes_up=1200,
                bytes_down=2400,
                seconds={"train": 0.02, "evaluate": 0.005},
            )
        )
    return records


@pytest.fixture(name="history")
def make_history():
    """`history(rounds, personal=..., every=...)`."""
    return history
