"""Stages of the update pipeline and the channels that end it."""

from atoll.transforms.base import Transform
from atoll.transforms.channel import Channel, plain, ring_sum
from atoll.transforms.clip_norm import clip_norm
from atoll.transforms.quantize import quantize

__all__ = ["Channel", "Transform", "clip_norm", "plain", "quantize", "ring_sum"]
