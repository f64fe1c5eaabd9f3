"""Generate espalier_pb2.py and its type stubs from espalier.proto: ``python -m proto.generate``."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Write the generated modules below ``out``.

    Parameters
    ----------
    out : Path
        Folder that receives ``proto/espalier_pb2.py`` and ``proto/espalier_pb2.pyi``.

    Raises
    ------
    RuntimeError
        If the compiler refuses the file.
    """
    well_known = resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{HERE.parent}",
            f"-I{well_known}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            "proto/espalier.proto",
        ]
    )
    if status:
        raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent)
