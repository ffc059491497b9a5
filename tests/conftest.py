"""Hypothesis draws the same examples in every default run, so that a red run is about the change; the nightly mark, and
HYPOTHESIS_PROFILE=explore, draw new ones each time.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))
