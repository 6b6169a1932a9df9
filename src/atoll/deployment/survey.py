"""What a table's columns mean, agreed by statistics of the sites before the first round.

The two questions of `data.preprocessing`, asked of sites: counts and sums of every column, then sums of squares around
the agreed means. The server's part is `Agreement`, a state on disk: the sites whose first answers are merged are those
that had answered when enough had, in the order of their names, so that the result does not depend on who came first and
has the bits of a simulation over the same clients. Whoever comes later is told what was agreed.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal, TypeVar

import msgspec

from atoll.data.cells import Raw
from atoll.data.preprocessing import Preprocessing, Survey, agree, means_of, spread, survey
from atoll.data.table import Table
from atoll.errors import AtollError, DataError
from atoll.net.storage import FileSystem, write_durably

ENDING = "="
"""Of a file with a site's answer: no site's name has it, and no file has it that is still being written."""

Stage = Literal["survey", "spread", "ready"]

_T = TypeVar("_T")

_surveys = msgspec.json.Decoder(Survey)
_sums = msgspec.json.Decoder(dict[str, float])


def first_answer(cells: Raw) -> bytes:
    """A site's answer to the first question: rows, missing values, sums and category counts of its training rows."""
    return msgspec.json.encode(survey().local(cells))


def second_answer(cells: Raw, question: bytes) -> bytes:
    """A site's answer to the second question, the means.

    Raises:
        DataError: the question is none, or asks for columns that are not there.
    """
    means = _read(_sums, question)
    if not set(means) <= set(cells.columns):
        raise DataError("the server asks for columns that this table does not have.")
    return msgspec.json.encode(dict(spread(means).local(cells)))


def agreed(question: bytes) -> Preprocessing:
    """The preprocessing that was agreed.

    Raises:
        DataError: it is none.
    """
    return Preprocessing.from_dict(_read(msgspec.json.Decoder(dict), question))


class Agreement:
    """The server's part.

    Args:
        table: the recipe.
        least: sites whose answers are waited for.
        files: of the run's folder.
    """

    def __init__(self, table: Table, least: int, files: FileSystem) -> None:
        self._table, self._least, self._files = table, least, files
        self.fault = ""
        self._move()

    @property
    def stage(self) -> Stage:
        """What sites are asked now."""
        if self._files.size("agreed") >= 0:
            return "ready"
        return "spread" if self._files.size("means") >= 0 else "survey"

    @property
    def question(self) -> str:
        """What the stage needs to know: nothing, the means, or the preprocessing."""
        path = {"survey": "", "spread": "means", "ready": "agreed"}[self.stage]
        return self._files.read(path).decode() if path else ""

    def answered(self, site: str, stage: Literal["survey", "spread"], content: bytes) -> None:
        """A site's answer; one that comes too late changes nothing.

        Raises:
            DataError: it is no such answer.
            OSError: it could not be kept.
        """
        name = _path(stage, site)
        if stage != self.stage or (stage == "spread" and (site not in self.merged or self._files.size(name) >= 0)):
            return
        if stage == "survey":
            _checked(_read(_surveys, content))
        elif set(_read(_sums, content)) != set(_read(_sums, self._files.read("means"))):
            raise DataError("the answer is not about the columns that were asked for.")
        write_durably(self._files, name, content)
        self._move()

    @property
    def merged(self) -> Sequence[str]:
        """The sites whose answers are merged, sorted; empty before they are known."""
        return (
            msgspec.json.decode(self._files.read("merged"), type=list[str]) if self._files.size("merged") >= 0 else []
        )

    def _move(self) -> None:
        """Go on to the next stage if everybody has answered."""
        try:
            if self.stage == "survey":
                there = self._there("survey")
                if len(there) >= self._least:
                    found = self._found(there)
                    means = means_of(found, self._table.options(list(found.columns)))
                    odd = [name for name, mean in means.items() if not math.isfinite(mean)]
                    if odd:
                        raise DataError(f"the mean of {', '.join(odd[:5])} is not finite.")
                    write_durably(self._files, "merged", msgspec.json.encode(there))
                    write_durably(self._files, "means", msgspec.json.encode(means))
            if self.stage == "spread" and set(self.merged) <= set(self._there("spread")):
                found = self._found(self.merged)
                answers = [_read(_sums, self._files.read(_path("spread", s))) for s in self.merged]
                means = _read(_sums, self._files.read("means"))
                squares = reduce(spread(means).merge, answers)
                made = agree(found, squares, self._table.options(list(found.columns)))
                write_durably(self._files, "agreed", msgspec.json.encode(made.to_dict()))
            self.fault = ""
        except AtollError as error:  # tables that do not fit together: the run says so, and waits
            self.fault = f"the sites' tables do not fit together: {error}"

    def _there(self, stage: str) -> list[str]:
        return sorted(n[:-1] for n in self._files.names(stage) if n.endswith(ENDING))

    def _found(self, sites: Sequence[str]) -> Survey:
        answers = {s: _read(_surveys, self._files.read(_path("survey", s))) for s in sites}
        first = next(iter(answers))
        for site, answer in answers.items():
            odd = sorted(answers[first].columns.keys() ^ answer.columns.keys())
            if odd:
                raise DataError(f"columns that {first} or {site} has and the other has not: {', '.join(odd[:5])}.")
        return reduce(survey().merge, answers.values())


def _path(stage: str, site: str) -> str:
    return f"{stage}/{site}{ENDING}"


def _checked(answer: Survey) -> None:
    columns = [*answer.columns.values(), answer.target]
    fine = answer.rows >= 1 and all(
        c.present >= 0
        and c.missing >= 0
        and c.present + c.missing == answer.rows
        and all(n >= 1 for n in c.counts.values())
        for c in columns
    )
    if not fine:
        raise DataError("the answer's counts contradict each other.")


def _read(decoder: "msgspec.json.Decoder[_T]", content: bytes) -> _T:
    try:
        return decoder.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError("the answer cannot be read.") from error
