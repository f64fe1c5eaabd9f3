"""Feature extractors of heterogeneous classifiers: HtFLlib's small CNN and torchvision's networks.

torchvision's networks are built for 224 pixels and three channels. Here they take any number of channels and
any square image of at least 8 pixels:

- From `STANDARD_STEM` = 64 pixels on, ResNets, GoogLeNet and MobileNetV2 have torchvision's own stem. Below, the
  stem is a 3x3 convolution of stride 1 without pooling, as is usual for CIFAR: the standard one would leave a
  32-pixel image as a single pixel after a ResNet's last stage. For GoogLeNet that drops both poolings before the
  first Inception block, for MobileNetV2 only the stride of the first convolution, which is 3x3 anyway.
- A vision transformer's patches must fill the image: see :func:`patch_size`.

Batch normalisation is `espalier.models.layers.BatchNorm`, so that a last batch of one image does not stop training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.models.layers import BatchNorm
from espalier.torchvision_shim import import_torchvision

Network = Literal[
    "cnn4",
    "resnet4",
    "resnet6",
    "resnet8",
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "googlenet",
    "mobilenet-v2",
    "vit-b-16",
    "vit-b-32",
]

#: Smallest image size in pixels for torchvision's stem.
STANDARD_STEM = 64

#: Blocks of each stage. From 50 layers on they are bottlenecks (1x1, 3x3, 1x1) with four times the output width.
#: The short ones are HtFLlib's: one block per stage, and a depth of 2 + 2 * stages.
_RESNETS: Mapping[str, tuple[int, ...]] = {
    "resnet4": (1,),
    "resnet6": (1, 1),
    "resnet8": (1, 1, 1),
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
_BOTTLENECKS = frozenset({"resnet50", "resnet101", "resnet152"})
_STAGES = 4
_PATCHES: Mapping[str, int] = {"vit-b-16": 16, "vit-b-32": 32}
#: ViT-B (Dosovitskiy et al., 2021, table 1).
_VIT_LAYERS, _VIT_HEADS, _VIT_WIDTH, _VIT_MLP = 12, 12, 768, 3072


def body(network: Network, channels: int, size: int) -> tuple[nn.Module, int]:
    """Build a network without its last layer, with random weights from torch's global generator.

    Parameters
    ----------
    network : str
        Its name.
    channels, size : int
        Image channels; image height and width in pixels, at least 8.

    Returns
    -------
    tuple of Module and int
        The module from [B, channels, size, size] to [B, W], and W.
    """
    if network == "cnn4":
        four = FourLayers(channels, size)
        return four, four.width
    if network in _RESNETS:
        made, width = _resnet(network, channels, size)
    elif network == "googlenet":
        made, width = _googlenet(channels, size)
    elif network == "mobilenet-v2":
        made, width = _mobilenet(channels, size)
    else:
        made, width = _vision_transformer(patch_size(_PATCHES[network], size), channels, size)
    _use_own_normalisation(made)
    return made, width


def patch_size(nominal: int, size: int) -> int:
    """Return the height and width of a vision transformer's patches for images of `size` pixels.

    It is the divisor of the image's size that is nearest to the nominal size in ratio. The nominal 16 applies to
    32 pixels and becomes 14 for 28; an image of 8 or of a prime number of pixels is one patch. Two divisors are
    never equally near: if a * b = nominal**2, the nominal size is a divisor, too.

    Parameters
    ----------
    nominal : int
        Patch size in the network's name, in pixels.
    size : int
        Image size in pixels.
    """
    divisors = (patch for patch in range(1, size + 1) if size % patch == 0)
    return min(divisors, key=lambda patch: max(patch / nominal, nominal / patch))


class FourLayers(nn.Module):
    """HtFLlib's CNN without its last layer: two 5x5 convolutions of 32 and 64 channels and a layer of 512 units.

    Each convolution is followed by ReLU and 2x2 max-pooling. As in the original they are not padded, except where
    a map of fewer than 6 pixels would become empty (images below 16 pixels): there the size of the map is preserved.

    Attributes
    ----------
    width : int
        Of its output.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.width = 512
        first, side = _padding(size)
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=first)
        second, side = _padding(side)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=second)
        self.hidden = nn.Linear(64 * side**2, self.width)

    def forward(self, images: Tensor) -> Tensor:
        """Return [B, 512] activations of [B, C, H, W] images."""
        maps = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        maps = functional.max_pool2d(functional.relu(self.conv2(maps)), 2)
        return functional.relu(self.hidden(maps.flatten(1)))


def _padding(side: int) -> tuple[int, int]:
    """Return the padding of a 5x5 convolution, and the maps' size after it and a 2x2 pooling."""
    return (0, (side - 4) // 2) if side >= 6 else (2, side // 2)


def _resnet(network: str, channels: int, size: int) -> tuple[nn.Module, int]:
    import_torchvision()
    from torchvision.models import resnet

    blocks = _RESNETS[network]
    block = resnet.Bottleneck if network in _BOTTLENECKS else resnet.BasicBlock
    # torchvision's always has four stages; those beyond the short networks' are replaced by the identity.
    made = resnet.ResNet(block, [*blocks, *[1] * (_STAGES - len(blocks))], num_classes=1)
    for stage in range(len(blocks) + 1, _STAGES + 1):
        setattr(made, f"layer{stage}", nn.Identity())
    if size < STANDARD_STEM:
        made.conv1, made.maxpool = nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.Identity()
    else:
        made.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(made.conv1.weight, mode="fan_out", nonlinearity="relu")
    made.fc = nn.Identity()
    return made, 64 * 2 ** (len(blocks) - 1) * block.expansion


def _googlenet(channels: int, size: int) -> tuple[nn.Module, int]:
    import_torchvision()
    from torchvision.models.googlenet import GoogLeNet

    # Without the auxiliary outputs, but with the dropout before the last layer, as in HtFLlib.
    made = GoogLeNet(num_classes=1, aux_logits=False, init_weights=True)
    if size < STANDARD_STEM:
        made.conv1.conv = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        made.maxpool1, made.maxpool2 = nn.Identity(), nn.Identity()
    else:
        made.conv1.conv = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.trunc_normal_(made.conv1.conv.weight, std=0.01)
    width: int = made.fc.in_features
    made.fc = nn.Identity()
    return made, width


def _mobilenet(channels: int, size: int) -> tuple[nn.Module, int]:
    import_torchvision()
    from torchvision.models.mobilenetv2 import MobileNetV2

    made = MobileNetV2(num_classes=1)
    stride = 1 if size < STANDARD_STEM else 2
    stem = nn.Conv2d(channels, 32, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    made.features[0][0] = stem
    width: int = made.last_channel
    # Its dropout is part of the classifier, which is replaced.
    made.classifier = nn.Identity()
    return made, width


def _vision_transformer(patch: int, channels: int, size: int) -> tuple[nn.Module, int]:
    import_torchvision()
    from torchvision.models.vision_transformer import VisionTransformer

    made = VisionTransformer(
        image_size=size,
        patch_size=patch,
        num_layers=_VIT_LAYERS,
        num_heads=_VIT_HEADS,
        hidden_dim=_VIT_WIDTH,
        mlp_dim=_VIT_MLP,
        num_classes=1,
    )
    made.conv_proj = nn.Conv2d(channels, _VIT_WIDTH, patch, stride=patch)
    nn.init.trunc_normal_(made.conv_proj.weight, std=math.sqrt(1 / (channels * patch**2)))
    with torch.no_grad():
        made.conv_proj.bias.zero_()
    made.heads = nn.Identity()
    return made, _VIT_WIDTH


def _use_own_normalisation(network: nn.Module) -> None:
    """Replace torch's batch normalisation by `BatchNorm`, before any training."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                own: Any = BatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
                setattr(module, name, own)
