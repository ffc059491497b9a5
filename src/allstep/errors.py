"""Every exception that allstep raises on its own account, in one place.

An error says what happened, on which rank where that is known, what was expected and what to do. Errors about an
argument are also a `ValueError` or `TypeError`, so that callers who know Python's own types can catch those. Exceptions
of a user's step, handler or dataset are never wrapped: they leave `Engine.run` as they are.
"""

from __future__ import annotations


class AllstepError(Exception):
    """Base of all errors that allstep itself raises."""


class PlacementError(AllstepError, ValueError):
    """The environment does not say consistently which rank this process is.

    Raised before anything is connected. `variable` is the environment variable at fault and `value` what it held
    (None where it is missing).
    """

    def __init__(self, message: str, *, variable: str, value: str | None = None) -> None:
        super().__init__(message)
        self.variable = variable
        self.value = value


class WorldError(AllstepError, RuntimeError):
    """The process group could not be set up, or a World was used before `init` or after `close`."""


class ChannelError(AllstepError, ConnectionError):
    """The control channel carried something that is not a message of this version, or its other end is gone."""


class ParallelError(AllstepError, ValueError):
    """A module cannot be spread over ranks as asked."""


class CollectiveError(AllstepError, ValueError):
    """A collective was given what it cannot carry; where ranks can know of each other's, it is raised on all alike."""


class LaunchError(AllstepError, RuntimeError):
    """The launcher cannot start what it was asked to start."""


class ConfigurationError(AllstepError, ValueError):
    """A configuration file or command-line option is wrong; the message names the file, the field and the remedy."""


class DataError(AllstepError, ValueError):
    """A dataset, sampler or loader argument is wrong, or data gave less than it declared."""


class EngineError(AllstepError, RuntimeError):
    """The engine was used in a way that cannot work, such as running one that is running already."""


class AgreementError(AllstepError, RuntimeError):
    """Ranks that have to act alike did not; every rank that takes part raises the same."""


class TermsError(AgreementError):
    """Ranks began a run with different arguments."""


class DivergenceError(AgreementError):
    """Ranks came to different votes: one ended, or took another course, alone."""


class UnevenDataError(AgreementError):
    """Ranks have different numbers of batches and the run's policy is "error". `counts` has each rank's number."""

    def __init__(self, message: str, *, counts: tuple[int, ...]) -> None:
        super().__init__(message)
        self.counts = counts

    def __reduce__(self) -> tuple[object, ...]:
        return _uneven, (str(self), self.counts)


def _uneven(message: str, counts: tuple[int, ...]) -> UnevenDataError:
    return UnevenDataError(message, counts=counts)


class MetricMismatchError(AgreementError):
    """Ranks are about to reduce metrics that differ in name, order, type or shape; raised on all of them alike."""


class MetricError(AllstepError, RuntimeError):
    """A metric or its attachment was used in a way that cannot work, or a metric failed on one rank only."""


class NotComputableError(AllstepError, RuntimeError):
    """A metric has seen no sample on any rank."""


class CheckpointError(AllstepError, RuntimeError):
    """A checkpoint could not be saved, found, read or removed."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint does not hold what it says it holds, or nothing that can be read safely."""


class NewerCheckpointError(DamagedCheckpointError):
    """A checkpoint of a later format than this version reads; it may well be whole."""


class UnkeepableError(CheckpointError, TypeError):
    """State that was to be saved has a value that a checkpoint cannot keep; the message names its key and type."""


class Preempted(SystemExit):
    """The run made room: its state is saved, and its process is to end with exit code 85. No error, so no AllstepError.

    `Engine.run` raises it after a stop that `Preemption` was asked for. Uncaught, it ends the process.
    """


class RanksError(AllstepError, RuntimeError):
    """A rank of `allstep.testing.run_ranks` failed; the message names the first one and holds its traceback."""


class SimulationError(AllstepError, RuntimeError):
    """Simulated ranks came apart: another rank raised, or did not come to a meeting in time."""
