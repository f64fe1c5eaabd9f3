"""`espalier pretrain-generator`: trains a small GAN for FedKTL, for use without a larger pretrained generator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def pretrain_generator(
    data: str,
    out: Path,
    *,
    minutes: float,
    steps: int | None,
    seed: int,
    latent_dim: int,
    size: int | None,
    device: str,
    say: Callable[[str], None],
) -> None:
    """Train a generator on the data of a SPEC and write its folder.

    Parameters
    ----------
    data : str
        See :func:`espalier.data.spec.open_data`.
    out : Path
        Folder to write; a generator in it is replaced.
    minutes, steps, seed, latent_dim
        See :func:`espalier_server.generators.pretrain.pretrain`.
    size : int, optional
        Height and width of the images in pixels; by default those of the data.
    device : str
        Where to train.
    say : callable
        Called with each line of progress.

    Raises
    ------
    ConfigError
        An option is out of range, or `out` holds something else.
    DataError
        The data cannot be opened.
    StateError
        `out` cannot be written.
    TrainingError
        The training failed.
    """
    from espalier.data.spec import open_data
    from espalier.training.device import resolve_device
    from espalier_server.generators.gan import GRID, check_out, save_gan
    from espalier_server.generators.pretrain import Progress, pretrain, sample_grid

    def report(progress: Progress) -> None:
        say(
            f"{progress.share:4.0%}  {progress.seconds:5.0f} s  step {progress.step}: "
            f"generator loss {progress.generator_loss:.2f}, discriminator loss {progress.discriminator_loss:.2f}"
        )

    check_out(out)
    place = resolve_device(device)
    images = open_data(data, size=size)
    channels, height, _ = images.shape
    say(
        f"{len(images)} images of {images.name}, {channels} x {height} x {height}, {len(images.classes)} classes"
    )
    network, notes = pretrain(
        images, minutes=minutes, steps=steps, seed=seed, latent_dim=latent_dim, device=place, say=report
    )
    save_gan(out, network, notes, sample_grid(network, seed=seed))
    say(f"{out}: the generator; check its samples in {out / GRID} before you use it")
