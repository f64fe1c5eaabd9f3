"""The generator of FAug's conditional GAN (Jeong et al. 2018): four fully connected layers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.models.arrays import to_array, to_tensor

#: Length of the generator's input: noise, and the class as a one-hot vector.
INPUT = 128
#: Hidden layers; with 784 pixels the generator has the paper's 1,493,520 parameters.
HIDDEN = (256, 512, 1024)
#: Factor of the one-hot vector, which would have little effect among more than a hundred noise values.
CLASS_WEIGHT = 6.0


class ConditionalGenerator(nn.Module):
    """Maps noise and a class to an image in [-1, 1].

    Parameters
    ----------
    classes : int
        Number of classes, less than `INPUT`.
    shape : tuple of int
        Channels, height, width.
    """

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        if not 1 <= classes < INPUT:
            raise ValueError(f"a conditional generator of {classes} classes; 1 to {INPUT - 1} are possible")
        self.classes, self.shape = classes, shape
        widths = (INPUT, *HIDDEN, int(np.prod(shape)))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return images float32 [B, C, H, W] for noise [B, INPUT - classes] and labels int64 [B]."""
        mark = CLASS_WEIGHT * functional.one_hot(labels, self.classes).float()
        hidden = torch.cat([noise, mark], 1)
        for layer in self.layers[:-1]:
            hidden = functional.leaky_relu(layer(hidden), 0.2)
        return torch.tanh(self.layers[-1](hidden)).view(-1, *self.shape)

    def draw(self, labels: np.ndarray, seed: int) -> Tensor:
        """Return an image for each label, on the CPU; noise depends on the seed alone."""
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(labels), INPUT - self.classes, generator=random)
        place = next(self.parameters()).device
        with torch.no_grad():
            drawn: Tensor = self(noise.to(place), torch.from_numpy(labels).to(place))
        return drawn.cpu()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return its tensors by name."""
        return {n: to_array(t).copy() for n, t in self.state_dict().items()}

    @classmethod
    def of(
        cls, arrays: Mapping[str, np.ndarray], classes: int, shape: tuple[int, int, int]
    ) -> ConditionalGenerator:
        """Build a generator from received tensors; raises ValueError if they do not fit."""
        model = cls(classes, shape)
        tensors = {n: to_tensor(a) for n, a in arrays.items()}
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"tensors that are no generator of these images ({error})") from error
        return model
