"""Secure sums over sites, the site's side: its machine in the turn at work, in the agent, not in the author's process.

    mark    in the run's folder: the last turn this site took part in, durable before an answer leaves

Keys, masks and the shares of others are in memory alone. So a site that was started again sits out the turn it was in:
it has forgotten what it would need, and the mark keeps it from taking that turn up anew. What was answered is kept as
long as it may have to be sent again: the very bytes, never another answer to the same step. A server that says two
things in one step is answered once.
"""

from collections.abc import Callable
from typing import Any, get_args

import msgspec
import numpy as np
import torch

from atoll import secagg
from atoll.net.control import STEPS, Abstain, Say, Terms, Turn, content_hash, plain
from atoll.net.frames import FrameError, declared, decode
from atoll.net.peers import Peers
from atoll.net.storage import FileSystem, write_durably
from atoll.net.sums import parameters_of
from atoll.secagg import Identity, Mark, Policy, SecAggError, messages
from atoll.secagg.masks import RINGS, Ring

PATH = "mark"

ASKS = dict(zip(STEPS, get_args(messages.FromServer), strict=True))
"""What a server says in a step."""

Answered = tuple[Say | Abstain, bytes]
"""A message and the frame beside it."""
Leaving = Callable[[Turn, bytes, bytes], None]
"""Called with what is about to leave: the turn it answers, the bytes, and the report that is in them under masks."""


class Masker:
    """A site's part in the secure sums of a run.

    Args:
        identity: of the site: name and private key.
        terms: of the approved experiment.
        files: the run's folder.
        peers: keys that the site has pinned.
        least: fewest sites of a sum, at the owner's wish; the experiment may ask for more.
        again: whether a vector that has left may be sent once more, under other masks, when its turn came to nothing.
            A server that lies about that could take the sums of two turns from each other. Where the approved
            experiment trusts the server to keep to the protocol (`server="curious"`), it may.
        attempts: turns at a round that the site takes part in.
        leaving: told of every answer before it leaves, once.
        notice: called with what the site's owner should hear of.
    """

    def __init__(
        self,
        identity: Identity,
        terms: Terms,
        files: FileSystem,
        peers: Peers,
        *,
        least: int = 3,
        again: bool = False,
        attempts: int = 16,
        leaving: Leaving | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self._identity, self._terms, self._files, self._peers = identity, terms, files, peers
        self._policy = Policy(
            server=terms.server, least=max(least, terms.least, 3), again=again or terms.server == "curious",
            attempts=attempts,
        )  # fmt: skip
        self._leaving = leaving or (lambda turn, raw, report: None)
        self._notice = notice or (lambda text: None)
        self._at = (-1, -1)
        self._client: secagg.Client | None = None
        self._why, self._warned = "", set[str]()
        self._last: tuple[str, Answered] | None = None

    def __repr__(self) -> str:
        return f"Masker({self._identity.name!r}, {self._client!r})"

    def answer(self, turn: Turn, task: str, report: Callable[[], bytes]) -> list[Answered]:
        """What this site says in a step of a turn; nothing where the step was answered otherwise, or is over.

        Args:
            turn: what the server says.
            task: `sums.task_hash` of what the site was trained on, by its own reckoning.
            report: its report, where the vector is.
        """
        at, heard = (turn.round, turn.turn), content_hash(turn.content)
        if at < self._at:
            return self._abstains(turn, "this site is in a later turn.")
        if at > self._at:
            self.forget()
            self._at = at
            if turn.step != "join":
                self._why = "it was started again in the middle of this turn."
        elif self._last is not None and self._last[0] == heard:
            return [self._last[1]]
        if not self._why:
            try:
                answered = self._packed(turn, self._said(turn, task, report))
                self._leaving(turn, answered[1] or answered[0].content, report() if turn.step == "mask" else b"")
            except SecAggError as error:
                if error.reason == "order" and self._client is not None:
                    self._notice(f"round {turn.round + 1}: {error}")
                    return []  # late, twice or never to be answered; the turn goes on
                self._out(turn, str(error))
            except OSError as error:
                self._out(turn, "its disk refuses.", error)
            else:
                self._last = heard, answered
                return [answered]
        return self._abstains(turn, self._why)

    def _abstains(self, turn: Turn, why: str) -> list[Answered]:
        told = Abstain(turn.run, self._identity.name, turn.round, turn.attempt, turn.turn, plain(why))
        return [(told, b"")]

    def forget(self) -> None:
        """Let go of the turn's secrets, and of what was answered."""
        self._client, self._last, self._why = None, None, ""

    def _out(self, turn: Turn, why: str, error: Exception | None = None) -> None:
        self.forget()
        self._why = why
        self._notice(f"round {turn.round + 1}: this site takes no part in turn {turn.turn}: {error or why}")

    def _said(self, turn: Turn, task: str, report: Callable[[], bytes]) -> Any:
        message = secagg.decode_server(turn.content)
        if type(message) is not ASKS[turn.step]:  # else a vector could leave as another answer, not looked at
            raise SecAggError("order", f"the server asks for the step {turn.step} by its message of another.")
        if self._client is None:
            return self._joined(turn, message, task)
        before, client = self._client.mark, self._client
        match message:
            case secagg.Invitation():
                raise SecAggError("order", "the server invites to a turn that has begun.")
            case messages.Roll():
                said = client.reveal(message)
            case messages.Neighbours():
                said = client.share(message)
            case messages.Delivery():
                said = client.mask(message, vector_of(report(), self._terms))
            case messages.Survivors():
                said = client.confirm(message)
            case messages.Confirmations():
                said = client.unmask(message)
        if client.mark != before:
            self._marked(client)
        self._warn(client)
        return said

    def _joined(self, turn: Turn, message: Any, task: str) -> Any:
        if not isinstance(message, secagg.Invitation):
            raise SecAggError("order", "the server goes on with a turn that this site is not in.")
        if (message.run, message.round, message.attempt) != (turn.run, turn.round, turn.turn):
            raise SecAggError("policy", "the invitation is to another turn than the message says.")
        if message.parameters != parameters_of(self._terms, message.parameters.length):
            raise SecAggError("policy", "the server asks for another sum than the approved experiment does.")
        if turn.keys.keys() != set(message.cohort):
            raise SecAggError("roster", "the server gives keys of others than the cohort.")
        client = secagg.Client(self._identity, self._peers.known(turn.keys), self._policy, self._mark())
        said = client.join(message, bytes.fromhex(task))
        self._peers.pin(turn.keys)  # of a turn that it takes part in, and of no other
        self._marked(client)
        self._warn(client)
        self._client = client
        return said

    def _warn(self, client: secagg.Client) -> None:
        """Tell the owner what is new."""
        for text in client.warnings:
            if text not in self._warned:
                self._warned.add(text)
                self._notice(text)

    def _mark(self) -> Mark | None:
        if self._files.size(PATH) < 0:
            return None
        try:
            return msgspec.json.decode(self._files.read(PATH), type=Mark)
        except msgspec.MsgspecError as error:
            raise SecAggError("used", "what this site took part in last cannot be read.") from error

    def _marked(self, client: secagg.Client) -> None:
        write_durably(self._files, PATH, msgspec.json.encode(client.mark))

    def _packed(self, turn: Turn, message: Any) -> tuple[Say, bytes]:
        """An answer as it travels: a masked vector beside its message."""
        raw = secagg.encode(message)
        beside = turn.step == "mask"
        say = Say(
            turn.run, self._identity.name, turn.round, turn.attempt, turn.turn, turn.step, b"" if beside else raw,
            content_hash(raw), len(raw) if beside else 0,
        )  # fmt: skip
        return say, raw if beside else b""


def vector_of(report: bytes, terms: Terms) -> Ring:
    """The vector in a report's frame.

    Raises:
        SecAggError: there is none of the ring.
    """
    try:
        vector = decode(report, declared(report)).get("wire/ring")
    except FrameError as error:
        raise SecAggError("input", f"the report is no frame: {error}") from error
    if vector is None or vector.ndim != 2 or len(vector) != 1:
        raise SecAggError("input", "the report holds no vector to be summed.")
    dtype, ring = (torch.int32, RINGS[32]) if terms.bits <= 32 else (torch.int64, RINGS[64])
    if vector.dtype != dtype:
        raise SecAggError("input", f"the report's vector is of {vector.dtype}, which is not the ring's.")
    return np.ascontiguousarray(vector[0].numpy()).view(ring)
