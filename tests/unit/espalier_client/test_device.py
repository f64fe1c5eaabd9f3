"""What a device says of itself: its own level and model, and how fast it computes."""

from __future__ import annotations

import time

import pytest
import torch

from espalier.errors import ConfigError, WireError
from espalier.wire.hello import check_client_hello
from espalier_client.device import Device
from espalier_client.speed import measured_speed

CONFIG = {"name": "cam-7", "data": "digits:0/16", "device": "cpu"}


@pytest.mark.parametrize(("given", "level"), [({}, 0.0), ({"level": 0.5}, 0.5), ({"level": 1}, 1.0)])
def test_hello_carries_level_and_speed(given: dict[str, object], level: float) -> None:
    hello = Device.from_node_config(CONFIG | given).hello("r", 0.0)
    assert hello.level == level
    assert hello.facts.speed == measured_speed(torch.device("cpu")) > 0
    assert hello.link_seconds == 0  # the edge's to measure
    check_client_hello(hello, "edge-1")


def test_level_of_a_stock_node_config_may_be_text() -> None:
    assert Device.from_node_config(CONFIG | {"level": "0.25"}).level == 0.25


@pytest.mark.parametrize("level", [0, -1, 1.5, "half", "nan", True, ""])
def test_a_level_that_is_no_share(level: object) -> None:
    with pytest.raises(ConfigError, match=r"level=.* is not in \(0, 1\]"):
        Device.from_node_config(CONFIG | {"level": level})


def test_hello_carries_the_owners_model() -> None:
    assert Device.from_node_config(CONFIG).hello("r", 0.0).model == ""
    hello = Device.from_node_config(CONFIG | {"model": "resnet4"}).hello("r", 0.0)
    assert hello.model == "resnet4"
    check_client_hello(hello, "edge-1")
    hello.model = "resnet5"
    with pytest.raises(
        WireError, match="'cam-7' refused: the model 'resnet5', which is not a classifier of this version"
    ):
        check_client_hello(hello, "cam-7")


@pytest.mark.parametrize("model", ["", "unet-tiny", "HtFE-img-2", "cnn,mlp", 4, True])
def test_a_model_that_is_no_classifier(model: object) -> None:
    with pytest.raises(ConfigError, match=r"model=.* is not a classifier; give one of .*resnet10"):
        Device.from_node_config(CONFIG | {"model": model})


def test_speed_is_measured_once_and_quickly() -> None:
    place = torch.device("cpu")
    measured_speed.cache_clear()
    first = measured_speed(place)
    start = time.perf_counter()
    assert measured_speed(place) == first
    assert time.perf_counter() - start < 0.001


def test_speed_is_that_of_a_plain_product() -> None:
    """Within a factor of four of what products of another size take here: the unit is right."""
    measured_speed.cache_clear()
    speed = measured_speed(torch.device("cpu"))
    a = torch.rand(320, 320)
    torch.mm(a, a)
    quickest = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, a)
        quickest = min(quickest, time.perf_counter() - start)
    assert 0.25 < speed / (320**3 / quickest / 1e9) < 4
