#!/usr/bin/env bash
# Makes base images on a machine that cannot pull any: a Debian 12 from your apt mirror, and the same with your pip settings.
# Usage: docker/local-base.sh [TAG]; makes TAG and TAG-builder, the BASE and BUILDER of docker/Dockerfile.
set -euo pipefail
tag=${1:-espalier-base}
for tool in docker debootstrap; do
    command -v "$tool" > /dev/null || { echo "error: $tool is missing; install it" >&2; exit 1; }
done
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

debootstrap --variant=minbase bookworm "$scratch/root" > "$scratch/debootstrap.log" \
    || { tail -n 20 "$scratch/debootstrap.log" >&2; exit 1; }
rm -rf "$scratch"/root/usr/share/{doc,info,locale,man}/* "$scratch"/root/var/{cache/apt,lib/apt/lists}/* "$scratch"/root/var/log/*.log
tar -C "$scratch/root" -c . | docker import --change 'CMD ["bash"]' - "$tag" > /dev/null

# The pip settings of this machine, with the files and folders that they name. Indexes on this disk are left out.
mkdir "$scratch/builder"
python3 - "$scratch/builder" "$tag" << 'PYTHON'
import shutil, subprocess, sys
from pathlib import Path

SETTINGS = "cert client-cert default-timeout extra-index-url find-links index-url proxy trusted-host".split()
folder, tag = Path(sys.argv[1]), sys.argv[2]
lines = [f"FROM {tag}"]
listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
settings = dict(line.split("=", 1) for line in listed.splitlines())
values = {}
for key, value in settings.items():  # those of the environment come first and have precedence
    name = key.rpartition(".")[2]
    if name in values or name not in SETTINGS:
        continue
    values[name] = []
    for word in value.strip("'\"").replace("\\n", " ").split():
        if Path(word).is_absolute() and Path(word).exists():
            copy = f"{name}-{Path(word).name}"
            (shutil.copytree if Path(word).is_dir() else shutil.copy)(word, folder / copy)
            lines.append(f"COPY {copy} /opt/pip/{copy}")
            word = f"/opt/pip/{copy}"
        if not word.startswith("file:"):
            values[name].append(word)
    if values[name]:
        lines.append(f'ENV PIP_{name.upper().replace("-", "_")}="{" ".join(values[name])}"')
(folder / "Dockerfile").write_text("\n".join(lines) + "\n")
PYTHON
DOCKER_BUILDKIT=0 docker build --quiet --tag "$tag-builder" "$scratch/builder" > /dev/null
echo "made $tag and $tag-builder"
