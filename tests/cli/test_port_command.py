"""`allstep port`: what it makes of scripts for PyTorch-Ignite, and that what it makes runs."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from allstep.cli.main import main
from allstep.cli.porting import port


def ported(source: str) -> str:
    return port(dedent(source)).text


def test_a_script_of_engines_alone_gets_allsteps_own_names() -> None:
    assert ported(
        """\
        from ignite.engine import Engine, Events, EventEnum  # the loop

        engine = Engine(lambda engine, batch: batch)
        """
    ) == dedent(
        """\
        from allstep import Engine, Events
        from allstep.engine import EventEnum  # the loop

        engine = Engine(lambda engine, batch: batch)
        """
    )


def test_a_script_that_keeps_parts_of_ignite_gets_the_engine_that_they_fit() -> None:
    result = port("from ignite.engine import Engine as E, Events\nfrom ignite.metrics import Accuracy\n")
    assert result.text == "from allstep.ignite import Engine as E, Events\nfrom ignite.metrics import Accuracy\n"
    assert any("Accuracy" in note for _, note in result.notes)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import torch, ignite.engine as ie\n", "import torch, allstep.ignite as ie\n"),
        ("from ignite import engine\n", "from allstep import ignite as engine\n"),
        (
            "from ignite import distributed as idist, engine as ie\n",
            "from allstep import ignite as ie\nfrom ignite import distributed as idist\n",
        ),
    ],
)
def test_the_engines_module_under_a_name_becomes_the_bridge(before: str, after: str) -> None:
    assert port(before + "from ignite.engine import Events\n").text == after + "from allstep.ignite import Events\n"


@pytest.mark.parametrize("line", ["import ignite", "import ignite.engine"])
def test_an_engine_by_its_full_name_is_left_for_a_person(line: str) -> None:
    result = port(f"{line}\nengine = ignite.engine.Engine(step)\nfrom ignite.engine import Events\n")
    assert "from allstep.ignite import Events" in result.text  # which fit an engine of Ignite's
    assert result.notes == [(2, "ignite.engine.Engine is still Ignite's: from allstep.ignite import Engine")]


def test_modules_of_others_are_nothing_that_keeps_ignites_engine() -> None:
    text = "import torch.nn.functional as F\nimport ignite\nfrom ignite.engine import Engine\n"
    assert ported(text) == text.replace("from ignite.engine", "from allstep")


def test_handlers_and_arguments_get_the_names_that_they_have_here() -> None:
    assert ported(
        """\
        from ignite.engine import create_supervised_trainer
        from ignite.handlers import EarlyStopping
        trainer = create_supervised_trainer(model, optimizer, loss, amp_mode="amp", deterministic=True)
        stop = EarlyStopping(3, score, trainer, cumulative_delta=True)
        """
    ) == dedent(
        """\
        from allstep import create_supervised_trainer
        from allstep import EarlyStopping
        trainer = create_supervised_trainer(model, optimizer, loss, precision="fp16")
        stop = EarlyStopping(3, score, trainer, cumulative=True)
        """
    )


@pytest.mark.parametrize(
    "call",
    [
        "create_supervised_evaluator(model, metrics={})",
        "create_supervised_evaluator(model, amp_mode=mode)",
    ],
)
def test_an_argument_without_a_counterpart_keeps_ignites_function(call: str) -> None:
    text = ported(f"from ignite.engine import create_supervised_evaluator\nevaluator = {call}\n")
    assert text == f"from allstep.ignite import create_supervised_evaluator\nevaluator = {call}\n"


def test_imports_inside_functions_and_over_several_lines_keep_their_place() -> None:
    assert ported(
        """\
        def main():
            from ignite.engine import (
                Engine,  # ours
                Events,
            )
            return "ä", Engine
        """
    ) == dedent(
        """\
        def main():
            from allstep import Engine, Events
            return "ä", Engine
        """
    )


def test_a_dropped_argument_takes_its_comma_along_wherever_it_stands() -> None:
    before = "from ignite.engine import create_supervised_trainer as make\n"
    after = "from allstep import create_supervised_trainer as make\n"
    for call, wanted in (
        ("make(deterministic=True, device=0)", "make(device=0)"),
        ("make(m, deterministic=True,)", "make(m,)"),
        ("make(deterministic=True)", "make()"),
    ):
        assert ported(before + call) == after + wanted


def test_what_is_asked_of_ranks_is_noted_with_the_worlds_way() -> None:
    result = port("import ignite.distributed as idist\nmodel = idist.auto_model(model)\n")
    assert result.notes == [(2, "idist.auto_model: in a World, world.wrap(model)")]


def test_the_command_shows_a_diff_and_writes_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text("from ignite.engine import Engine\nx = 1")
    assert main(["port", str(script)]) == 0
    shown = capsys.readouterr().out
    assert "-from ignite.engine import Engine" in shown
    assert "+from allstep import Engine" in shown
    assert script.read_text() == "from ignite.engine import Engine\nx = 1"
    assert main(["port", "--write", str(script)]) == 0
    assert script.read_text() == "from allstep import Engine\nx = 1"
    assert main(["port", str(script)]) == 0


@pytest.mark.parametrize("content", [b"def", b"\xff\xfe"])
def test_what_is_no_script_is_an_error_that_names_it(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_bytes(content)
    assert main(["port", str(script)]) == 2
    assert "train.py" in capsys.readouterr().err


SCRIPTS = {
    "own": """\
        from ignite.engine import Engine, Events
        engine = Engine(lambda engine, batch: batch)
        seen = []
        @engine.on(Events.ITERATION_COMPLETED(every=2) | Events.COMPLETED)
        def note(engine):
            seen.append(engine.state.iteration)
        engine.run(range(5))
        """,
    "bridged": """\
        from ignite.engine import Engine, Events
        from ignite.metrics import Average
        engine = Engine(lambda engine, batch: float(batch))
        Average().attach(engine, "mean")
        seen = [engine.run(range(5)).metrics["mean"]]
        """,
    "stopping": """\
        from ignite.engine import Engine, Events
        from ignite.handlers import EarlyStopping
        engine = Engine(lambda engine, batch: batch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, EarlyStopping(2, lambda engine: 1.0, engine))
        seen = [engine.run(range(5), max_epochs=9).epoch]
        """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_ported_script_gives_what_it_gave(name: str) -> None:
    before: dict[str, object] = {}
    after: dict[str, object] = {}
    exec(dedent(SCRIPTS[name]), before)
    exec(ported(SCRIPTS[name]), after)
    assert before["seen"] == after["seen"]
