"""The checked-in code is what the compiler makes of the .proto files."""

from __future__ import annotations

from pathlib import Path

from espalier_proto import espalier_pb2 as pb
from espalier_proto.generate import GENERATED, HERE, generate


def test_generated_code_is_current(tmp_path: Path) -> None:
    (tmp_path / "espalier_proto").mkdir()
    generate(tmp_path)
    for name in GENERATED:
        made = (tmp_path / "espalier_proto" / name).read_text()
        assert made == (HERE / name).read_text(), f"{name} is stale; run `make proto`"


def test_every_top_level_message_carries_the_schema_version() -> None:
    for name in (
        "WindowPlan",
        "RoundPlan",
        "EdgeReport",
        "ClientReport",
        "ClientHello",
        "EdgeHello",
        "ClassTable",
    ):
        field = pb.DESCRIPTOR.message_types_by_name[name].fields_by_name["schema"]
        assert field.number == 1
