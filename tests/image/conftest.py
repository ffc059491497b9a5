from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.image.image_store import DEBIAN_BASE, ImageStore, ImagesUnavailable, ensure_possible

TAG = "localhost/allstep:test"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageStore]:
    """A store with the image that the Dockerfile makes; each pytest-xdist worker that asks builds its own."""
    with contextlib.closing(ImageStore(tmp_path_factory.mktemp("images"))) as made:
        try:
            ensure_possible(os.environ)
            made.base(DEBIAN_BASE, "ubuntu")  # whose number is 1000, as in Ubuntu's images
        except ImagesUnavailable as reason:
            pytest.skip(str(reason))
        made.build(TAG)
        yield made
