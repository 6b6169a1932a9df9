"""An object store that does everything a store may do wrong, by a seed."""

import random
from collections.abc import Iterable

from world import Crash


class Faulty:
    """Bytes under names.

    Args:
        seed: of what goes wrong.
        harm: how often something does.
        crash: how often power fails while it is asked.
    """

    def __init__(self, seed: int, harm: float = 0.0, crash: float = 0.0) -> None:
        self.there: dict[str, bytes] = {}
        self.late: list[tuple[str, bytes]] = []
        self.rng, self.harm, self.crash = random.Random(f"store {seed}"), harm, crash
        self.written: dict[str, bytes] = {}
        self.sound = 0  # answers since the last that was damaged

    def put(self, name: str, content: bytes | memoryview) -> None:
        whole = bytes(content)
        assert self.written.setdefault(name, whole) == whole, "a name was used for something else"
        self._asked()
        if self._wrong():
            match self.rng.choice(["refused", "lost", "late"]):
                case "lost":
                    self.there[name] = whole
                case "late":
                    self.late.append((name, whole))
                case _:
                    pass
            raise OSError(5, "the object store does not answer")
        self.there[name] = whole
        self._asked()

    def get(self, name: str, limit: int) -> bytes:
        self._asked()
        if self._wrong():
            if self.rng.random() < 0.5:
                raise OSError(5, "the object store does not answer")
            if self.sound > 20:  # so seldom that whoever asks again has it: for good it is another fault
                self.sound = 0
                return bytes(len(self.there[name]))[:limit]
        self.sound += 1
        if name not in self.there:
            raise FileNotFoundError(name)
        return self.there[name][:limit]

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._asked()
            wrong = self._wrong()
            if not wrong or self.rng.random() < 0.5:
                self.there.pop(name, None)
            if wrong:
                raise OSError(5, "the object store does not answer")

    def names(self) -> dict[str, int]:
        self._asked()
        if self._wrong():
            raise OSError(5, "the object store does not answer")
        return {name: len(content) for name, content in self.there.items()}

    def _wrong(self) -> bool:
        return self.rng.random() < self.harm

    def _asked(self) -> None:
        """Whatever was on its way arrives some time; power may fail."""
        while self.late and self.rng.random() < 0.2:
            name, content = self.late.pop()
            self.there[name] = content
        if self.rng.random() < self.crash:
            raise Crash
