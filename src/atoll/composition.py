"""What fits together and what does not: the parts of a process, refused by name with the way out."""

import torch

from atoll.aggregators import Aggregator
from atoll.algorithms.base import Algorithm
from atoll.errors import CompositionError, invalid, unknown
from atoll.model import Model
from atoll.transforms.chain import Chain
from atoll.transforms.delta import Downlink


def check_parts(algorithm: Algorithm, chain: Chain, aggregator: Aggregator, downlink: Downlink | None) -> None:
    """Refuse an algorithm, a pipeline and a rule of which one would spoil what another does.

    Raises:
        CompositionError: with both names and the way out.
    """
    judge = chain.channel.rule or aggregator
    if chain.channel.sums_only and aggregator.rule is not None:
        raise CompositionError(
            f"the aggregator {aggregator.name} needs every client's row, but the channel "
            f'{chain.channel.name} shows the server only sums: use aggregators.mean(), or channel="plain", or '
            "grouped(secure_sum(...), rule), a rule over the sums of groups."
        )
    if chain.channel.rule is not None and aggregator.denominator == "expected":
        raise CompositionError(
            f'the aggregator {aggregator.name} with denominator="expected" cannot stand beside the channel '
            f"{chain.channel.name}, whose rule divides by nothing: leave denominator out."
        )
    own = [stage.name for stage in chain.stages if stage.client_noise is not None]
    if own and aggregator.weights != "uniform":
        raise CompositionError(
            f"{own[0]} cannot stand before the aggregator {aggregator.name} with weights, which tell of the data, and "
            'no noise hides them: all clients must count the same. Use aggregators.mean(weights="uniform").'
        )
    if own and algorithm.pooled:
        raise CompositionError(
            f"{own[0]} cannot protect clients under {algorithm.name}, which puts all their examples in one place: "
            "there is one client then. Use example-level privacy: atoll.local_sgd(..., privacy=...)."
        )
    mixing = [stage.name for stage in chain.stages if stage.coder is None]
    if algorithm.scalars and mixing:
        stage = mixing[0]
        raise CompositionError(
            f"{stage} treats what a client sends as one vector, but {algorithm.name} sends numbers of other units "
            f"with its update, which {stage} would mix with it: leave {stage} out, or use fedavg."
        )
    if algorithm.scalars and chain.channel.sums_only:
        raise CompositionError(
            f"the channel {chain.channel.name} cuts every number at one clip, but {algorithm.name} sends "
            'numbers of other units with its update, which would be cut too: use channel="plain", or fedavg.'
        )
    if algorithm.statistics and chain.stages:
        stage = chain.stages[0].name
        raise CompositionError(
            f"{stage} would change the sums that {algorithm.name} solves for its model, which is then no solution "
            f"at all: leave {stage} out."
        )
    if algorithm.additive and not judge.averages:
        raise CompositionError(
            f"the summed part of {algorithm.name} is only right when it is added up: under the aggregator "
            f"{judge.name} most clients would count for nothing. Use aggregators.mean()."
        )
    if algorithm.scalars and not judge.averages:
        raise CompositionError(
            f"the aggregator {judge.name} treats what a client sends as one vector, but {algorithm.name} "
            "sends numbers of other units with its update, which would be judged and combined together with it: "
            "use aggregators.mean(), or fedavg."
        )
    for stage in chain.stages:
        if stage.judge is not None and aggregator.behind is not None:
            raise CompositionError(
                f"{stage.name} cannot stand before the aggregator {aggregator.name}: it would judge what "
                "clients sent before the attack wrote over it. Put a rule behind the attack that judges, such as "
                "aggregators.norm_bound(); what is not finite every rule leaves out."
            )
        if stage.learn is not None and not judge.averages:
            raise CompositionError(
                f"{stage.name} cannot stand before the aggregator {aggregator.name}: it learns from a sum "
                "over all clients, which such a rule does not make. Use aggregators.mean(), or clip_norm instead."
            )
        if stage.settle is not None and not judge.averages:
            raise CompositionError(
                f"{stage.name} cannot stand before the aggregator {judge.name}: what its server keeps is "
                "the mean of what all clients know, which a rule that chooses among clients does not follow. Use "
                'aggregators.mean(weights="uniform"), or error_feedback instead.'
            )
        if stage.settle is not None and aggregator.denominator == "expected":
            raise CompositionError(
                f"{stage.name} cannot stand before the aggregator {aggregator.name} with "
                'denominator="expected": its server counts on the mean over the clients that took part. '
                'Use aggregators.mean(weights="uniform"), or error_feedback instead.'
            )
        if stage.settle is not None and aggregator.weights != "uniform":
            raise CompositionError(
                f"{stage.name} cannot stand before the aggregator {aggregator.name} with weights: what its "
                'server keeps is the unweighted mean over all clients. Use aggregators.mean(weights="uniform").'
            )
        if stage.settle is not None and algorithm.sums(1):
            raise CompositionError(
                f"{stage.name} cannot carry the summed part of {algorithm.name}: its server keeps a mean over all "
                "clients, not this cohort's sum. Use error_feedback instead."
            )
    if chain.noise is not None:
        _check_noise(algorithm, chain, aggregator, downlink)


PRECISIONS = ("full", "bfloat16")


def check_precision(precision: str, algorithm: Algorithm, model: Model) -> None:
    """Refuse a precision that is unknown, or that a model or a method cannot have.

    Raises:
        InvalidArgument: an unknown name, or a model whose parameters are not in single precision.
        CompositionError: nothing is trained, or what noise protects would be rounded.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision == "full":
        return
    if model.dtype != torch.float32:
        raise invalid(
            "precision", precision, f'"full" for a model of {model.dtype}',
            "Mixed precision keeps parameters in float32: build the module with module.float().",
        )  # fmt: skip
    if algorithm.statistics or not algorithm.plans:
        raise CompositionError(
            f"precision={precision!r} is that of local training, and {algorithm.name} trains nothing by a plan: leave "
            "precision out."
        )
    if any(plan.privacy is not None for plan in algorithm.plans):
        raise CompositionError(
            f"precision={precision!r} cannot stand beside example-level privacy: a gradient whose products are rounded "
            "may be longer than the clip that the noise is made for. Leave precision out."
        )


def _check_noise(algorithm: Algorithm, chain: Chain, aggregator: Aggregator, downlink: Downlink | None) -> None:
    """Refuse what the noise on the sum does not protect."""
    noisy = next(stage.name for stage in chain.stages if stage.noise is not None)
    remedy = 'Use aggregators.mean(weights="uniform", denominator="expected").'
    if chain.channel.sums_only:
        raise CompositionError(
            f"{noisy} cannot stand before the channel {chain.channel.name}: rounding to the channel's ring "
            "adds to what one client sends, which the noise is not sized for. "
            'Use channel="plain" with noise at the server.'
        )
    if aggregator.rule is not None:
        raise CompositionError(
            f"{noisy} cannot stand before the aggregator {aggregator.name}: noise protects a sum of clipped rows, "
            f"which one client may move further under {aggregator.name}. {remedy} Clipping bounds what a malicious "
            "client can do as well."
        )
    if aggregator.weights != "uniform" and aggregator.clip is None:
        raise CompositionError(
            f"{noisy} cannot stand before the aggregator {aggregator.name} with weights that are not clipped: one "
            f"client with a large weight would move the sum further than the noise hides. {remedy} Or clip them: "
            'aggregators.mean(weights="examples", clip=100, denominator="expected").'
        )
    if downlink is not None:
        raise CompositionError(
            f"{noisy} cannot stand beside a compressed downlink, which keeps who was sent what: who is in a cohort "
            "is a secret here. Leave downlink out."
        )
    if aggregator.denominator != "expected":
        raise CompositionError(
            f"{noisy} cannot stand before the aggregator {aggregator.name} that divides by what came: that number "
            f"moves with the data too, and no noise hides it. {remedy}"
        )
    if algorithm.pooled:
        raise CompositionError(
            f"{noisy} cannot protect clients under {algorithm.name}, which puts all their examples in one place: "
            "there is one client then. Use example-level privacy: atoll.local_sgd(..., privacy=...)."
        )


def check_examples(algorithm: Algorithm, model: Model) -> None:
    """Refuse what noise on single examples' gradients does not protect."""
    plans = {p.privacy for p in algorithm.plans}
    if len(plans) > 1:
        raise CompositionError(
            f"some of the plans of {algorithm.name} have privacy= and others another or none: what the others "
            "learn would leave the client unprotected. Give all of them the same privacy=."
        )
    if model.dtype.itemsize < 4:
        raise CompositionError(
            f"the model's numbers are {model.dtype}, in which norms and sums of single gradients are so rough that "
            "clipping bounds nothing: use a model in torch.float32 or torch.float64 under example-level privacy."
        )
    for name, part in model.modules():
        kind = type(part).__name__
        if "BatchNorm" in kind or ("InstanceNorm" in kind and getattr(part, "track_running_stats", False)):
            raise CompositionError(
                f"the layer {name or kind!r} ({kind}) mixes the examples of a batch or keeps statistics of them, "
                "which no clipping of single gradients bounds: replace it by nn.GroupNorm or nn.LayerNorm."
            )
