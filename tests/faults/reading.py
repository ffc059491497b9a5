"""What tests look for in a job's report."""

from __future__ import annotations

from tests.faults.jobs import Job


def check_first_lines(job: Job, *words: str, within: int = 12) -> None:
    """The words are in the report's first lines, in this order."""
    first = "\n".join(job.block[:within])
    at = 0
    for word in words:
        found = first.find(word, at)
        assert found >= 0, f"{word!r} does not follow in the first lines of the report:\n{first}\n\nall:\n{job.text}"
        at = found
