"""The commands of models: sample, pretrain-generator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample(
    model: Annotated[Path, typer.Argument(help="Model folder, e.g. runs/demo/model.")],
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("grid.png"),
) -> None:
    """Generate images with a trained model."""
    from espalier.environment import check_libraries

    check_libraries("cloud")

    from espalier_server.commands.sample import sample_model

    sample_model(model, count, steps, seed, out)
    typer.echo(str(out))


def pretrain_generator(
    data: Annotated[str, typer.Option(help="Data SPEC to learn from, e.g. digits or mnist.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    minutes: Annotated[float, typer.Option(help="How long to train, by the clock.")] = 3.0,
    steps: Annotated[
        int | None, typer.Option(help="How many steps instead: the same seed gives the same generator.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order and noise.")] = 0,
    latent: Annotated[int, typer.Option(help="Length of a latent.")] = 128,
    size: Annotated[int | None, typer.Option(help="Pixels of a side; the data's own unless given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train a small generator of images for FedKTL; a few minutes on a CPU."""
    from espalier.environment import check_libraries

    check_libraries("cloud")

    from espalier_server.commands.pretrain import pretrain_generator as make

    make(
        data,
        out,
        minutes=minutes,
        steps=steps,
        seed=seed,
        latent_dim=latent,
        size=size,
        device=device,
        say=typer.echo,
    )
