"""The problems: linear models on a few examples, each with the models that a method must pass through.

All examples of a client of a quadratic problem are the same, so that batches and their order do not matter: with inputs
u = sqrt(a / 2) and targets u b the mean squared error of the model x u is f(x) = a / 2 (x - b)^2. Throughout, a_i and
b_i are a client's curvature and optimum, p_i its weight in the mean (they sum to one), K_i its local steps, eta the
local rate, x the server's model, and q_i = (1 - eta a_i)^K_i what K_i steps leave of a distance from b_i.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Vector = tuple[float, ...]


@dataclass(frozen=True)
class Client:
    """A client and its examples.

    Attributes:
        name: of the client.
        inputs: one for each example.
        targets: one for each example; -1 or 1 under the logistic loss.
    """

    name: str
    inputs: tuple[Vector, ...]
    targets: tuple[float, ...]


@dataclass(frozen=True)
class Factors:
    """What is trained in the place of the parameters: the model is the inner product of x + scale * b a with the input.

    Attributes:
        a: start of A, [1, d] of a model with d parameters.
        b: start of B, [1, 1].
        scale: of the product.
    """

    a: Vector
    b: float
    scale: float


@dataclass(frozen=True)
class Problem:
    """What an implementation is to do, and what must come out.

    The model is the inner product of its parameters with the input, without a bias. Clients train by plain gradient
    descent on batches in whatever order; the last batch of a pass may be shorter.

    Attributes:
        name: of the problem.
        method: which method is to be run.
        options: its settings: mu, alpha, server_lr, momentum, beta1, beta2, tau, option.
        derivation: where the answer comes from.
        clients: the population.
        loss: "squared", the mean of (model - target)^2, or "logistic", the mean of log(1 + exp(-target model)).
        start: parameters the server begins with.
        lr: local learning rate.
        batch: examples in a batch.
        epochs: passes of a client in a round.
        rounds: how many.
        cohorts: who takes part in each round; empty: everyone in all.
        weights: "examples", or "uniform": of clients in the mean.
        factors: of rank one, which clients train in the place of the parameters; None: there are none.
        expected: the server's parameters after every round, or after the last alone; with factors x + scale * b a.
        tolerance: largest difference allowed in any number.
    """

    name: str
    method: str
    derivation: str
    clients: tuple[Client, ...]
    start: Vector
    lr: float
    batch: int
    epochs: int
    rounds: int
    expected: tuple[Vector, ...]
    options: Mapping[str, float] = field(default_factory=dict[str, float])
    loss: Literal["squared", "logistic"] = "squared"
    cohorts: tuple[tuple[str, ...], ...] = ()
    weights: Literal["examples", "uniform"] = "examples"
    factors: Factors | None = None
    tolerance: float = 1e-6

    def cohort(self, round: int) -> tuple[Client, ...]:
        """Who takes part in a round, from 0."""
        if not self.cohorts:
            return self.clients
        return tuple(c for c in self.clients if c.name in self.cohorts[round])


A, B, SIZES = (1.0, 2.0, 3.5), (-1.0, 0.5, 4.0), (2, 4, 6)
NAMES = ("one", "two", "three")
START, LR, ALL = 0.75, 0.1, max(SIZES)
EXAMPLES = tuple(n / sum(SIZES) for n in SIZES)
UNIFORM = (1 / 3, 1 / 3, 1 / 3)
PARTIAL = (("one",), ("two", "three"), ("three", "one"), ("two",))


def quadratics() -> tuple[Client, ...]:
    """Three clients of two, four and six examples, of different curvatures and optima."""
    made: list[Client] = []
    for name, a, b, n in zip(NAMES, A, B, SIZES, strict=True):
        u = math.sqrt(a / 2)
        made.append(Client(name, ((u,),) * n, (u * b,) * n))
    return tuple(made)


def steps(epochs: int, batch: int) -> tuple[int, ...]:
    """Local steps of each of them."""
    return tuple(epochs * -(-n // batch) for n in SIZES)


def shrunk(k: Sequence[int], lr: float = LR) -> tuple[float, ...]:
    """q_i."""
    return tuple((1 - lr * a) ** n for a, n in zip(A, k, strict=True))


def affine(slope: float, fixed: float, rounds: int) -> tuple[Vector, ...]:
    """x_t = x* + slope^t (x_0 - x*), after rounds 1 to T of x <- x* + slope (x - x*)."""
    return tuple((fixed + slope**t * (START - fixed),) for t in range(1, rounds + 1))


def weighted(w: Sequence[float]) -> float:
    """The mean of the optima under weights that need not sum to one."""
    return sum(v * b for v, b in zip(w, B, strict=True)) / sum(w)


def averaged(p: Sequence[float], k: Sequence[int], rounds: int) -> tuple[Vector, ...]:
    """Federated averaging's models."""
    q = shrunk(k)
    pull = [pi * (1 - qi) for pi, qi in zip(p, q, strict=True)]
    return affine(1 - sum(pull), weighted(pull), rounds)


def recursion(next: Callable[[float, int], float], rounds: int) -> tuple[Vector, ...]:
    """Models of x <- next(x, round)."""
    x, path = START, list[Vector]()
    for t in range(rounds):
        x = next(x, t)
        path.append((x,))
    return tuple(path)


def change(x: float, members: Sequence[int], k: Sequence[int], p: Sequence[float]) -> float:
    """The mean change of some clients' models."""
    q, total = shrunk(k), sum(p[i] for i in members)
    return sum(p[i] * (B[i] - x) * (1 - q[i]) for i in members) / total


def _fedavg() -> list[Problem]:
    one, five, unequal = steps(1, ALL), steps(5, ALL), steps(2, 2)
    base: dict[str, Any] = {"clients": quadratics(), "start": (START,), "lr": LR}
    members = [[NAMES.index(n) for n in names] for names in PARTIAL]
    local = (
        "K local steps take y_i to b_i + q_i (x - b_i). The mean is affine in x, so that x_t = x* + (sum p_i q_i)^t "
        "(x_0 - x*) with x* = sum p_i (1 - q_i) b_i / sum p_i (1 - q_i), which is not the optimum."
    )
    return [
        Problem(
            name="one local step", method="fedavg", batch=ALL, epochs=1, rounds=8, expected=averaged(EXAMPLES, one, 8),
            derivation="One step on all examples is gradient descent on sum p_i f_i: x_t = x* + (1 - eta sum p_i "
            "a_i)^t (x_0 - x*) with the optimum x* = sum p_i a_i b_i / sum p_i a_i.",
            **base,
        ),
        Problem(
            name="five local steps", method="fedavg", batch=ALL, epochs=5, rounds=10,
            expected=averaged(EXAMPLES, five, 10), derivation=local, **base,
        ),
        Problem(
            name="five local steps, equal weights", method="fedavg", batch=ALL, epochs=5, rounds=10, weights="uniform",
            expected=averaged(UNIFORM, five, 10), derivation=local + " Here p_i = 1/3.", **base,
        ),
        Problem(
            name="unequal numbers of steps", method="fedavg", batch=2, epochs=2, rounds=10,
            expected=averaged(EXAMPLES, unequal, 10),
            derivation=local + " Two passes in batches of two are K = 2, 4 and 6 steps.", **base,
        ),
        Problem(
            name="a sequence of cohorts", method="fedavg", batch=ALL, epochs=3, rounds=8, cohorts=PARTIAL * 2,
            expected=recursion(lambda x, t: x + change(x, members[t % 4], steps(3, ALL), EXAMPLES), 8),
            derivation="Each round averages the clients that took part, by weights that sum to one over them: x <- sum "
            "over the cohort of p_i (b_i + q_i (x - b_i)) / sum over the cohort of p_i.",
            **base,
        ),
    ]  # fmt: skip


def _corrected() -> list[Problem]:
    base: dict[str, Any] = {"clients": quadratics(), "start": (START,), "lr": LR}
    five, unequal = steps(5, ALL), steps(2, 2)

    def proximal(k: Sequence[int], mu: float, rounds: int) -> tuple[Vector, ...]:
        slope = level = 0.0
        for p, a, b, n in zip(EXAMPLES, A, B, k, strict=True):
            r = (1 - LR * (a + mu)) ** n
            slope += p * (r + (1 - r) * mu / (a + mu))
            level += p * (1 - r) * a * b / (a + mu)
        return affine(slope, level / (1 - slope), rounds)

    def nova(rounds: int) -> tuple[Vector, ...]:
        q = shrunk(unequal)
        common = sum(p * n for p, n in zip(EXAMPLES, unequal, strict=True))
        pull = [p * (1 - qi) / n for p, qi, n in zip(EXAMPLES, q, unequal, strict=True)]
        return affine(1 - common * sum(pull), weighted(pull), rounds)

    def scaffold(cohorts: Sequence[Sequence[int]], rounds: int, option: int) -> tuple[Vector, ...]:
        """The paper's algorithm 1 with scalars."""
        x, c, own, path, count = START, 0.0, [0.0] * len(A), list[Vector](), 4
        for t in range(rounds):
            members = cohorts[t % len(cohorts)]
            moved, renewed_by = 0.0, 0.0
            for i in members:
                y = x
                for _ in range(count):
                    y -= LR * (A[i] * (y - B[i]) - own[i] + c)
                renewed = A[i] * (x - B[i]) if option == 1 else own[i] - c + (x - y) / (count * LR)
                moved, renewed_by, own[i] = moved + (y - x), renewed_by + renewed - own[i], renewed
            x, c = x + moved / len(members), c + renewed_by / len(A)
            path.append((x,))
        return tuple(path)

    everyone, partial = [[0, 1, 2]], [[NAMES.index(n) for n in names] for names in PARTIAL]
    optimum = ((weighted(A),),)
    story = (
        "Algorithm 1 with scalars: y <- y - eta (a_i (y - b_i) - c_i + c), {} then x <- x + mean over the cohort of "
        "(y_i - x), and c <- c + (1/N) sum over the cohort of what c_i changed by, N = 3 the population."
    )
    second = "c_i <- c_i - c + (x - y) / (K eta);"
    return [
        Problem(
            name="a proximal term", method="fedprox", options={"mu": 1.5}, batch=ALL, epochs=5, rounds=10,
            expected=proximal(five, 1.5, 10),
            derivation="The pull is towards the received model x: y_i = c_i + r_i (x - c_i) with r_i = (1 - eta (a_i + "
            "mu))^K and c_i = (a_i b_i + mu x) / (a_i + mu). The mean is affine in x.",
            **base,
        ),
        Problem(
            name="a proximal term, unequal steps", method="fedprox", options={"mu": 0.5}, batch=2, epochs=2, rounds=10,
            expected=proximal(unequal, 0.5, 10), derivation="As above with K = 2, 4 and 6.", **base,
        ),
        Problem(
            name="no proximal term", method="fedprox", options={"mu": 0.0}, batch=ALL, epochs=5, rounds=10,
            expected=averaged(EXAMPLES, five, 10), derivation="With mu = 0 it is federated averaging.", **base,
        ),
        Problem(
            name="normalised averaging", method="fednova", batch=2, epochs=2, rounds=10, expected=nova(10),
            derivation="x <- x + (sum p_i K_i) sum p_i (y_i - x) / K_i with K = 2, 4 and 6: affine in x, with the "
            "weights p_i (1 - q_i) / K_i at the fixed point.",
            **base,
        ),
        Problem(
            name="normalised averaging of equal steps", method="fednova", batch=ALL, epochs=5, rounds=10,
            expected=averaged(EXAMPLES, five, 10), derivation="Equal numbers of steps make it federated averaging.",
            **base,
        ),
        Problem(
            name="control variates, option II", method="scaffold", options={"option": 2}, batch=ALL, epochs=4,
            rounds=10, weights="uniform", expected=scaffold(everyone, 10, 2), derivation=story.format(second), **base,
        ),
        Problem(
            name="control variates, option I", method="scaffold", options={"option": 1}, batch=ALL, epochs=4, rounds=10,
            weights="uniform", expected=scaffold(everyone, 10, 1),
            derivation=story.format("c_i <- a_i (x - b_i);"), **base,
        ),
        Problem(
            name="control variates, partial participation", method="scaffold", options={"option": 2}, batch=ALL,
            epochs=4, rounds=12, weights="uniform", cohorts=PARTIAL * 3, expected=scaffold(partial, 12, 2),
            derivation=story.format(second) + " An implementation that divides by the cohort leaves this path at once.",
            **base,
        ),
        Problem(
            name="control variates remove the drift", method="scaffold", options={"option": 2}, batch=ALL, epochs=4,
            rounds=48, weights="uniform", cohorts=PARTIAL * 12, expected=optimum,
            derivation="The fixed point is the optimum of the unweighted mean of f_i, sum a_i b_i / sum a_i, under "
            "partial participation too.",
            **base,
        ),
        Problem(
            name="dynamic regularisation removes the drift", method="feddyn", options={"alpha": 2.0}, batch=ALL,
            epochs=4, rounds=40, weights="uniform", expected=optimum,
            derivation="At a fixed point all y_i are x, so that lambda_i is the slope of f_i there and h = 0: the "
            "slopes sum to 0. That is the optimum sum a_i b_i / sum a_i.",
            **base,
        ),
    ]  # fmt: skip


def _servers() -> list[Problem]:
    base: dict[str, Any] = {
        "clients": quadratics(),
        "start": (START,),
        "lr": LR,
        "batch": ALL,
        "epochs": 2,
        "rounds": 8,
    }
    k, everyone = steps(2, ALL), [0, 1, 2]
    beta1, beta2, tau, lr = 0.9, 0.99, 1e-2, 0.1

    def path(step: Callable[[float, float, float, float], tuple[float, float, float]]) -> tuple[Vector, ...]:
        held = [0.0, tau * tau]

        def go(x: float, t: int) -> float:
            d = change(x, everyone, k, EXAMPLES)
            moved, held[0], held[1] = step(d, held[0], held[1], x)
            return x + moved

        return recursion(go, 8)

    def momentum(d: float, m: float, v: float, x: float) -> tuple[float, float, float]:
        return 0.7 * (0.5 * m + d), 0.5 * m + d, v

    def adaptive(second: Callable[[float, float], float], first: float):
        def step(d: float, m: float, v: float, x: float) -> tuple[float, float, float]:
            m, v = first * m + (1 - first) * d, second(v, d * d)
            return lr * m / (math.sqrt(v) + tau), m, v

        return step

    paper = (
        "Reddi et al. 2021, algorithm 2, on the pseudo-gradient d = sum p_i (y_i - x), which is known from x: m <- "
        "beta1 m + (1 - beta1) d; {}; x <- x + lr m / (sqrt(v) + tau), with v = tau^2 at first and without bias "
        "correction."
    )
    betas = {"server_lr": lr, "beta1": beta1, "beta2": beta2, "tau": tau}

    def sign(z: float) -> float:
        return math.copysign(1.0, z) if z else 0.0

    return [
        Problem(
            name="server momentum", method="fedavgm", options={"server_lr": 0.7, "momentum": 0.5},
            expected=path(momentum), derivation="m <- 0.5 m + d; x <- x + 0.7 m, with d = sum p_i (y_i - x).", **base,
        ),
        Problem(
            name="server Adagrad", method="fedadagrad", options={"server_lr": lr, "beta1": 0.0, "tau": tau},
            expected=path(adaptive(lambda v, s: v + s, 0.0)),
            derivation=paper.format("v <- v + d^2") + " Here beta1 = 0.", **base,
        ),
        Problem(
            name="server Adam", method="fedadam", options=betas,
            expected=path(adaptive(lambda v, s: beta2 * v + (1 - beta2) * s, beta1)),
            derivation=paper.format("v <- beta2 v + (1 - beta2) d^2"), **base,
        ),
        Problem(
            name="server Yogi", method="fedyogi", options=betas,
            expected=path(adaptive(lambda v, s: v - (1 - beta2) * s * sign(v - s), beta1)),
            derivation=paper.format("v <- v - (1 - beta2) d^2 sign(v - d^2)"), **base,
        ),
    ]  # fmt: skip


LINES = (
    Client("one", ((1.0, 0.5), (-0.5, 1.0)), (1.0, -2.0)),
    Client("two", ((0.3, -1.0), (1.2, 0.4), (-0.7, -0.6)), (0.5, 2.0, 1.0)),
    Client("three", ((0.1, 1.1),), (-1.0,)),
)


def _regressions() -> list[Problem]:
    xs = [x for c in LINES for x in c.inputs]
    ys = [y for c in LINES for y in c.targets]
    (aa, ab), (_, bb) = ([sum(x[i] * x[j] for x in xs) for j in (0, 1)] for i in (0, 1))
    ay, by = (sum(x[i] * y for x, y in zip(xs, ys, strict=True)) for i in (0, 1))
    area = aa * bb - ab * ab
    solution = ((bb * ay - ab * by) / area, (aa * by - ab * ay) / area)

    signs = (
        Client("one", ((1.0, 0.5), (-0.5, 1.0), (0.8, -0.3)), (1.0, -1.0, -1.0)),
        Client("two", ((0.3, -1.0), (1.2, 0.4), (-0.7, -0.6), (0.9, 0.9)), (1.0, 1.0, -1.0, -1.0)),
        Client("three", ((-0.4, 0.7), (0.6, -0.8)), (1.0, 1.0)),
    )
    return [
        Problem(
            name="least squares", method="fedavg", clients=LINES, start=(0.5, -0.5), lr=0.6, batch=3, epochs=1,
            rounds=25, expected=(solution,),
            derivation="One step on all of a client's examples, weighted by their number, is gradient descent on all "
            "examples together: it ends at the solution of the pooled normal equations X'X w = X'y.",
        ),
        Problem(
            name="logistic regression", method="fedavg", clients=signs, start=(0.0, 0.0), lr=4.0, batch=4, epochs=1,
            rounds=40, loss="logistic", expected=(_newton(signs),),
            derivation="The same for the logistic loss: it ends at the centralised optimum, here found by Newton's "
            "method on all examples together.",
        ),
    ]  # fmt: skip


def _newton(clients: Sequence[Client]) -> Vector:
    """The optimum of the logistic loss of two parameters over all examples."""
    pairs = [(x, y) for c in clients for x, y in zip(c.inputs, c.targets, strict=True)]
    w0 = w1 = 0.0
    for _ in range(60):
        g0 = g1 = h00 = h01 = h11 = 0.0
        for (x0, x1), y in pairs:
            s = 1 / (1 + math.exp(y * (w0 * x0 + w1 * x1)))
            g0, g1, c = g0 - y * s * x0, g1 - y * s * x1, s * (1 - s)
            h00, h01, h11 = h00 + c * x0 * x0, h01 + c * x0 * x1, h11 + c * x1 * x1
        area = h00 * h11 - h01 * h01
        w0, w1 = w0 - (h11 * g0 - h01 * g1) / area, w1 - (h00 * g1 - h01 * g0) / area
    return w0, w1


LowRank = tuple[float, float, float]
"""a_1, a_2 and b."""


def _low_rank() -> list[Problem]:
    start, begun, count, lr, rounds = (0.5, -0.5), Factors((0.6, -0.4), 0.0, 1.5), 4, 0.2, 6
    shares = [len(c.targets) / sum(len(d.targets) for d in LINES) for c in LINES]

    def product(f: LowRank) -> Vector:
        return begun.scale * f[2] * f[0], begun.scale * f[2] * f[1]

    def trained(w: Vector, f: LowRank, client: Client, both: bool) -> LowRank:
        """A client's factors after its steps on all of its examples, by the slope g in x + scale * b a."""
        for _ in range(count):
            now = [w[i] + product(f)[i] for i in (0, 1)]
            g = [0.0, 0.0]
            for x, y in zip(client.inputs, client.targets, strict=True):
                error = now[0] * x[0] + now[1] * x[1] - y
                g = [g[i] + 2 * error * x[i] / len(client.targets) for i in (0, 1)]
            by = lr * begun.scale
            moved = [f[i] - by * f[2] * g[i] if both else f[i] for i in (0, 1)]
            f = (moved[0], moved[1], f[2] - by * (f[0] * g[0] + f[1] * g[1]))
        return f

    def mean(of: Sequence[Sequence[float]]) -> tuple[float, ...]:
        return tuple(sum(p * v for p, v in zip(shares, column, strict=True)) for column in zip(*of, strict=True))

    def path(method: str) -> tuple[Vector, ...]:
        w, f, found = start, (begun.a[0], begun.a[1], begun.b), list[Vector]()
        for _ in range(rounds):
            ends = [trained(w, f, c, both=method != "ffa_lora") for c in LINES]
            a, d, b = mean(ends)
            f = (a, d, b)
            if method == "fedex_lora":
                exact, got = mean([product(e) for e in ends]), product(f)
                w = (w[0] + exact[0] - got[0], w[1] + exact[1] - got[1])
            found.append((w[0] + product(f)[0], w[1] + product(f)[1]))
        return tuple(found)

    base: dict[str, Any] = {"clients": LINES, "start": start, "lr": lr, "batch": 3, "epochs": count, "factors": begun}
    steps = (
        "With g a client's slope in the weight x + scale * b a, its step is b <- b - eta scale a g' and a <- a - eta "
        "scale b g, both at once, with x constant. {}"
    )
    exact = path("fedex_lora")
    return [
        Problem(
            name="factors averaged each for itself", method="fedit", rounds=rounds, expected=path("fedit"),
            derivation=steps.format("The server's factors are sum p_i a_i and sum p_i b_i."), **base,
        ),
        Problem(
            name="one factor constant", method="ffa_lora", rounds=rounds, expected=path("ffa_lora"),
            derivation=steps.format("Here a is never trained, so that the mean of b is that of the products."), **base,
        ),
        Problem(
            name="the average of the products, factors kept", method="fedex_lora", rounds=rounds, expected=exact,
            derivation=steps.format(
                "The server's factors are means, and x <- x + scale (sum p_i b_i a_i - (sum p_i b_i)(sum p_i a_i)): "
                "a round ends at the x it began with plus scale sum p_i b_i a_i."
            ),
            **base,
        ),
        Problem(
            name="the average of the products, factors anew", method="flora", rounds=1, expected=exact[:1],
            derivation=steps.format(
                "x <- x + scale sum p_i b_i a_i. Later rounds begin with factors that are drawn, and are not asked for."
            ),
            **base,
        ),
    ]  # fmt: skip


PROBLEMS: tuple[Problem, ...] = (*_fedavg(), *_corrected(), *_servers(), *_regressions(), *_low_rank())
