"""Configuration files: what they set, and that every mistake is named with file, line and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from allstep.errors import ConfigurationError
from allstep.launch.config_file import load_settings
from allstep.launch.settings import OPTIONS, LaunchSettings

ROOT = Path(__file__).parents[2]


def load(folder: Path, text: str) -> dict[str, Any]:
    file = folder / "c.yaml"
    file.write_text(text)
    return load_settings(file)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("nproc: auto", {"nproc": "auto"}),
        ("nproc: 3\ncpu_processes: 2", {"nproc": 3, "cpu_processes": 2}),
        ("show: main", {"show": "main"}),
        ("max_restarts: 3\nstop_after: 2", {"max_restarts": 3, "stop_after": 2}),
        ("nnodes: 2\nnode_rank: 1\nrdzv: h:1", {"nnodes": 2, "node_rank": 1, "rdzv": "h:1"}),
        (
            "rdzv_timeout: 9\nlimits: step=60\nfault: rank=1,kill=9",
            {"rdzv_timeout": 9.0, "limits": "step=60", "fault": "rank=1,kill=9"},
        ),
        ("show: 0,1", {"show": (0, 1)}),
        ("mesh: replicate=2,shard=-1", {"mesh": "replicate=2,shard=-1"}),
        ("mesh: [data=2, tensor=2]", {"mesh": "data=2,tensor=2"}),
        ("show: [0, 3]", {"show": (0, 3)}),
        ("grace: 2.5\nname: exp\nruns: /r", {"grace": 2.5, "name": "exp", "runs": "/r"}),
        ("share_imports: false\nresume: auto", {"share_imports": False, "resume": "auto"}),
        ("env: {A: 1e-3, B: on, C: 010, D: ''}", {"env": {"A": "1e-3", "B": "on", "C": "010", "D": ""}}),
    ],
)
def test_a_file_gives_the_fields_that_it_sets_and_no_others(
    text: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    loaded = load(tmp_path, text)
    assert loaded == settings
    LaunchSettings(**loaded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nprocs: 2", "c.yaml:1: nprocs is not a field; did you mean nproc?"),
        ("\n\nspeed: 2", "c.yaml:3: speed is not a field; fields are nproc, "),
        ("nproc: auto\ncpu_processes: two", "c.yaml:2: cpu_processes is 'two'; it must be an integer"),
        ("nproc: 0", "c.yaml:1: nproc is 0; it must be 1 or more"),
        ("nproc: many", "c.yaml:1: nproc is 'many'; it must be auto or a number"),
        ("nproc: [1]", "c.yaml:1: nproc must be one value: workers on this machine"),
        ("show: [0, x]", "c.yaml:1: show is '0,x'; it must be all, main, or ranks"),
        ("name: ../x", "c.yaml:1: name is '../x'"),
        ("runs:", "c.yaml:1: runs is ''; it must be a text that is not empty"),
        ("grace: -1", "c.yaml:1: grace is -1.0"),
        ("nproc: 1\nenv:\n  RANK: 3", "c.yaml:2: env sets RANK to '3'; the launcher sets RANK itself"),
        ("env: [A]", "c.yaml:1: env must be names with values"),
        ("nproc: 1\nmax_restarts: -1", "c.yaml:2: max_restarts is -1; it must be 0 or more"),
        ("stop_after: 0", "c.yaml:1: stop_after is 0; it must be 1 or more"),
        ("nnodes: 0", "c.yaml:1: nnodes is 0"),
        ("node_rank: x", "c.yaml:1: node_rank is 'x'; it must be an integer"),
        ("rdzv: host", "c.yaml:1: rdzv is 'host'; it must be HOST:PORT"),
        ("rdzv_timeout: -3", "c.yaml:1: rdzv_timeout is -3.0"),
        ("limits: speed=3", "c.yaml:1: limits: "),
        ("mesh: context=2", "c.yaml:1: mesh has context=2, which would be one sequence over several ranks"),
        ("fault: rank=1,explode", "c.yaml:1: fault "),
        ("env: {A: [1]}", "c.yaml:1: env has a list or mapping where one value is expected"),
        ("share_imports: maybe", "c.yaml:1: share_imports is 'maybe'; it must be true or false"),
        ("resume: ''", "c.yaml:1: resume is ''; it must be a text that is not empty"),
        ("nproc: 1\nnproc: 2", "c.yaml:2: nproc is set already, in line 1"),
        ("env:\n  A: 1\n  A: 2", "c.yaml:3: A is set already, in line 2"),
        ("- nproc", "c.yaml:1: expected fields"),
        ("nproc: 1\n  show: all", "c.yaml:2: not YAML: "),
        ("nproc: 'x", "c.yaml:1: not YAML: "),
        ("? [a]\n: b", "c.yaml:1: a field's name must be plain text"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_field(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_all_mistakes_are_named_at_once_each_on_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, "nproc: 0\ngrace: soon\nnams: x\n")
    lines = str(caught.value).splitlines()
    assert [line.split("c.yaml:")[1].split(":")[0] for line in lines] == ["1", "2", "3"]


def test_a_file_that_is_missing_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.yaml cannot be read: No such file"):
        load_settings(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match=r"binary\.yaml cannot be read: it is not UTF-8"):
        load_settings(tmp_path / "binary.yaml")


def test_a_file_may_set_every_setting(tmp_path: Path) -> None:
    text = {
        "nproc": "2", "cpu_processes": "1", "name": "exp", "runs": "/r", "show": "main", "env": "{A: b}", "grace": "1",
        "max_restarts": "1", "stop_after": "1", "nnodes": "2", "node_rank": "0", "rdzv": "h:1", "rdzv_timeout": "9",
        "limits": "step=60", "fault": "rank=1,kill=9", "mesh": "shard=-1", "resume": "auto", "share_imports": "false",
        "take_over": "true", "debug_rank": "0", "preflight": "true", "exclude_ill": "1", "device": "xla",
    }  # fmt: skip
    loaded = load(tmp_path, "\n".join(f"{name}: {value}" for name, value in text.items()))
    assert set(loaded) == {option.name for option in OPTIONS}
    LaunchSettings(**loaded)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_configuration_in_configs_loads(file: Path) -> None:
    assert LaunchSettings(**load_settings(file))


def test_quickstart_uses_two_processes_without_devices() -> None:
    settings = LaunchSettings(**load_settings(ROOT / "configs/quickstart.yaml"))
    assert (settings.nproc, settings.cpu_processes) == ("auto", 2)
