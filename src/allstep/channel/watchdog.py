"""When a rank has made no progress for too long, which ranks are behind, and which are slow: pure functions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a section may last without progress; see `parse`."""

    @classmethod
    def parse(cls, text: str) -> Limits:
        """Limits from `step=60,data=5:300,silence=15,link=15`.

        A number bounds a section from above, two bound what is learnt from both sides, `off` ends the watch. `silence`
        is how long a rank may go without a heartbeat, `link` how long two nodes may go without a word.

        Raises:
            ConfigurationError: an unknown name, or not seconds.
        """
        raise NotImplementedError
