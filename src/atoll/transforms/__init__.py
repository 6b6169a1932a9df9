"""Stages of the update pipeline and the channels that end it."""

from atoll.transforms.adaptive_clip import adaptive_clip
from atoll.transforms.base import PayloadError, Transform
from atoll.transforms.channel import Channel, plain
from atoll.transforms.client_momentum import client_momentum
from atoll.transforms.clip_norm import clip_norm
from atoll.transforms.correlated_noise import correlated_noise
from atoll.transforms.delta import Downlink, delta
from atoll.transforms.discrete_gaussian import discrete_gaussian
from atoll.transforms.eden import eden
from atoll.transforms.ef21 import ef21
from atoll.transforms.entropy_code import entropy_code
from atoll.transforms.error_feedback import error_feedback
from atoll.transforms.gaussian_noise import gaussian_noise
from atoll.transforms.grouped import grouped
from atoll.transforms.half import half
from atoll.transforms.local_noise import local_noise
from atoll.transforms.norm_bound import norm_bound
from atoll.transforms.power_sgd import power_sgd
from atoll.transforms.quantize import quantize
from atoll.transforms.rand_k import rand_k
from atoll.transforms.reject_nonfinite import reject_nonfinite
from atoll.transforms.rotate import rotate
from atoll.transforms.secure_sum import secure_sum
from atoll.transforms.sign import sign
from atoll.transforms.skellam import skellam
from atoll.transforms.top_k import top_k

__all__ = [
    "Channel",
    "Downlink",
    "PayloadError",
    "Transform",
    "adaptive_clip",
    "client_momentum",
    "clip_norm",
    "correlated_noise",
    "delta",
    "discrete_gaussian",
    "eden",
    "ef21",
    "entropy_code",
    "error_feedback",
    "gaussian_noise",
    "grouped",
    "half",
    "local_noise",
    "norm_bound",
    "plain",
    "power_sgd",
    "quantize",
    "rand_k",
    "reject_nonfinite",
    "rotate",
    "secure_sum",
    "sign",
    "skellam",
    "top_k",
]
