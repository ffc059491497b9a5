"""`allstep plan`: scripts run up to their first steps, without values and devices."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest
import torch.distributed as dist

import allstep
from allstep.cli.main import main
from allstep.engine import Engine
from allstep.world import World

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = """\
    import sys
    from pathlib import Path

    import allstep
    import torch
    from torch import nn


    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))


    with allstep.init() as world:
        print("world of", world.world_size)
        model = world.wrap(nn.Sequential(*[Block() for _ in range(4)]), units=Block)
        optimizer = torch.optim.AdamW(model.parameters())
        allstep.Checkpoint(Path(sys.argv[1]) / "saved").resume()

        def evaluate(engine, batch):
            with torch.no_grad():
                return model(batch).sum()

        def step(engine, batch):
            loss = model(world.to_device(batch)).square().mean()
            {reads}
            (loss * engine.state.weight).backward()
            if engine.state.group_end:
                optimizer.step()
                optimizer.zero_grad()

        loader = world.loader(torch.randn(512, 64), global_batch_size=512)
        allstep.Engine(evaluate).run(loader)
        trainer = allstep.Engine(step, accumulate=2)
        allstep.GradientClipping(optimizer, 1.0).attach(trainer)
        trainer.run(loader, max_epochs=5)
        (Path(sys.argv[1]) / "trained").touch()
    """
WHOLE = 4 * 2 * 64 * 256 * 4  # bytes of its parameters


def script(folder: Path, reads: str = "pass") -> list[str]:
    """Its path and argument."""
    path = folder / "train.py"
    path.write_text(dedent(SCRIPT).replace("{reads}", reads))
    return [str(path), str(folder)]


def test_a_script_is_planned_up_to_its_first_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, init = Engine.run, allstep.init
    assert main(["plan", "--mesh", "replicate=2,shard=4", "--json", *script(tmp_path)]) == 0
    told = capsys.readouterr()
    plan = json.loads(told.out)
    assert told.err == "world of 8\n"
    assert (plan["ranks"], plan["mesh"]) == (8, {"replicate": 2, "shard": 4})
    assert plan["held"]["parameters"] == plan["held"]["gradients"] == WHOLE // 4
    assert plan["held"]["optimizer"] == 2 * WHOLE // 4 + 8 * 4
    sent = {(each["collective"], each["dimension"]): each for each in plan["traffic"]}
    assert sent["all-gather", "shard"]["bytes"] == 2 * 2 * WHOLE  # two batches a step
    assert sent["reduce-scatter", "shard"]["bytes"] == WHOLE
    # Nothing was trained, and nothing is left of it.
    assert not (tmp_path / "trained").exists()
    assert not (tmp_path / "saved").exists()
    assert (Engine.run, allstep.init) == (run, init)
    assert World.current() is None
    assert not dist.is_initialized()


@pytest.mark.nightly
def test_a_script_is_planned_in_its_engines_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for precision in ("no", "bf16"):
        given = script(tmp_path)
        path = Path(given[0])
        path.write_text(path.read_text().replace("accumulate=2)", f"accumulate=2, precision={precision!r})"))
        assert main(["plan", "--json", *given]) == 0
        found.append(json.loads(capsys.readouterr().out)["held"]["activations"])
    assert found[1] < 0.8 * found[0]


def test_what_would_fit_a_script_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = script(tmp_path)
    assert main(["plan", "--nproc", "4", "--memory", "1GB", *given]) == 0
    assert main(["plan", "--nproc", "4", "--memory", "2500kB", *given]) == 1
    assert "does not fit 2.5 MB; with mesh shard=4 it takes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        ("loss.item()", r"train.py:30, loss.item(); a plan has shapes and no values. Give world.plan a step"),
        ("raise ValueError('not today')", "ValueError: not today"),
    ],
)
def test_a_script_that_cannot_be_planned_is_told_why(
    reads: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *script(tmp_path, reads)]) == 2
    assert said in capsys.readouterr().err
    assert World.current() is None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import allstep; allstep.init(); exit(1)", "ended with 1 before an engine of it trained"),
        ("import allstep; allstep.init()", "no engine of it has trained a wrapped model"),
        (
            "import allstep; allstep.Engine(lambda engine, batch: None).run([1])",
            "no model by world.wrap; call world.plan(",
        ),
    ],
)
def test_a_script_that_trains_no_wrapped_model_is_told_so(
    source: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(source)
    assert main(["plan", str(tmp_path / "train.py")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--nproc", "no", "train.py"], "no number of ranks"),
        (["--mesh", "shard", "train.py"], "mesh is 'shard'"),
        (["--memory", "much", "train.py"], "memory is 'much'"),
        (["--nproc", "2"], "a script to plan is missing"),
    ],
)
def test_a_wrong_command_line_plans_nothing(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.nightly
def test_the_language_model_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--modules", "a*.py", "--held-out", "1", "--batch", "64", "--layers", "2"]
    given = ["plan", "--json", "--nproc", "8", "--mesh", "shard=8", str(EXAMPLES / "language_model.py"), *options]
    assert main(given) == 0
    told = capsys.readouterr()
    parameters = int(told.err.split(" parameters")[0].split()[-1].replace(",", ""))
    assert json.loads(told.out)["held"]["parameters"] == parameters * 4 // 8


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["digits", "gan", "multi_model", "uneven_stream"])
def test_every_example_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--nproc", "2", str(EXAMPLES / f"{name}.py")]) == 0
    assert "a rank of 2, mesh none" in capsys.readouterr().out
