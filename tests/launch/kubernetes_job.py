"""What `launch/kubernetes.yaml` says, as tests read it: the command of its pods, and what follows a pod's end."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import yaml

from tests.jobs.launchers import ROOT

FILE = ROOT / "launch" / "kubernetes.yaml"


@cache
def objects() -> dict[str, Any]:
    """The objects of the file by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(FILE.read_text())}


def job() -> dict[str, Any]:
    """The Job's specification."""
    return objects()["Job"]["spec"]


def pod() -> dict[str, Any]:
    """The specification of its pods."""
    return job()["template"]["spec"]


def container() -> dict[str, Any]:
    """The only container of a pod."""
    (only,) = pod()["containers"]
    return only


def line() -> list[str]:
    """The command of a pod with its arguments."""
    return [*container()["command"], *container()["args"]]


def pod_name(index: int) -> str:
    """The host name that the Job gives to a pod."""
    return f"{objects()['Job']['metadata']['name']}-{index}"


def after(code: int, *, disrupted: bool = False) -> Literal["FailJob", "Ignore", "Count"]:
    """What the Job does when a pod has failed with an exit code, or was taken: the first rule that fits."""
    for rule in job()["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes is not None and codes["operator"] == "In" and code in codes["values"]:
            return rule["action"]
        if disrupted and any(each["type"] == "DisruptionTarget" for each in rule.get("onPodConditions", ())):
            return rule["action"]
    return "Count"
