"""The size of the image that the Dockerfile makes, layer by layer.

    python benchmarks/image.py                                     # builds it: some minutes
    python benchmarks/image.py --build-arg TORCH=torch==2.13.0

Builds with buildah and without a registry, as the nightly tests do (`tests/image/image_store.py`): root, buildah,
crun and debootstrap are needed. Prints a row a layer: its size as files and compressed by gzip, which is about what
goes over the network, in MB (10^6 bytes).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path

from machine import machine_line

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests build it

TAG = "localhost/allstep:measured"


def main() -> None:
    from tests.image.image_store import DEBIAN_BASE, ImageStore, ensure_possible

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="of the Dockerfile")
    arguments = dict(each.partition("=")[::2] for each in parser.parse_args().build_arg)
    ensure_possible(os.environ)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(ImageStore(Path(folder) / "images")) as store:
        store.base(DEBIAN_BASE)
        store.build(TAG, **arguments)
        layers = store.layers(TAG)
    print(machine_line(), "\n", sep="")
    print("| layer | MB | MB compressed |", "|---|---:|---:|", sep="\n")
    for layer in layers:
        print(
            f"| {' '.join(layer.instruction.split())[:100]} | {layer.size / 1e6:.1f} | {layer.compressed / 1e6:.1f} |"
        )
    total, compressed = sum(layer.size for layer in layers), sum(layer.compressed for layer in layers)
    print(f"| together | {total / 1e6:.1f} | {compressed / 1e6:.1f} |")


if __name__ == "__main__":
    main()
