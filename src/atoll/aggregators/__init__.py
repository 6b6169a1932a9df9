"""Rules that combine clients' updates, and what stands before them."""

from atoll.aggregators.base import Aggregator, Ruling
from atoll.aggregators.bucketing import bucketing
from atoll.aggregators.bulyan import bulyan
from atoll.aggregators.centered_clipping import centered_clipping
from atoll.aggregators.fltrust import fltrust
from atoll.aggregators.geometric_median import geometric_median
from atoll.aggregators.krum import krum, multi_krum
from atoll.aggregators.mda import mda
from atoll.aggregators.meamed import meamed
from atoll.aggregators.mean import mean
from atoll.aggregators.median import median
from atoll.aggregators.nnm import nnm
from atoll.aggregators.norm_bound import norm_bound
from atoll.aggregators.trimmed_mean import trimmed_mean

__all__ = [
    "Aggregator",
    "Ruling",
    "bucketing",
    "bulyan",
    "centered_clipping",
    "fltrust",
    "geometric_median",
    "krum",
    "mda",
    "meamed",
    "mean",
    "median",
    "multi_krum",
    "nnm",
    "norm_bound",
    "trimmed_mean",
]
