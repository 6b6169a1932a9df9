"""What a site's program makes of its own author's process."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atoll.errors import RunError
from atoll.net.calls import Charter, Errand
from atoll.net.children import Child, Ready, Trained
from atoll.net.control import Terms, Work
from atoll.net.evaluating import NOTHING
from atoll.net.frames import encode
from atoll.net.party import Phase
from atoll.net.policy import Left
from atoll.net.site import Bounds, Failed, Part

TERMS = Terms(32, 1.0, 4.0, (2, 3), 64, 3, "lying")


class Author:
    """A process of an author's code that says what it is told to, once."""

    def __init__(self, sums: Terms | None) -> None:
        self.alive, self.ready = True, Ready("i", False, sums)

    async def call(self, *given: Any, **more: Any) -> tuple[Ready, bytes]:
        return self.ready, b""

    async def end(self) -> None:
        self.alive = False


@pytest.mark.parametrize("said", [(None, TERMS), (TERMS, None), (TERMS, TERMS)], ids=["later", "no more", "always"])
def test_code_that_changes_its_mind_about_a_secure_sum_is_ended(
    said: tuple[Terms | None, Terms | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what it says first it is decided whether reports leave, and whether each is entered: not anew in between."""
    authors = [Author(sums) for sums in said]
    left = iter(authors)

    async def start(*given: Any, **more: Any) -> Author:
        return next(left)

    monkeypatch.setattr(Child, "start", start)
    errand = Errand(Charter("r", "0" * 64, {}), "i", "", "")
    site: Any = SimpleNamespace(
        home=SimpleNamespace(folder=tmp_path),
        client=None,
        bounds=Bounds(),
        name="a",
        data="",
        errand=lambda run: errand,
    )
    part = Part(site, "r")

    async def twice() -> None:
        await part._loaded()
        authors[0].alive = False
        await part._loaded()

    if said[0] == said[1]:
        asyncio.run(twice())
        return
    with pytest.raises(Failed, match="another one when its process was started before"):
        asyncio.run(twice())
    assert not authors[1].alive


def test_a_site_says_nothing_else_while_its_report_is_on_its_way(tmp_path: Path) -> None:
    """What it would say is that the report is there: one more request of every site in every round."""
    said = list[str]()
    state = SimpleNamespace(phase=Phase.SENDING)

    def due() -> list[Any]:
        said.append("due")
        state.phase = Phase.ENDED
        return []

    agent: Any = SimpleNamespace(state=state, due=due, busy=False, wake=0.001)
    site: Any = SimpleNamespace(
        home=SimpleNamespace(folder=tmp_path), client=None,
        errand=lambda run: Errand(Charter("r", "0" * 64, {}), "i", "", ""),
    )  # fmt: skip
    part = Part(site, "r")

    async def speak() -> None:
        async with part._delivering:
            speaking = asyncio.ensure_future(part._speak(agent))
            await asyncio.sleep(0.05)
            assert not said and not speaking.done()
        await asyncio.wait_for(speaking, 60.0)
        assert said == ["due"]

    asyncio.run(speak())


def test_an_evaluation_under_noise_is_refused_before_the_authors_code_hears_of_it(tmp_path: Path) -> None:
    heard = list[Any]()
    author: Any = Author(None)

    async def call(call: Any, *given: Any, **more: Any) -> tuple[Trained, bytes]:
        heard.append(call)
        return Trained(NOTHING, 0, 0), b""

    author.call = call
    site: Any = SimpleNamespace(
        home=SimpleNamespace(folder=tmp_path), client=None, bounds=Bounds(),
        errand=lambda run: Errand(Charter("r", "0" * 64, {}), "i", "", ""),
    )  # fmt: skip
    part = Part(site, "r")
    why = "what sites would say of a model is not protected by the run's noise"
    part._child, part._ready, part._bound = author, Ready("i", False, None, why), True
    work = Work("r", 3, 0, "0" * 64, 1, "evaluate", 0, ("a",), 1, {}, None)
    with pytest.raises(RunError, match="not protected by the run's noise"):
        asyncio.run(part._trained(work, b"1", b"memory"))
    assert not heard


def test_no_number_leaves_beside_an_evaluation_that_was_looked_at(tmp_path: Path) -> None:
    """The author's process would have the server told of more, or its client remember something else."""
    none = torch.zeros(1, 2, dtype=torch.float64)
    names = ("validation", "test", "personal/validation", "personal/test")
    frame = encode({"outputs": torch.ones(1, dtype=torch.int64)} | dict.fromkeys(names, none))
    left = list[Left]()
    author: Any = Author(None)

    async def call(*given: Any, **more: Any) -> tuple[Trained, bytes]:
        return Trained((10**9, 123456789, 5), 987654321, len(frame)), frame + b"else"

    author.call = call
    site: Any = SimpleNamespace(
        home=SimpleNamespace(folder=tmp_path), client=None, bounds=Bounds(),
        outgoing=SimpleNamespace(write=left.append), errand=lambda run: Errand(Charter("r", "0" * 64, {}), "i", "", ""),
    )  # fmt: skip
    part = Part(site, "r")
    part._child, part._ready, part._bound = author, Ready("i", False, None), True
    work = Work("r", 3, 0, "0" * 64, 1, "evaluate", 0, ("a",), 1, {}, None)
    done = asyncio.run(part._trained(work, b"1", b"memory"))
    assert (done.frame, done.parts, done.sent, done.memory) == (frame, NOTHING, len(frame), b"memory")
    (entry,) = left
    assert (entry.what, entry.round, entry.attempt) == ("evaluation", 3, 0), "of the model after round 3"
