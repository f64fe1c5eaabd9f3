"""FedKTL's networks besides the clients' own: the ETF classifier, the feature transformer F and the head h'."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.models.arrays import load_arrays, to_array
from espalier.seeds import rng_for, seed_for


def simplex_etf(classes: int, dimension: int, run_seed: int) -> np.ndarray:
    """Return the run's simplex ETF: unit vectors with pairwise cosines -1/(C-1).

    ``sqrt(C/(C-1)) P (I - 11'/C)`` with orthonormal columns P, K x C, from the QR decomposition of uniform random
    numbers.

    Parameters
    ----------
    classes : int
        C, at least 2.
    dimension : int
        K, at least C.
    run_seed : int
        The run's `seed`. The frame depends on it alone, so it is not sent.

    Returns
    -------
    numpy.ndarray
        float32 [C, K].
    """
    if not 2 <= classes <= dimension:
        raise ValueError(f"a simplex of {classes} vectors in {dimension} dimensions")
    columns, triangle = np.linalg.qr(rng_for(run_seed, "cloud", 0, "etf").random((dimension, classes)))
    # The decomposition does not determine the signs of the columns.
    columns = columns * np.sign(np.diag(triangle))
    frame = np.sqrt(classes / (classes - 1)) * columns @ (np.eye(classes) - 1.0 / classes)
    rows = frame.T / np.linalg.norm(frame.T, axis=1, keepdims=True)
    return np.asarray(rows, dtype=np.float32)


class EtfHead(nn.Module):
    """Maps outputs [B, K] to their cosines [B, C] with the rows of an ETF; the largest is the prediction.

    ``nn.Sequential(model, EtfHead.of(classes, run_seed))`` is a classifier that can be evaluated as any other.

    Parameters
    ----------
    rows : numpy.ndarray
        float32 [C, K], as :func:`simplex_etf` returns them.
    """

    rows: Tensor

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("rows", torch.from_numpy(np.array(rows)), persistent=False)

    @classmethod
    def of(cls, classes: int, run_seed: int) -> EtfHead:
        """Return the run's head for networks with one output per class, K = C."""
        return cls(simplex_etf(classes, classes, run_seed))

    def forward(self, outputs: Tensor) -> Tensor:
        """Return the cosines, float32 [B, C]."""
        # In float32 even under autocast, because the loss scales cosines by 64.
        with torch.autocast(outputs.device.type, enabled=False):
            return functional.normalize(outputs.float(), dim=1) @ self.rows.T


class FeatureTransformer(nn.Sequential):
    """F: ``Linear(K, K), BatchNorm1d, ReLU, Linear(K, H)``.

    Its batch normalisation has no running statistics: F is only applied to the prototypes it is trained on, to all of
    them at once for the centroids.

    Parameters
    ----------
    dimension : int
        K, length of a prototype.
    latent_dim : int
        H, length of a latent.
    run_seed : int
        Seed of the initial weights.
    """

    def __init__(self, dimension: int, latent_dim: int, run_seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(run_seed, "cloud", 0, "feature transformer"))
            super().__init__(
                nn.Linear(dimension, dimension),
                nn.BatchNorm1d(dimension, track_running_stats=False),
                nn.ReLU(),
                nn.Linear(dimension, latent_dim),
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return copies of its tensors, which the cloud stores between rounds."""
        return {name: to_array(tensor).copy() for name, tensor in self.state_dict().items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Load the tensors that `arrays` returned."""
        load_arrays(self, arrays)


def transfer_head(width: int, latent_dim: int, run_seed: int) -> nn.Linear:
    """Return the initial h', the same for all clients with features of this width, in every round."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(run_seed, "cloud", 0, "transfer head"))
        return nn.Linear(width, latent_dim)
