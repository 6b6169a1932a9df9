"""What a client does with its data: the plan of local training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from numbers import Integral, Real
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atoll.errors import invalid
from atoll.privacy.example_level import ExampleLevel
from atoll.spec import Spec, record

Schedule = Callable[[int, int], float]
"""(round, local step) -> multiplier of the learning rate, both from 0."""

Work = Callable[[str, int], float]
"""(client, round) -> share of the local steps this client does in this round, in [0, 1]."""


CLIP_EPS = 1e-6
"""What is added to a gradient's norm before it divides, as in `torch.nn.utils.clip_grad_norm_`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Local training, as data: engines read it, algorithms adjust it with `dataclasses.replace`.

    Attributes:
        lr: learning rate.
        epochs: passes over the client's examples, or None when `steps` is given.
        steps: minibatch steps, or None when `epochs` is given.
        batch_size: examples per step, or None for all of them.
        shuffle: a new keyed order for each pass; otherwise the order of the data.
        optimizer: "sgd", "adam" or "adamw", with the update rules of `torch.optim`; state starts anew each round.
        momentum: of sgd (heavy ball).
        weight_decay: L2 term added to the gradient (sgd, adam), decoupled for adamw.
        betas: of adam and adamw.
        eps: of adam and adamw.
        schedule: (round, step) -> multiplier of lr.
        work: (client, round) -> share of the steps; None: all of them.
        clip: largest norm of a step's gradient; None: any.
        privacy: clipping and noise for every example; None: none.
    """

    lr: float
    epochs: int | None
    steps: int | None
    batch_size: int | None
    shuffle: bool
    optimizer: Literal["sgd", "adam", "adamw"]
    momentum: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    schedule: Schedule | None
    work: Work | None = None
    clip: float | None = None
    privacy: ExampleLevel | None = None

    @property
    def plain(self) -> bool:
        """Whether a step is exactly `y - rate * gradient`."""
        return self.optimizer == "sgd" and self.momentum == 0.0 and self.weight_decay == 0.0 and self.clip is None

    def rate(self, round: int, step: "NDArray[np.int64]") -> "NDArray[np.float64]":
        """Learning rates of local steps (an array of step numbers, from 0) in a round."""
        if self.schedule is None:
            return np.full(step.shape, self.lr)
        numbers, places = np.unique(step, return_inverse=True)
        return self.lr * np.array([float(self.schedule(round, int(s))) for s in numbers])[places].reshape(step.shape)

    def total_steps(self, examples: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """Local steps of clients with these numbers of examples."""
        if self.steps is not None:
            return np.full(examples.shape, self.steps, dtype=np.int64)
        return (self.epochs or 0) * self.steps_per_pass(examples)

    def total_examples(self, examples: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """The most that clients with these numbers of examples process in all their steps, repeats counted."""
        steps = self.total_steps(examples)
        most = -(-steps // self.steps_per_pass(examples)) * examples
        return most if self.batch_size is None else np.minimum(most, steps * self.batch_size)

    def steps_of(self, examples: "NDArray[np.int64]", clients: Sequence[str], round: int) -> "NDArray[np.int64]":
        """Local steps these clients do in a round: of `total_steps` the share that `work` gives them, rounded up."""
        total = self.total_steps(examples)
        if self.work is None:
            return total
        given = [self.work(client, round) for client in clients]
        for client, share in zip(clients, given, strict=True):
            if not isinstance(share, Real) or not 0 <= float(share) <= 1:
                allowed = f"a function that returns a share in [0, 1] for client {client!r} in round {round + 1}"
                raise invalid("work", share, allowed, "Return 1.0 for clients that do all steps.")
        shares = np.array(given, dtype=np.float64)
        return np.ceil(shares * total - 1e-9).astype(np.int64)  # 0.1 of 30 is a hair above 3

    def steps_per_pass(self, examples: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """Batches in one pass, the short last one included."""
        if self.batch_size is None:
            return np.ones_like(examples)
        return -(-examples // self.batch_size)

    @property
    def spec(self) -> Spec:
        """The plan by name and arguments."""
        return record(
            "local_sgd",
            lr=self.lr,
            epochs=self.epochs,
            steps=self.steps,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            optimizer=self.optimizer,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            betas=self.betas,
            eps=self.eps,
            schedule=self.schedule,
            work=self.work,
            clip=self.clip,
            privacy=self.privacy,
        )


def local_sgd(
    lr: float,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = 32,
    shuffle: bool = True,
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    schedule: Schedule | None = None,
    work: Work | None = None,
    clip: float | None = None,
    privacy: ExampleLevel | None = None,
) -> Plan:
    """Minibatch training on a client's own examples.

    Args:
        lr: learning rate, above 0.
        epochs: passes over the data (1 when neither is given); 0 leaves the model as received.
        steps: minibatch steps instead of epochs; passes are repeated as often as needed.
        batch_size: examples per step; the last batch of a pass may be shorter. None: all examples at once.
        shuffle: draw a new order for every pass.
        optimizer: "sgd", "adam" or "adamw"; its state starts anew in every round.
        momentum: of sgd, in [0, 1).
        weight_decay: at least 0.
        betas: of adam and adamw, each in [0, 1).
        eps: of adam and adamw, above 0.
        schedule: (round, step) -> multiplier of lr, for instance from `atoll.rate`. A pure function: workers have
            copies of whatever it looks at.
        work: (client, round) -> share of the steps a slow client does, in [0, 1]; a pure function too. What methods
            make of unequal work differs: see fedprox and fednova.
        clip: largest L2 norm of a step's gradient over all parameters that are trained, above 0; a longer one is
            shortened to it, as by `torch.nn.utils.clip_grad_norm_` (which divides by the norm plus 1e-6). What is
            clipped is the gradient with a method's pull and shift in it, before weight decay, momentum and Adam. Not
            with `privacy`, which clips the gradients of single examples.
        privacy: clipping and noise that protect every single example, from `atoll.privacy.example_level`. Minibatches
            are then Poisson samples: each example is in a batch with probability batch_size / examples, and `shuffle`
            says nothing.

    Returns:
        The plan, for any algorithm.

    Raises:
        InvalidArgument: an argument outside its range, or both epochs and steps.
    """
    if not _number(lr) or not 0 < lr < float("inf"):
        raise invalid("lr", lr, "a finite number above 0")
    if epochs is not None and steps is not None:
        raise invalid("steps", steps, "left out when epochs is given", "Give epochs= or steps=, not both.")
    if epochs is None and steps is None:
        epochs = 1
    for name, value, least in (("epochs", epochs, 0), ("steps", steps, 0), ("batch_size", batch_size, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least):
            raise invalid(name, value, f"an integer of at least {least}")
    if optimizer not in ("sgd", "adam", "adamw"):
        raise invalid("optimizer", optimizer, '"sgd", "adam" or "adamw"')
    if not _number(momentum) or not 0 <= momentum < 1:
        raise invalid("momentum", momentum, "in [0, 1)")
    if momentum and optimizer != "sgd":
        raise invalid("momentum", momentum, f"0 with optimizer={optimizer!r}", "Use betas= for adam and adamw.")
    if not _number(weight_decay) or not 0 <= weight_decay < float("inf"):
        raise invalid("weight_decay", weight_decay, "a finite number of at least 0")
    if len(betas) != 2 or not all(_number(b) and 0 <= b < 1 for b in betas):
        raise invalid("betas", betas, "two numbers in [0, 1)")
    if not _number(eps) or not 0 < eps < float("inf"):
        raise invalid("eps", eps, "a finite number above 0")
    if clip is not None and (not _number(clip) or not 0 < clip < float("inf")):
        raise invalid("clip", clip, "a finite number above 0", "Leave it out for gradients of any length.")
    if schedule is not None and not _takes(schedule, 0, 0):
        raise invalid("schedule", schedule, "callable(round, step) -> multiplier")
    if work is not None and not _takes(work, "", 0):
        raise invalid("work", work, "callable(client, round) -> share of the steps")
    if privacy is not None and not isinstance(privacy, ExampleLevel):
        raise invalid("privacy", privacy, "made by atoll.privacy.example_level(clip=..., noise_multiplier=...)")
    if privacy is not None and clip is not None:
        raise invalid("clip", clip, "left out with privacy=", "example_level(clip=...) clips every example's gradient.")
    epochs, steps, batch_size = (None if n is None else int(n) for n in (epochs, steps, batch_size))
    beta1, beta2 = (float(b) for b in betas)
    return Plan(
        float(lr), epochs, steps, batch_size, shuffle, optimizer, float(momentum), float(weight_decay),
        (beta1, beta2), float(eps), schedule, work, None if clip is None else float(clip), privacy,
    )  # fmt: skip


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


def _takes(function: object, *arguments: object) -> bool:
    """Whether something can be called with these arguments, as far as it tells."""
    if not callable(function):
        return False
    try:
        signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # it does not tell
        return True
    return True
