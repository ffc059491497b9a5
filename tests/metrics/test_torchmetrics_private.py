"""What happens with a release of torchmetrics, or torch, that lacks a private name: each name is taken away."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassPrecision, MulticlassRecall
from torchmetrics.wrappers import ClasswiseWrapper

from allstep import Alone, Engine, Events
from allstep.coordination import Coordinator
from allstep.errors import MetricError
from allstep.metrics import Metrics, torchmetrics_private
from allstep.metrics.torchmetrics_private import DRAWING_NOTHING, bookkeeping, overrides_sync, warn_once, write_count
from allstep.testing import simulate
from tests.metrics.noting import Noting, batches
from tests.metrics.worlds import all_same_bits, on_one, over_ranks, take


@pytest.fixture(autouse=True)
def _each_test_warns_anew() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


class Without(dict[str, Any]):
    """Attributes but those of some names; what is set is set on the object."""

    def __init__(self, attributes: dict[str, Any], names: tuple[str, ...]) -> None:
        super().__init__({name: value for name, value in attributes.items() if name not in names})
        self.attributes = attributes

    def __setitem__(self, name: str, value: Any) -> None:
        self.attributes[name] = value


def lacking(kind: Any, *names: str) -> Any:
    """A class whose objects do not show the names to allstep, though torchmetrics itself goes on using them."""

    class Lacking(kind):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name) if name not in names else None
            if sys._getframe(1).f_globals.get("__name__") == torchmetrics_private.__name__:
                if name in names:
                    raise AttributeError(name)
                if name == "__dict__":
                    return Without(found, names)
            return super().__getattribute__(name)

    Lacking.__name__, Lacking.__module__ = kind.__name__, kind.__module__
    return Lacking


dealt = [batches(3, 2), batches(4)]


def confusion(kind: Any) -> list[Any]:
    return over_ranks(lambda: {"it": kind(4)}, dealt)


def test_without_defaults_a_reset_copy_says_how_states_begin(caplog: pytest.LogCaptureFixture) -> None:
    expected = confusion(MulticlassConfusionMatrix)
    assert all_same_bits([*expected, *confusion(lacking(MulticlassConfusionMatrix, "_defaults"))])
    assert "Metric._defaults is missing" in caplog.text
    inner = lacking(MulticlassPrecision, "_defaults")(4, average=None)
    found = on_one(lambda: {"it": lacking(ClasswiseWrapper, "_defaults")(inner)}, dealt[0])
    plain = on_one(lambda: {"it": ClasswiseWrapper(MulticlassPrecision(4, average=None))}, dealt[0])
    assert found == plain


def test_without_reductions_a_metric_is_refused_and_the_release_named() -> None:
    with pytest.raises(MetricError, match=r"torchmetrics \d.* has no Metric\._reductions.*1\.8 to 1\.9"):
        Metrics({"it": lacking(MulticlassConfusionMatrix, "_reductions")(4)})


def test_without_an_update_count_computing_is_refused_and_the_release_named() -> None:
    metric = lacking(MulticlassConfusionMatrix, "_update_count")(4)
    engine = Engine(take, coordinator=Alone())
    Metrics({"it": metric}).attach(engine)
    with pytest.raises(MetricError, match=r"has no Metric\._update_count"):
        engine.run(dealt[0])
    assert int(metric.confmat.sum()) == 5


def test_without_a_kept_result_each_compute_is_computed_anew(caplog: pytest.LogCaptureFixture) -> None:
    metric = lacking(Noting, "_computed")()
    engine = Engine(take, coordinator=Alone())
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: metric.compute())
    Metrics({"it": metric}).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: metric.compute())
    engine.run([1, 2, 3])
    assert int(engine.state.metrics["it"]) == 3
    assert "Metric._computed is missing" in caplog.text


@pytest.mark.parametrize("names", [(), ("_computed",)])
def test_a_result_computed_by_hand_is_not_taken_for_that_of_all_ranks(names: tuple[str, ...]) -> None:
    def rank(coordinator: Coordinator) -> tuple[int, int]:
        metric = lacking(Noting, *names)()
        engine = Engine(take, coordinator=coordinator, uneven="longest", idle="skip")
        Metrics({"it": metric}).attach(engine)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: metric.compute())
        engine.run([1] * (1 + coordinator.rank))
        return int(engine.state.metrics["it"]), int(metric.compute())

    assert simulate(rank, 2) == [(3, 1), (3, 2)]


def test_without_sync_dist_no_metric_has_a_way_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Metric, "_sync_dist")
    assert not overrides_sync(Noting())
    assert all_same_bits(confusion(MulticlassConfusionMatrix))


def test_without_filter_kwargs_the_signature_of_update_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Metric, "_filter_kwargs")
    found = on_one(lambda: {"it": Noting()}, [{"preds": 1, "other": 2}])
    assert int(found["it"]) == 1


NAMES = ["_enable_compute_groups", "_groups", "_groups_checked", "_state_is_copy", "_compute_groups_create_state_ref"]


@pytest.mark.parametrize("name", NAMES)
def test_without_compute_groups_each_member_is_fed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    def make(kind: Any) -> Any:
        return {"c": kind([MulticlassPrecision(4), MulticlassRecall(4)])}

    expected = over_ranks(lambda: make(MetricCollection), dealt)
    found = over_ranks(lambda: make(lacking(MetricCollection, name)), dealt)
    assert all_same_bits([*expected, *found])
    assert "members of a collection do not share states" in caplog.text


class Unversioned(torch.Tensor):
    @property
    def _version(self) -> int:  # type: ignore[override]
        raise AttributeError


def test_without_a_version_of_tensors_writes_are_not_seen_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tensor = torch.zeros(1)
    before = write_count(tensor)
    tensor += 1
    assert write_count(tensor) > before
    unversioned = torch.zeros(1).as_subclass(Unversioned)
    with caplog.at_level(logging.WARNING):
        assert [write_count(unversioned), write_count(unversioned)] == [0, 0]
    assert caplog.text.count("Tensor._version is missing") == 1


def test_what_torchmetrics_keeps_in_each_metric_is_read_off_a_bare_one() -> None:
    metric = Noting()
    assert set(vars(metric)) - bookkeeping() == {"given", "count"}
    assert {"compute_on_cpu", "update", "compute", "training"} <= bookkeeping()


# Functions and methods that draw random numbers; `sample` and `shuffle` are numpy's and Python's.
DRAWS = re.compile(
    r"(?:\b(?:rand|randn|randint|randperm|rand_like|randn_like|randint_like|multinomial|bernoulli|poisson|normal)|"
    r"\.(?:uniform_|normal_|random_|exponential_|bernoulli_|sample|shuffle|choice|permutation))\("
)


def test_modules_that_are_said_to_draw_nothing_name_no_function_that_draws() -> None:
    root = Path(torchmetrics.__file__).parent
    sources = [
        path
        for name in (each.partition(".")[2] for each in DRAWING_NOTHING if each.startswith("torchmetrics."))
        for base in (root, root / "functional")
        for path in [*(base / name).glob("*.py"), *base.glob(f"{name}.py")]
    ]
    assert len(sources) > 100
    lines = [line.strip() for path in sources for line in path.read_text().splitlines()]
    code = [line for line in lines if not line.startswith((">>>", "... "))]  # what docstrings show draws its input
    assert [line for line in code if DRAWS.search(line)] == []
    drawing = (root / "image" / "inception.py").read_text()
    assert DRAWS.search(drawing)
