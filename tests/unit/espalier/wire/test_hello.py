"""Versions in a hello: a mismatch names both versions, and only another schema is refused."""

from __future__ import annotations

import pytest

from espalier.errors import WireError
from espalier.wire import control
from espalier.wire.hello import own_versions, version_mismatch
from espalier_proto import espalier_pb2 as pb

OURS = {"espalier": "0.1.0", "flwr": "1.39.0", "torch": "2.13.0"}


@pytest.mark.parametrize(
    "theirs", [OURS, {**OURS, "espalier": "0.1.9", "flwr": "1.39.2"}, {**OURS, "torch": "2.0"}, {}]
)
def test_patches_and_torch_may_differ(theirs: dict[str, str]) -> None:
    assert version_mismatch(theirs, OURS) == ""


def test_both_versions_and_what_to_do_are_named() -> None:
    assert version_mismatch({**OURS, "espalier": "0.2.0"}, OURS) == (
        "espalier 0.2.0 there, 0.1.0 here; install one version on both"
    )
    both = version_mismatch({"espalier": "1.1.0", "flwr": "1.40.0"}, OURS)
    assert both.startswith("espalier 1.1.0 there, 0.1.0 here and flwr 1.40.0 there, 1.39.0 here; ")


def test_a_foreign_schema_is_refused_with_the_senders_version() -> None:
    facts = pb.DeviceFacts(versions={"espalier": "9.8.7"})
    hello = pb.ClientHello(schema=control.SCHEMA + 1, name="c", facts=facts)
    with pytest.raises(
        WireError, match=r"schema 3 \(espalier 9\.8\.7\), this side uses 2 \(espalier "
    ) as caught:
        control.decode(pb.ClientHello, hello.SerializeToString(), "c")
    assert own_versions()["espalier"] in str(caught.value)
