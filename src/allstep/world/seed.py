"""One seed for every random generator of a process."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from allstep.errors import ArgumentError, ArgumentTypeError

_END = 2**63

MEMBER = "ALLSTEP_ARRAY_MEMBER"
"""Set in each member of an array of jobs to its number, so that members with one seed in their script do not repeat
each other."""


def member_seed(seed: int) -> int:
    """The seed that stands for `seed` in this member of an array of jobs; `seed` itself in any other job."""
    member = os.environ.get(MEMBER, "")
    seed = _checked(seed)
    return _derived(seed, int(member)) if member.isdecimal() else seed


def _derived(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) % _END


def _checked(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentTypeError(f"seed is {seed!r}; it must be an integer")
    if not 0 <= seed < _END:
        raise ArgumentError(f"seed is {seed}; it must be from 0 to 2^63 - 1")
    return seed


def seed_generators(seed: int, rank: int | None = None) -> int:
    """Seed Python's, numpy's and torch's generators (torch's on every device).

    Args:
        seed: from 0 to 2^63 - 1, used as it is when `rank` is None.
        rank: if given, the seed used is derived from (seed, rank) by numpy's `SeedSequence`, whose streams do not
            overlap for neighbouring seeds and ranks as `seed + rank` would.

    Returns the seed that torch was given.

    Raises:
        ArgumentError: the seed is out of range.
        ArgumentTypeError: the seed is not an integer.
    """
    seed = _checked(seed)
    if rank is not None:
        seed = _derived(seed, rank)
    # numpy's legacy generator takes 32 bits, or several words of them.
    random.seed(seed)
    np.random.seed(seed if seed < 2**32 else [seed % 2**32, seed // 2**32])
    torch.manual_seed(seed)
    return seed
