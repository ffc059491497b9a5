"""Where a run stands, for handlers, steps and users to read and to add to."""

from __future__ import annotations

from typing import Any


class State:
    """The state of an engine's run. Users may set further attributes.

    Attributes:
        iteration: iterations begun since the run started anew, over all epochs; 1 during the first.
        epoch: epochs begun; 1 during the first.
        epoch_length: iterations in an epoch; None while unknown.
        max_epochs: epochs after which the run is done, or None.
        max_iters: iterations after which the run is done, or None.
        batch: what the step was given last.
        output: what the step returned last.
        metrics: results by name.
        dataloader: the data being run over.
        seed: the world's seed, or None.
        times: seconds of the last epoch under "EPOCH_COMPLETED" and of the run under "COMPLETED".
        weight: factor for a mean-reduced loss that makes the gradient the mean over all samples of the accumulation
            group: 1.0 without gradient accumulation.
        group_end: whether the optimizer is due after this iteration: always, without gradient accumulation.
    """

    def __init__(self, **attributes: Any) -> None:
        self.iteration: int = 0
        self.epoch: int = 0
        self.epoch_length: int | None = None
        self.max_epochs: int | None = None
        self.max_iters: int | None = None
        self.batch: Any = None
        self.output: Any = None
        self.metrics: dict[str, Any] = {}
        self.dataloader: Any = None
        self.seed: int | None = None
        self.times: dict[str, float | None] = {"EPOCH_COMPLETED": 0.0, "COMPLETED": 0.0}
        self.weight: float = 1.0
        self.group_end: bool = True
        for name, value in attributes.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        lines = ["State:"]
        for name, value in vars(self).items():
            shown = value if isinstance(value, int | float | str | type(None)) else type(value)
            lines.append(f"\t{name}: {shown}")
        return "\n".join(lines) + "\n"
