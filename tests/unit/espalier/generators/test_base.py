"""Names of generators and their options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from espalier.errors import ConfigError
from espalier.generators.base import open_generator, parse_generator


@pytest.mark.parametrize("spec", ["gan", "gan:", "biggan:x", "", "runs/model", "StyleGAN3:x.pkl"])
def test_a_spec_that_names_no_generator_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="stylegan-xl:FILE"):
        parse_generator(spec)


def test_a_spec_is_read() -> None:
    assert parse_generator("sd:/a:b").path == Path("/a:b")
    assert parse_generator("gan:~/g").path == Path.home() / "g"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "at least 1"), ({"guidance": 0.5}, "guidance"), ({"guidance": math.nan}, "guidance")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_generator(f"sd:{tmp_path}", **options)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        open_generator(f"gan:{tmp_path / 'nowhere'}")
