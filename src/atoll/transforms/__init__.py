"""Stages of the update pipeline and the channels that end it."""

from atoll.transforms.base import Transform
from atoll.transforms.channel import Channel, plain
from atoll.transforms.clip_norm import clip_norm
from atoll.transforms.eden import eden
from atoll.transforms.ef21 import ef21
from atoll.transforms.error_feedback import error_feedback
from atoll.transforms.grouped import grouped
from atoll.transforms.half import half
from atoll.transforms.quantize import quantize
from atoll.transforms.rand_k import rand_k
from atoll.transforms.rotate import rotate
from atoll.transforms.secure_sum import secure_sum
from atoll.transforms.sign import sign
from atoll.transforms.top_k import top_k

__all__ = [
    "Channel",
    "Transform",
    "clip_norm",
    "eden",
    "ef21",
    "error_feedback",
    "grouped",
    "half",
    "plain",
    "quantize",
    "rand_k",
    "rotate",
    "secure_sum",
    "sign",
    "top_k",
]
