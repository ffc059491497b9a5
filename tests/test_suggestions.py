"""Names that are nearly right get a suggestion, wherever they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import allstep
from allstep import notebook, tracking, trainers
from allstep.cli.main import main
from allstep.data import make_loader
from allstep.engine import Engine
from allstep.errors import ArgumentError, ArgumentTypeError
from allstep.parallel import wrap_module
from allstep.suggestions import hint_for, nearest


def test_case_and_underscores_do_not_matter() -> None:
    assert nearest("batchsize", ["epoch", "batch_size"]) == "batch_size"
    assert nearest("--NPROCS", ["--nproc", "--nnodes"]) == "--nproc"
    assert nearest("colour", ["batch_size"]) is None


@pytest.mark.parametrize(
    ("argv", "suggested"),
    [
        (["run", "--nprocs", "2", "train.py"], "--nproc"),
        (["run", "--max-restart=2", "train.py"], "--max-restarts"),
        (["rnu", "train.py"], "run"),
        (["checkpoints", "lss", "folder"], "ls"),
        (["checkpoints", "ls", "folder", "--jason"], "--json"),
    ],
)
def test_the_command_line_suggests(argv: list[str], suggested: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert f"did you mean {suggested}?" in capsys.readouterr().err


def test_a_wrong_keyword_of_wrap_is_the_same_error_in_a_world_of_any_size() -> None:
    for world_size in (1, 2):
        with pytest.raises(ArgumentTypeError, match=r"find_unused_params=True.* did you mean find_unused_parameters"):
            wrap_module(torch.nn.Linear(1, 1), torch.device("cpu"), world_size, find_unused_params=True)


def test_a_wrong_keyword_of_loader_is_told_with_the_right_one() -> None:
    with pytest.raises(ArgumentTypeError, match=r"batchsize=2.*did you mean batch_size"):
        make_loader(torch.arange(4), rank=0, world_size=1, seed=0, batchsize=2)  # type: ignore[arg-type]


def test_an_event_of_a_nearly_right_name_is_told_with_the_right_one() -> None:
    engine = Engine(lambda engine, batch: None)
    with pytest.raises(ArgumentError, match=r"did you mean Events.EPOCH_COMPLETED"):
        engine.add_event_handler("epoch_complete", lambda: None)


def test_a_choice_that_is_nearly_right_is_told_with_the_right_one() -> None:
    with pytest.raises(ArgumentError, match="did you mean longest"):
        Engine(lambda engine, batch: None, uneven="longst")  # type: ignore[arg-type]


def test_a_wrong_keyword_of_a_public_function_gets_a_note() -> None:
    engine = Engine(lambda engine, batch: None)
    with pytest.raises(TypeError) as raised, allstep.init():
        engine.run([1], max_epoch=2)  # type: ignore[call-arg]
    text = " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert "Did you mean max_epochs?" in text or "Did you mean 'max_epochs'" in text
    assert hint_for(TypeError("foo() got an unexpected keyword argument 'x'")) is None
    assert hint_for(ValueError("Engine.run() got an unexpected keyword argument 'max_epoch'")) is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: allstep.init(sede=1), "seed"),  # type: ignore[call-arg]
        (lambda: notebook.run(print, nprocs=2), "nproc"),  # type: ignore[call-arg]
    ],
)
def test_what_opens_a_world_suggests_a_keyword_by_itself(call: Callable[[], object], said: str) -> None:
    with pytest.raises(TypeError) as raised:
        call()
    assert f"Did you mean {said}?" in raised.value.__notes__


@pytest.mark.parametrize(
    ("called", "keyword", "said"),
    [
        ("Schedule.__init__", "warmup", "warm_up"),
        ("Timer.__init__", "nam", "name"),
        ("MLflow.__init__", "experimnt", "experiment"),
        ("create_recurrent_trainer", "step_of_time", "steps_of_time"),
        ("Track.watch", "prefx", "prefix"),
    ],
)
def test_names_of_all_packages_are_known(called: str, keyword: str, said: str) -> None:
    assert trainers.create_recurrent_trainer
    assert tracking.Track
    error = TypeError(f"{called}() got an unexpected keyword argument '{keyword}'")
    assert hint_for(error) == f"Did you mean {said}?"


def test_a_function_that_no_package_shows_gets_no_suggestion() -> None:
    assert hint_for(TypeError("import_module() got an unexpected keyword argument 'packge'")) is None


def test_a_field_of_a_configuration_that_is_nearly_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("nprocs: 2\n")
    assert main(["run", "--config", str(tmp_path / "run.yaml"), "train.py"]) == 2
    assert "nprocs is not a field; did you mean nproc?" in capsys.readouterr().err
