"""Commands for models: sample, pretrain-generator."""

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
    data: Annotated[str, typer.Option(help="Data SPEC to train on, e.g. digits or mnist.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    minutes: Annotated[float, typer.Option(help="Training time in minutes of wall-clock time.")] = 3.0,
    steps: Annotated[
        int | None,
        typer.Option(help="Steps instead of --minutes: the same seed gives the same generator."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the weights, the order of the data and the noise.")
    ] = 0,
    latent: Annotated[int, typer.Option(help="Dimension of the latent space.")] = 128,
    size: Annotated[
        int | None, typer.Option(help="Height and width in pixels; by default those of the data.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train a small image generator for FedKTL; a few minutes on a CPU."""
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
