"""`espalier sample`: generates images with the model of a run."""

from __future__ import annotations

from pathlib import Path

from espalier.errors import StateError


def sample_model(model: Path, count: int, steps: int, seed: int, out: Path) -> None:
    """Generate images with the model in a folder and write them as a PNG grid.

    Parameters
    ----------
    model : Path
        Folder ``model/`` of a run.
    count, steps, seed : int
        Number of images, DDIM steps, and the seed of the initial noise.
    out : Path
        PNG file.

    Raises
    ------
    StateError
        The folder holds no model, or the file cannot be written.
    """
    from espalier.models.pipeline import load_model
    from espalier.models.sampling import sample
    from espalier_server.evaluation.image_grid import image_grid

    network, scheduler, _ = load_model(model)
    images = sample(network, count=count, steps=steps, seed=seed, scheduler=scheduler)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        image_grid(images).save(out, format="PNG")
    except OSError as error:
        raise StateError(f"cannot write {out}: {error.strerror}; give another --out") from error
