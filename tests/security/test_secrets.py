"""B7: folders and logs are their user's alone, and secrets known by their names are in no report, error or record."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from allstep.errors import ConfigurationError
from allstep.launch.settings import LaunchSettings
from allstep.protocol.masking import is_secret, mask, mask_all, masked_arguments, masked_value, secret_values
from allstep.world.facts import facts_of
from tests.jobs.forked import Script, run_forked
from tests.jobs.launchers import place, script
from tests.jobs.ports import free_port
from tests.jobs.running import run

TOKEN, VARIABLE = "tok-0123456789", "var-0123456789"


SECRETS = """
--api-token HF_TOKEN password db.password AWS_SECRET_ACCESS_KEY WANDB_API_KEY awsSecretAccessKey --key my-secret APIKEY
authtoken DB_PWD passphrase ALLSTEP_KEY
"""


@pytest.mark.parametrize("name", SECRETS.split())
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["--tokenizer", "max_tokens", "keyboard", "monkey", "--lr", "PWD", "KEY_FILE", "secretary", "OLDPWD", "token_dim"],
)
def test_what_is_called_much_like_a_secret_is_none(name: str) -> None:
    assert not is_secret(name)


def test_arguments_keep_their_names_and_lose_their_secrets() -> None:
    given = ["--lr", "1", "--api-token", TOKEN, "--password=x", "db.secret=y", "--key", "--flag", "s3://u:pw@host/x"]
    assert masked_arguments(given) == [
        *("--lr", "1", "--api-token", "***", "--password=***", "db.secret=***", "--key", "--flag"),
        "s3://u:***@host/x",
    ]


def test_values_are_found_and_hidden_wherever_a_text_repeats_them() -> None:
    values = secret_values(["--api-token", TOKEN, "--key=no"], {"HF_TOKEN": VARIABLE, "HOME": "/home/me", "KEY": "abc"})
    assert values == {TOKEN, VARIABLE}
    content = {"what": f"bad {TOKEN}", "frames": [f"{VARIABLE}!", 3], "none": None}
    assert mask_all(content, values) == {"what": "bad ***", "frames": ["***!", 3], "none": None}
    assert mask("abc", ["abc", "abcdef"]) == "***"
    assert mask("abcdef", ["abc", "abcdef"]) == "***"


def test_two_secrets_that_differ_can_be_told_apart_and_not_found_out() -> None:
    one, other = masked_value("token", "a" * 20), masked_value("token", "b" * 20)
    assert one != other
    assert one == masked_value("token", "a" * 20)
    assert len(one) < 12
    assert masked_value("lr", "0.1") == "0.1"


def test_facts_of_ranks_carry_no_secret() -> None:
    facts = facts_of({"config": {"api_key": TOKEN, "lr": 0.1}}, {}, {})
    assert facts["config.lr"] == "0.1"
    assert TOKEN not in facts["config.api_key"]
    assert facts["config.api_key"] != facts_of({"config": {"api_key": "other"}}, {}, {})["config.api_key"]


@pytest.mark.parametrize("env", [{"HF_TOKEN": f"{TOKEN}\0"}, {"ALLSTEP_SECRET": TOKEN}])
def test_an_error_about_a_variable_does_not_repeat_its_secret(env: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        LaunchSettings(env=env)
    assert TOKEN not in str(raised.value)


FAILS = """
from argparse import ArgumentParser
import allstep
with allstep.init(timeout=60):
    raise ValueError(f"cannot log in with {sys.argv[1:]} and {os.environ['HF_TOKEN']} at https://me:pass-word@host/x")
"""


def said_by_allstep(text: str) -> str:
    """The report: the script's own traceback is before it."""
    return text[text.index(" failed: ") :]


@pytest.mark.slow
def test_row_b7_reports_have_no_secret_and_only_their_user_reads_them(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        job = run(
            tmp_path,
            "--name",
            "exp",
            "--nproc",
            "2",
            script(tmp_path, FAILS),
            "--api-token",
            TOKEN,
            env={"HF_TOKEN": VARIABLE},
        )
    finally:
        os.umask(old)
    attempt = tmp_path / "runs" / "exp" / "attempt_0"
    report = (attempt / "failure.json").read_text()
    assert json.loads(report)["cause"]["rank"] in (0, 1)
    for text in (said_by_allstep(job.err), report):
        assert "cannot log in with ['--api-token', '***'] and *** at https://me:***@host/x" in text
        assert not any(each in text for each in (TOKEN, VARIABLE, "pass-word"))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (attempt.parent, attempt, *attempt.iterdir())}
    folders = {"exp": 0o700, "attempt_0": 0o700}
    assert modes == folders | {name: 0o600 for name in modes if name not in folders}
    assert {"rank_0.log", "rank_1.log", "failure.json"} <= set(modes)


@pytest.mark.slow
def test_a_report_without_a_supervisor_has_no_secret(tmp_path: Path) -> None:
    path, port = script(tmp_path, FAILS), free_port()
    places = [place(rank, 2, port, HF_TOKEN=VARIABLE) for rank in (0, 1)]
    ranks = run_forked(tmp_path, *(Script(path, ["--api-token", TOKEN], variables) for variables in places))
    said = "".join(rank.err for rank in ranks)
    report = said_by_allstep(said).partition("Traceback (most")[0]
    assert "cannot log in with ['--api-token', '***'] and ***" in said
    assert TOKEN not in report


def test_errors_of_the_command_line_have_no_secret(tmp_path: Path) -> None:
    job = run(tmp_path, "--name", f"a/{TOKEN}", "train.py", "--api-token", TOKEN)
    assert job.code == 2
    assert "name is 'a/***'" in job.err
    assert TOKEN not in job.err
