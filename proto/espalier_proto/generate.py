"""Generates Python modules, stubs and gRPC stubs from the .proto files: ``python -m espalier_proto.generate``."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent

#: The .proto files, and those of them that have services.
FILES = ("espalier", "monitor")
SERVICES = ("monitor",)
#: What is generated, in this folder.
GENERATED = (
    *(f"{name}_pb2.{kind}" for name in FILES for kind in ("py", "pyi")),
    *(f"{name}_pb2_grpc.py" for name in SERVICES),
)


def generate(out: Path) -> None:
    """Write the generated modules below ``out``.

    Parameters
    ----------
    out : Path
        Folder that receives ``proto/espalier_proto/espalier_pb2.py`` and the others of `GENERATED`.

    Raises
    ------
    RuntimeError
        If the compiler refuses a file.
    """
    well_known = resources.files("grpc_tools") / "_proto"
    for name in FILES:
        outputs = [f"--python_out={out}", f"--pyi_out={out}"]
        outputs += [f"--grpc_python_out={out}"] if name in SERVICES else []
        status = protoc.main(
            ["protoc", f"-I{HERE.parent}", f"-I{well_known}", *outputs, f"espalier_proto/{name}.proto"]
        )
        if status:
            raise RuntimeError(f"protoc failed with status {status} on {name}.proto")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent)
