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

Noise that is correlated between rounds is remembered: with every sum the vectors that were drawn for it, and with every
checkpoint those that the strategy keeps. Both are secrets in files of the run directory that its owner alone may read,
and go when the sum goes. There a lost sum ends the run: noise of a round that was released is never drawn again, as
the two together would tell what it hides, and other noise would be no part of the one mechanism that is counted.
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
from atoll.privacy.correlated import Correlated
from atoll.privacy.factorization import Strategy, named, restored
from atoll.privacy.ledger import Unit
from atoll.privacy.noise import Noise, deviation, releasing
from atoll.privacy.terms import Terms, ledger_of, statement
from atoll.rounds import Process
from atoll.sampling import Sampler
from atoll.secret import Source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def terms_of(process: Process, sampler: Sampler, population: int, rounds: int) -> Terms:
    """Decide the terms of a run.

    Raises:
        InvalidArgument: a sampler no accountant knows, a delta that is too large, a calibration without a solution.
        BudgetSpent: the budget does not allow a single round.
    """
    noise = process.chain.noise
    assert noise is not None
    strategy = _strategy(noise, sampler, population, rounds)
    if sampler.chance is None:
        raise invalid(
            "cohort", sampler.spec.get("name"), "a rule the privacy accountant knows",
            "Use atoll.sampling.poisson(rate), fixed(size), fraction(share), everyone(), cyclic() or sequence(...); a "
            "rule of your own can say chance=lambda population: (\"none\", 1.0), which counts every round for "
            "everybody.",
        )  # fmt: skip
    sampling, rate = sampler.chance(population) if strategy is None else ("none", 1.0)
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
            epsilon=noise.epsilon, steps=rounds if strategy is None else 1, delta=delta, sampling_rate=rate,
            sampling=sampling, accountant=accountant, population=population,
        )  # fmt: skip
    budget = noise.budget if noise.epsilon is None else noise.epsilon
    expected = float(sampler.expected(population))
    terms = Terms(
        multiplier, sampling, float(rate), population, expected, delta, accountant, budget, rounds, noise.seed is None,
        None if strategy is None else strategy.spec,
    )  # fmt: skip
    ledger = terms.ledger
    ledger.check(terms.event)
    bound, own = process.chain.facts.bound, ledger.strategy
    assert bound is not None
    size = process.chain.seen_size(process.length, process.split)[0]
    sensitivity, together = (1.0, 0) if own is None else (own.sensitivity, own.rounds)
    deviation(multiplier, bound, size, sensitivity=sensitivity, rounds=together)
    return terms


def _strategy(noise: Noise, sampler: Sampler, population: int, rounds: int) -> Strategy | None:
    """How noise is correlated in so many rounds of cohorts by this sampler; None: it is not.

    Raises:
        InvalidArgument: a sampler that promises no separation, or too little of it; a strategy for fewer rounds or
            participations.
    """
    given = noise.strategy
    if given is None:
        return None
    if sampler.apart is None:
        raise invalid(
            "cohort", sampler.spec.get("name"), "a rule that keeps a client's participations apart, with "
            "correlated_noise",
            "Use atoll.sampling.min_separation(size, separation), or everyone() with separation 1; or gaussian_noise, "
            "which knows what other samplers save.",
        )  # fmt: skip
    apart = sampler.apart(population)
    if isinstance(given, str):
        return named(given, rounds, apart)
    given = restored(given.spec)  # the one that will be counted
    if apart < given.separation:
        raise invalid(
            "strategy", f"{given.spec['name']}(separation={given.separation})",
            f"a separation of at most {apart}, which the sampler {sampler.spec.get('name')} promises",
            f"Or use atoll.sampling.min_separation(size, {given.separation}).",
        )  # fmt: skip
    if rounds > given.rounds:
        raise invalid(
            "rounds", rounds, f"at most the {given.rounds} that the strategy {given.spec['name']} is built for",
            f"Build it for {rounds}.",
        )  # fmt: skip
    if (most := -(-given.rounds // apart)) > given.participations:
        raise invalid(
            "strategy", f"{given.spec['name']}(participations={given.participations})",
            f"at least {most}, as often as a client may take part in {given.rounds} rounds, {apart} apart",
            "Leave participations out.",
        )  # fmt: skip
    return given


class Releases:
    """The releases of one run.

    Args:
        process: whose pipeline asks for noise.
        sampler: of the cohorts.
        terms: of a run that begins; those of one that goes on are in its journal.
        directory: of the run, or None.
        journal: of the run.
        round: from which the run goes on.

    Raises:
        RunError: correlated noise cannot go on, since what was drawn is lost; sums of a run without a journal.
    """

    def __init__(
        self,
        process: Process,
        sampler: Sampler,
        terms: Terms | None,
        directory: Path | None,
        journal: Journal,
        round: int = 0,
    ) -> None:
        assert process.chain.noise is not None
        self._process, self._sampler, self._journal = process, sampler, journal
        self._folder = None if directory is None else directory / "releases"
        begun = next(iter(journal.events("privacy")), None)
        if begun is not None:
            terms = Terms(**begun.body["terms"])
        elif self._on_disk():
            raise RunError(
                f"{self._folder} holds noised sums of a run whose journal is gone: nobody knows what they spent, nor "
                "of which experiment they are. Choose another directory; what that run spent counts as well."
            )
        if self._folder is not None:
            for path in self._folder.glob(".*"):  # of a process that was killed as it wrote: noise, and never released
                path.unlink()
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
        self._correlated = self._resumed({body["round"] for body in entered if body["round"] > round}, round)

    def last(self, round: int, total: int) -> int:
        """The round up to which the budget allows the run to go, from `round` on and up to `total`.

        Raises:
            InvalidArgument: more rounds than the noise was correlated for.
        """
        own = self.ledger.strategy
        if own is not None and total > own.rounds:
            raise invalid(
                "rounds", total, f"at most the {own.rounds} that the noise was correlated for when the run began",
                "More rounds are another run, whose epsilon adds to that of this one.",
            )  # fmt: skip
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
        if path is None:
            return None
        tensors, _ = _read(path)
        if self._correlated is not None:
            assert self._correlated.round == round
            self._correlated.redo(tensors["drawn"])
        return tensors["sum"]

    def release(self, round: int) -> Release:
        """What adds the noise of a round (from 0), and enters it.

        Raises:
            BudgetSpent: the budget does not allow another release.
        """
        event = self.terms.event
        if self.ledger.releases >= self._allowed:
            self.ledger.check(event)
        source = self._source.derive("noise", round)
        add, correlated = releasing(self.terms.noise_multiplier, source), self._correlated
        assert correlated is None or correlated.round == round

        def release(total: Tensor, bound: float) -> Tensor:
            secret = dict[str, Tensor]()
            if correlated is None:
                noised = add(total, bound)
            else:
                assert bound == self._process.chain.facts.bound
                noised, secret["drawn"] = correlated.add(total, source)
            body = {"id": os.urandom(16).hex(), "round": round + 1, **asdict(event)}
            if self._folder is not None:
                _write(self._folder / f"round-{round + 1:08d}.safetensors", {"sum": noised, **secret}, body)
            self._journal.append("release", body)
            self.ledger.enter(event)
            return noised

        return release

    def save(self, round: int) -> bool:
        """Keep what the next rounds take back, before a checkpoint says that this round is done.

        Returns:
            Whether there may be one: not where the next sum has been made already, and its round then failed.
        """
        own = self._correlated
        if self._folder is None or own is None or own.state is None or not own.strategy.vectors:
            return True
        if own.round != round:
            return False
        _write(self._folder / _noise(round), {"state": own.state}, {"round": round})
        return True

    def settled(self, round: int) -> None:
        """Forget the noised sums up to a round, and noise before it: two durable checkpoints stand behind it."""
        for number, path in self._on_disk().items():
            if number <= round:
                path.unlink()
                self._kept.pop(number, None)
        if self._folder is not None and self._correlated is not None:
            for path in self._folder.glob("noise-*.safetensors"):
                if path.name < _noise(round):
                    path.unlink()

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

    def _resumed(self, entered: set[int], round: int) -> Correlated | None:
        """The noise that goes on behind a round, where it is correlated, if all that was drawn since is there."""
        strategy, bound = self.ledger.strategy, self._process.chain.facts.bound
        if strategy is None:
            return None
        assert bound is not None
        lost = sorted(entered - self._kept.keys())
        if lost:
            raise RunError(
                f"the noised sum of round {lost[0]} was released, but {self._folder} has it no more: correlated noise "
                "is never drawn again for a round. Begin a new run in another directory; what this one spent counts "
                "as well."
            )
        state = None
        if round and strategy.vectors:
            assert self._folder is not None
            path = self._folder / _noise(round)
            if not path.exists():
                raise RunError(f"{path} is missing: without it correlated noise cannot go on. Begin a new run.")
            state = _read(path)[0]["state"]
        return Correlated(strategy, self.terms.noise_multiplier, bound, round, state)

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


def _noise(round: int) -> str:
    """The file with what correlated noise keeps behind a round."""
    return f"noise-{round:08d}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor], body: dict[str, Any]) -> None:
    from safetensors.torch import save

    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    told = {**body, "blake2b": _hash(content)}
    write_atomically(path, save(content, {"atoll": json.dumps(told)}), mode=0o600)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            body: dict[str, Any] = json.loads(file.metadata()["atoll"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged: the noised sum it held cannot be used again.") from error
    if body.pop("blake2b", None) != _hash(tensors):
        raise RunError(f"{path} is damaged: what it held cannot be used again.")
    return tensors, body


def _hash(tensors: "Mapping[str, Tensor]") -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
