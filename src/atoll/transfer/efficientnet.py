"""EfficientNet-Lite0: mobile inverted bottlenecks without squeeze-and-excitation, for machines without much power.

Tan & Le 2019, "EfficientNet: Rethinking model scaling for convolutional neural networks", table 1, in the "lite0" form
of its authors: ReLU6 in the place of swish, no squeeze-and-excitation, stem and last layer of fixed width. Padding is
theirs too ("same": with an even input and stride 2, one more row and column behind than before). BatchNorm has
momentum 0.01 and epsilon 0.001. 3.4 million parameters to the 1,280 features, 0.4 billion multiplications at 224 x 224.
"""

from collections import OrderedDict

from torch import Tensor, nn

WIDTH = 1280
"""Features."""

STAGES = (
    # kernel, stride, expansion, channels, repeats
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)

MEAN, SCALE = 127 / 255, 128 / 255
"""Of the pixels in [0, 1] the weights were trained on."""


class Centred(nn.Module):
    """Pixels in [0, 1] as the weights expect them."""

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 3, h, w] to the same shape."""
        return (x - MEAN) / SCALE


class Inverted(nn.Module):
    """An inverted residual block: 1 x 1 to more channels, a depthwise convolution, 1 x 1 back."""

    def __init__(self, kernel: int, stride: int, expansion: int, given: int, made: int, size: int) -> None:
        super().__init__()
        wide = given * expansion
        layers = _layer(given, wide, 1, 1, size) if expansion > 1 else []
        layers += _layer(given * expansion, wide, kernel, stride, size, groups=wide)
        layers += _layer(wide, made, 1, 1, size)[:-1]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and given == made

    def forward(self, x: Tensor) -> Tensor:
        """Channels [n, given, h, w] to [n, made, h, w], halved where the stride is 2."""
        out = self.layers(x)
        return out + x if self.residual else out


def efficientnet_lite0(size: int) -> nn.Module:
    """The network up to its features [n, 1280], for images [n, 3, h, w] of pixels in [0, 1], which it resizes.

    Args:
        size: height and width at which images go through it.
    """
    made: OrderedDict[str, nn.Module] = OrderedDict()
    made["resize"] = nn.Upsample(size=(size, size), mode="bilinear", align_corners=False)
    made["centre"] = Centred()
    made["stem"] = nn.Sequential(*_layer(3, 32, 3, 2, size))
    size, channels = -(-size // 2), 32
    blocks: list[nn.Module] = []
    for kernel, stride, expansion, wide, repeats in STAGES:
        for number in range(repeats):
            step = stride if number == 0 else 1
            blocks.append(Inverted(kernel, step, expansion, channels, wide, size))
            size, channels = -(-size // step), wide
    made["blocks"] = nn.Sequential(*blocks)
    made["last"] = nn.Sequential(*_layer(channels, WIDTH, 1, 1, size))
    made["pool"] = nn.AdaptiveAvgPool2d(1)
    made["flat"] = nn.Flatten()
    return nn.Sequential(made)


def _layer(given: int, made: int, kernel: int, stride: int, size: int, groups: int = 1) -> list[nn.Module]:
    """Padding, convolution, normalisation and ReLU6 over images of this size."""
    short = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before, after = short // 2, short - short // 2
    layers: list[nn.Module] = [] if before == after else [nn.ZeroPad2d((before, after, before, after))]
    padding = before if before == after else 0
    layers.append(nn.Conv2d(given, made, kernel, stride, padding, groups=groups, bias=False))
    return [*layers, nn.BatchNorm2d(made, eps=1e-3, momentum=0.01), nn.ReLU6()]
