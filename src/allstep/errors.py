"""Every exception type of allstep, in one place.

A message says what happened, on which rank where that is known, what was expected, and what to do. An exception that a
user's step, handler or dataset raises is never wrapped: it leaves `Engine.run` as it is.

| error | raised when | is also a |
| --- | --- | --- |
| AllstepError | the base of all errors that allstep raises | Exception |
| ArgumentError | an argument has a value that cannot be meant | ValueError |
| ArgumentTypeError | an argument has a type that cannot be meant | TypeError |
| MissingExtraError | a library that allstep only needs for one purpose is not installed | ImportError |
| PlacementError | the environment does not say consistently which rank a process is | ValueError |
| MeshError | a mesh of ranks has names or sizes that cannot be meant | ValueError |
| ConfigurationError | a configuration file or command-line option is wrong | ValueError |
| LaunchError | the launcher cannot start the workers | RuntimeError |
| SubmissionError | a job cannot be submitted: no sbatch, no answer, an option that SLURM refuses | RuntimeError |
| RunControlError | a run that is asked about or cancelled is not there, or cannot be reached from here | RuntimeError |
| ChannelError | a message of the control channel cannot be read, or its other end is gone | ConnectionError |
| OtherVersionError | the other end of the control channel speaks another version of it | ChannelError |
| WorldError | the process group cannot be set up, or a World is used outside `init` and `close` | RuntimeError |
| CollectiveError | a collective is given what it cannot carry | ValueError |
| ParallelError | a module cannot be wrapped as asked | ValueError |
| ModelChangedError | a wrapped model has changed so that its gradients would not be reduced | ParallelError |
| DataError | a dataset, sampler or loader argument is wrong, or data is shorter than declared | ValueError |
| EngineError | an engine is used in a way that cannot work | RuntimeError |
| AgreementError | ranks that have to act alike did not; raised on all that take part | RuntimeError |
| TermsError | ranks began a run with different arguments | AgreementError |
| DivergenceError | one rank ended, or took another course, alone | AgreementError |
| UnevenDataError | ranks have different numbers of batches and the policy is "error" | AgreementError |
| MetricMismatchError | ranks hold metrics that differ in name, order, type or shape | AgreementError |
| MetricError | a metric cannot be used as asked, or failed on one rank only | RuntimeError |
| NotComputableError | a metric has seen no sample on any rank | RuntimeError |
| CheckpointError | a checkpoint cannot be saved, found, read or removed | RuntimeError |
| FolderInUseError | a folder of checkpoints belongs to another job that is alive | CheckpointError |
| FolderLostError | another job has taken over the folder that this one saves to | CheckpointError |
| DamagedCheckpointError | a checkpoint does not hold what it says it holds | CheckpointError |
| NewerCheckpointError | a checkpoint has a later format than this version reads | DamagedCheckpointError |
| UnsupportedStateError | state to be saved holds a value that a checkpoint cannot keep | CheckpointError, TypeError |
| RanksError | a rank of `allstep.testing.run_ranks` failed | RuntimeError |
| RehearsalError | a script that `allstep.testing.rehearse` interrupted did not go on as it should | AssertionError |
| SimulationError | simulated ranks do not act alike, or one of them raised | RuntimeError |
| Cancelled | a run that Ctrl-C ended is saved and its process is to end with status 130; not an error | SystemExit |
| Preempted | a preempted run has saved its state and its process is to end with status 85; not an error | SystemExit |
"""

from __future__ import annotations

from functools import partial

_LONGEST_TEXT = 4000  # characters


def printable(text: str) -> str:
    """A text from elsewhere for a terminal or a log: cut, and with what moves a cursor or ends a line written out."""
    kept = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
    if kept.isprintable():
        return kept
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in kept)


class AllstepError(Exception):
    """Base of all errors that allstep itself raises."""


class ArgumentError(AllstepError, ValueError):
    """An argument has a value that cannot be meant; the message names the argument, its value and the remedy."""


class ArgumentTypeError(AllstepError, TypeError):
    """An argument has a type that cannot be meant; the message names the argument, its value and the remedy."""


class MissingExtraError(AllstepError, ImportError):
    """A library that is no requirement of allstep itself is not installed; the message says how to install it."""


class PlacementError(AllstepError, ValueError):
    """The environment does not say consistently which rank this process is.

    Raised before anything is connected.

    Args:
        message: what is wrong and what to do.
        variable: the environment variable at fault.
        value: what it holds; None where it is missing.
    """

    def __init__(self, message: str, *, variable: str, value: str | None = None) -> None:
        super().__init__(message)
        self.variable = variable
        self.value = value

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between processes, and pickle by itself would leave the keyword arguments out.
        return partial(PlacementError, variable=self.variable, value=self.value), (str(self),)


class MeshError(AllstepError, ValueError):
    """A mesh has dimensions that do not exist, or sizes that do not make up the world."""


class ConfigurationError(AllstepError, ValueError):
    """A configuration file or command-line option is wrong; the message names the file, the field and the remedy."""


class LaunchError(AllstepError, RuntimeError):
    """The launcher cannot start what it was asked to start."""


class SubmissionError(AllstepError, RuntimeError):
    """A job cannot be given to the scheduler; the message has the scheduler's own words and the remedy."""


class RunControlError(AllstepError, RuntimeError):
    """A run is not there, or cannot be reached from here; the message says where was looked and the remedy."""


class ChannelError(AllstepError, ConnectionError):
    """The control channel carried something that is not a message of this version, or its other end is gone."""


class OtherVersionError(ChannelError):
    """The other end of the control channel speaks another version of it."""


class WorldError(AllstepError, RuntimeError):
    """The process group could not be set up, or a World was used before `init` or after `close`."""


class CollectiveError(AllstepError, ValueError):
    """A collective was given what it cannot carry.

    Raised on all ranks alike where they exchange what each of them gives; by one rank alone where only it can know.
    """


class ParallelError(AllstepError, ValueError):
    """A module cannot be wrapped for several ranks as asked."""


class ModelChangedError(ParallelError):
    """A wrapped model has changed so that DDP would not reduce its gradients; the message says what and what to do."""


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
    """Ranks have different numbers of batches and the run's policy is "error".

    Args:
        message: what is wrong and what to do.
        counts: each rank's number of batches, in rank order.
    """

    def __init__(self, message: str, *, counts: tuple[int, ...]) -> None:
        super().__init__(message)
        self.counts = counts

    def __reduce__(self) -> tuple[object, ...]:
        return partial(UnevenDataError, counts=self.counts), (str(self),)


class MetricMismatchError(AgreementError):
    """Ranks are about to reduce metrics that differ in name, order, type or shape; raised on all of them alike."""


class MetricError(AllstepError, RuntimeError):
    """A metric or its attachment was used in a way that cannot work, or a metric failed on one rank only."""


class NotComputableError(AllstepError, RuntimeError):
    """A metric has seen no sample on any rank."""


class CheckpointError(AllstepError, RuntimeError):
    """A checkpoint could not be saved, found, read or removed.

    The message may name what stands in files, which are anybody's, so it is kept to one line of printable text.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class FolderInUseError(CheckpointError):
    """A folder of checkpoints belongs to another job that is alive; the message names that job and the remedies."""


class FolderLostError(CheckpointError):
    """Another job has taken over the folder that this one saves to, so this one saves no more and has to end."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint does not hold what it says it holds, or nothing that can be read safely."""


class NewerCheckpointError(DamagedCheckpointError):
    """A checkpoint of a later format than this version reads; it may well be whole."""


class UnsupportedStateError(CheckpointError, TypeError):
    """State that was to be saved has a value that a checkpoint cannot keep; the message names its key and type."""


class RanksError(AllstepError, RuntimeError):
    """A rank of `allstep.testing.run_ranks` failed; the message names the first one and holds its traceback."""


class RehearsalError(AllstepError, AssertionError):
    """A script that `allstep.testing.rehearse` interrupted did not go on as if nothing had happened.

    Args:
        message: the report as text.
        report: the `RehearsalReport`; None where the error was made from the text alone.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[object, ...]:
        return RehearsalError, (str(self), self.report)


class SimulationError(AllstepError, RuntimeError):
    """Simulated ranks do not act alike: one of them raised, or did not take part in a collective in time."""


class Cancelled(SystemExit):
    """A person pressed Ctrl-C: the run has ended in good order, and its process is to end with exit code 130.

    It is no failure, so it is no AllstepError. `Engine.run` raises it on every rank. Uncaught, it ends the process.
    """


class Preempted(SystemExit):
    """The run was preempted: its state is saved, and its process is to end with exit code 85.

    It is no failure, so it is no AllstepError. `Engine.run` raises it after a stop that the `Preemption` handler asked
    for. Uncaught, it ends the process.
    """
