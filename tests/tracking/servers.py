"""Servers of tracking tools on this machine: MLflow's and Trackio's own, and one that W&B's client takes for theirs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.ports import free_port
from tests.jobs.processes import await_condition

KEY = "0123456789" * 4  # as long as W&B's keys are


def require_mlflow_server() -> None:
    """Skip the test where MLflow's server is not installed."""
    if any(find_spec(name) is None for name in ("mlflow", "flask", "sqlalchemy")):
        pytest.skip("MLflow's server is in the whole package: pip install mlflow, in place of mlflow-skinny")


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """MLflow's server over a database in a folder; its address."""
    port = free_port() if port is None else port
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", f"{folder}/files"]
    with open(folder / "server.log", "ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        await_condition(lambda: server.poll() is not None or answers(f"{address}/health"), 300)
        assert server.poll() is None, (folder / "server.log").read_text()
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # it has workers, and takes its time with SIGTERM
        server.wait(30)


@contextmanager
def trackio_server(folder: Path) -> Iterator[str]:
    """Trackio's server, whose database is in a folder; its address with the token that lets one write."""
    written = folder / "server.log"
    environment = {**os.environ, "TRACKIO_DIR": str(folder), "BROWSER": "true"}
    with written.open("wb") as log:
        command = [sys.executable, "-m", "trackio.cli", "show"]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        await_condition(lambda: server.poll() is not None or "write_token=" in written.read_text(), 100)
        found = re.search(r"http://[\w.:]+/?\?write_token=[\w-]+", written.read_text())
        assert found is not None, written.read_text()
        yield found[0]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=1):
            return True
    except OSError:
        return False


class WandbServer:
    """What W&B's client needs of a server: it may log in, make runs, and send their lines.

    Attributes:
        address: for WANDB_BASE_URL.
        runs: the configuration of each run, by its id.
        lines: what was sent of each run's series, by its id: each line once, whatever is sent again.
    """

    def __init__(self, port: int = 0) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.lines: dict[str, dict[int, dict[str, Any]]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path.endswith("/file_stream"):
                    outer._take_lines(self.path.split("/")[-2], json.loads(body))
                    self._answer({"exitcode": None, "limits": {}})
                else:
                    self._answer(outer._answer(json.loads(body)) if self.path == "/graphql" else {})

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer({})

            def do_GET(self) -> None:
                self._answer({})

            def _answer(self, content: Any) -> None:
                text = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def series(self, run: str) -> dict[str, list[tuple[int, Any]]]:
        """By name steps and values."""
        found: dict[str, list[tuple[int, Any]]] = {}
        for _, line in sorted(self.lines.get(run, {}).items()):
            for name, value in line.items():
                if not name.startswith("_"):
                    found.setdefault(name, []).append((line["_step"], value))
        return found

    def _take_lines(self, run: str, said: dict[str, Any]) -> None:
        history = (said.get("files") or {}).get("wandb-history.jsonl")
        if history:
            for number, line in enumerate(history["content"]):
                self.lines.setdefault(run, {})[history["offset"] + number] = json.loads(line)

    def _answer(self, asked: dict[str, Any]) -> Any:
        query, variables = asked["query"], asked.get("variables") or {}
        if "UpsertBucket" in query:
            run = variables.get("name") or variables.get("id")
            if variables.get("config"):
                self.runs[run] = json.loads(variables["config"])
            project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "nobody"}}
            bucket = {"id": run, "name": run, "displayName": run, "description": "", "config": "{}", "project": project}
            more = {"sweepName": None, "historyLineCount": len(self.lines.get(run, {}))}
            return {"data": {"upsertBucket": {"bucket": bucket | more, "inserted": run not in self.lines}}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.address}/upload/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}
        if "RunResumeStatus" in query:
            return {"data": {"model": None}}
        if "Viewer" in query or "viewer" in query:
            viewer = {"id": "u", "username": "nobody", "entity": "nobody", "flags": "{}", "teams": {"edges": []}}
            return {"data": {"viewer": viewer}}
        if "ServerFeatures" in query or "serverInfo" in query:
            return {"data": {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}}
        return {"data": {}}
