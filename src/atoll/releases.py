"""Rounds with noise, as the driver of a run makes them: decided beforehand, counted before they are used, kept once.

Before round one the terms are fixed: the noise, calibrated where an epsilon was asked for, by the sampler and the
number of rounds this run has. In a round

    1. the budget must allow one more release, else the run ends here;
    2. the cohort is drawn, secretly where the accountant counts on it;
    3. noise is added to the sum, and the noised sum is written to disk, whole or not at all;
    4. the release is entered in the journal, and only then is the noised sum used for anything.

A run that is killed goes on from its last checkpoint with the noised sums that are on disk: the same noise, counted
once. A sum whose entry is missing is entered first. Where sums are lost together with a checkpoint, rounds are run
again with new noise, and both are counted: the ledger never holds less than what ran.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atoll.collecting import Release
from atoll.errors import InvalidArgument, RunError, invalid
from atoll.journal import Journal, write_atomically
from atoll.privacy.accounting import Event, calibrate, check_delta, check_known, default_accountant, usual_delta
from atoll.privacy.ledger import Unit
from atoll.privacy.noise import releasing
from atoll.privacy.terms import Terms, ledger_of, statement
from atoll.rounds import Process
from atoll.sampling import Sampler
from atoll.secret import Source

if TYPE_CHECKING:
    from collections.abc import Sequence


def terms_of(process: Process, sampler: Sampler, population: int, rounds: int) -> Terms:
    """Decide the terms of a run.

    Raises:
        InvalidArgument: a sampler no accountant knows, a delta that is too large, a calibration without a solution.
        BudgetSpent: the budget does not allow a single round.
    """
    noise = process.chain.noise
    assert noise is not None
    if sampler.chance is None:
        raise invalid(
            "cohort", sampler.spec.get("name"), "a rule the privacy accountant knows",
            "Use atoll.sampling.poisson(rate), fixed(size), fraction(share), everyone(), cyclic() or sequence(...); a "
            "rule of your own can say chance=lambda population: (\"none\", 1.0), which counts every round for "
            "everybody.",
        )  # fmt: skip
    sampling, rate = sampler.chance(population)
    if sampling != "none" and sampler.secret is None:
        raise invalid(
            "cohort", sampler.spec.get("name"), f"counted as {sampling!r} only where cohorts are drawn in secret",
            "Give the sampler secret=(source, population) -> indices; a cohort that anybody can draw again from the "
            'run\'s seed counts as chance=lambda population: ("none", 1.0).',
        )  # fmt: skip
    delta = check_delta(usual_delta(population) if noise.delta is None else noise.delta, population)
    accountant = noise.accountant or default_accountant([Event(1.0, sampling, rate)])
    check_known(accountant, sampling)
    multiplier = noise.noise_multiplier
    if multiplier is None:
        assert noise.epsilon is not None
        multiplier = calibrate(
            epsilon=noise.epsilon, steps=rounds, delta=delta, sampling_rate=rate, sampling=sampling,
            accountant=accountant, population=population,
        )  # fmt: skip
    budget = noise.budget if noise.epsilon is None else noise.epsilon
    expected = float(sampler.expected(population))
    terms = Terms(
        multiplier, sampling, float(rate), population, expected, delta, accountant, budget, rounds, noise.seed is None
    )
    terms.ledger.check(terms.event)
    return terms


class Releases:
    """The releases of one run.

    Args:
        process: whose pipeline asks for noise.
        sampler: of the cohorts.
        terms: of a run that begins; those of one that goes on are in its journal.
        directory: of the run, or None.
        journal: of the run.
    """

    def __init__(
        self, process: Process, sampler: Sampler, terms: Terms | None, directory: Path | None, journal: Journal
    ) -> None:
        assert process.chain.noise is not None
        self._process, self._sampler, self._journal = process, sampler, journal
        self._folder = None if directory is None else directory / "releases"
        begun = next(iter(journal.events("privacy")), None)
        if begun is not None:
            terms = Terms(**begun.body["terms"])
        assert terms is not None
        if begun is None:
            journal.append("privacy", {"terms": asdict(terms)})
        self.terms: Terms = terms
        seed = process.chain.noise.seed
        self._source = Source() if seed is None else Source(seed=seed)
        entered = [e.body for e in journal.events("release")]
        self._kept = self._stored({body["id"] for body in entered})
        self.ledger = ledger_of(self.terms, (e.body for e in journal.events("release")))
        self._allowed = 0  # releases in all that are known to be within the budget

    def last(self, round: int, total: int) -> int:
        """The round up to which the budget allows the run to go, from `round` on and up to `total`."""
        kept = sum(1 for r in self._kept if r > round)  # counted already
        more = self.ledger.fits(self.terms.event, max(0, total - round - kept))
        self._allowed = self.ledger.releases + more
        return min(total, round + kept + more)

    def cohort(self, seed: int, round: int, clients: "Sequence[str]") -> tuple[str, ...]:
        """Who takes part in a round."""
        return self._sampler.secret_cohort(self._source.derive("cohort", round), seed, round, clients)

    def kept(self, round: int) -> Tensor | None:
        """The noised sum of a round (from 0) that was made before the run was stopped."""
        path = self._kept.get(round + 1)
        return None if path is None else _read(path)[0]

    def release(self, round: int) -> Release:
        """What adds the noise of a round (from 0), and enters it.

        Raises:
            BudgetSpent: the budget does not allow another release.
        """
        event = self.terms.event
        if self.ledger.releases >= self._allowed:
            self.ledger.check(event)
        add = releasing(self.terms.noise_multiplier, self._source.derive("noise", round))

        def release(total: Tensor, bound: float) -> Tensor:
            noised = add(total, bound)
            body = {"id": os.urandom(16).hex(), "round": round + 1, **asdict(event)}
            if self._folder is not None:
                _write(self._folder / f"round-{round + 1:08d}.safetensors", noised, body)
            self._journal.append("release", body)
            self.ledger.enter(event)
            return noised

        return release

    def settled(self, round: int) -> None:
        """Forget the noised sums up to a round: two durable checkpoints stand behind it."""
        for number in [r for r in self._on_disk() if r <= round]:
            self._on_disk()[number].unlink()
            self._kept.pop(number, None)

    @property
    def epsilon(self) -> float:
        """What was spent so far, for the round's record."""
        return self.ledger.told(self.terms.rounds)

    def statement(self) -> dict[str, Any]:
        """What the run may say of itself."""
        return statement(self.terms, self.ledger)

    def _stored(self, entered: set[str]) -> dict[int, Path]:
        """Noised sums on disk by round; those that were not entered are entered now."""
        found: dict[int, Path] = {}
        for number, path in sorted(self._on_disk().items()):
            try:
                _, body = _read(path)
            except RunError:
                continue  # what it was is in the journal, and is counted; the round is run again
            if body["id"] not in entered:
                self._journal.append("release", body)
            found[number] = path
        return found

    def _on_disk(self) -> dict[int, Path]:
        if self._folder is None or not self._folder.exists():
            return {}
        return {int(p.stem.removeprefix("round-")): p for p in self._folder.glob("round-*.safetensors")}


def veiled(fingerprint: str, directory: Path) -> str:
    """A data set's fingerprint under a key of the run directory: whoever has the result cannot check guesses by it.

    The key is made once, readable by its owner alone, and is no part of a result.
    """
    path = directory / "fingerprint.key"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(os.urandom(32))
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    key = path.read_bytes()
    if len(key) != 32:
        raise RunError(f"{path} is damaged: it must hold 32 bytes. The run cannot be told to be the same.")
    return hashlib.blake2b(fingerprint.encode(), key=key, digest_size=16).hexdigest()


def check_splits(asked: "Sequence[str] | None", *, unit: Unit) -> None:
    """Refuse metrics on examples that a run protects: all of a client's, or those it trains on."""
    named = [name for name in asked or () if unit == "client" or name == "train"]
    if not named:
        return
    raise InvalidArgument(
        f"splits names {', '.join(named)}: metrics on these examples in every round are protected by no noise. Leave "
        "them out. Examples that are no client's (data with a holdout) are evaluated as ever; whoever may see the "
        "examples can call result.evaluate(data) after the run."
    )


def _write(path: Path, noised: Tensor, body: dict[str, Any]) -> None:
    from safetensors.torch import save

    content = noised.contiguous()
    told = {**body, "blake2b": _hash(content)}
    write_atomically(path, save({"sum": content}, {"atoll": json.dumps(told)}))


def _read(path: Path) -> tuple[Tensor, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            body: dict[str, Any] = json.loads(file.metadata()["atoll"])
            noised: Tensor = file.get_tensor("sum")
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged: the noised sum it held cannot be used again.") from error
    if body.pop("blake2b", None) != _hash(noised):
        raise RunError(f"{path} is damaged: the noised sum it held cannot be used again.")
    return noised, body


def _hash(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.view(torch.uint8).numpy().data, digest_size=16).hexdigest()
