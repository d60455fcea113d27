"""A stand-in for the server of W&B on the loopback interface, which can fall silent, answer 500, or die."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """To be used as a context. `mood`: well, silent (accepts and never answers) or 500; `die` refuses connections."""

    def __init__(self, mood: str = "well") -> None:
        self.mood = mood
        self.logged: list[dict[str, Any]] = []  # lines of history that it was sent
        self.sweep: str = ""  # the text of a sweep.yaml
        self.trials: list[dict[str, Any]] = []  # of that sweep, values by their key, still to be run
        self.states: list[str] = []  # of its trials, as the agent has told
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """From now on nobody listens."""
        self.mood = "silent"
        self.server.shutdown()
        self.server.server_close()

    def environment(self) -> dict[str, str]:
        """The variables that make wandb talk to it."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """What it says to a request."""
        if path.endswith("/file_stream"):
            files = json.loads(body).get("files", {})
            self.logged += map(json.loads, files.get("wandb-history.jsonl", {}).get("content", []))
        if not path.endswith("/graphql"):
            return {}
        asked = json.loads(body)
        given = asked.get("variables", {})
        if "upsertBucket" in asked["query"]:
            project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "somebody"}}
            bucket = {"id": "b", "name": given.get("name"), "displayName": "d", "config": "{}", "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": True}}}
        if "createAgent" in asked["query"]:
            return {"data": {"createAgent": {"agent": {"id": "a"}}}}
        if "agentHeartbeat" in asked["query"]:
            return {"data": {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(self._commands(given))}}}
        if "sweep(" in asked["query"]:
            sweep = {"id": "s", "name": "s", "state": "RUNNING", "config": self.sweep, "method": "grid"}
            sweep["runs"] = {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}
            return {"data": {"project": {"sweep": sweep}}}
        if "viewer" in asked["query"]:
            return {"data": {"viewer": {"id": "v", "entity": "somebody", "username": "somebody", "flags": "{}"}}}
        if "createRunFiles" in asked["query"]:
            files = [{"name": name, "uploadUrl": f"{self.url}/put"} for name in given["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def _commands(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        """What an agent is to do next: one trial at a time, then to end."""
        running = json.loads(given["runState"])
        if running:
            return []
        if not self.trials:
            return [{"type": "exit"}]
        values = {key: {"value": value} for key, value in self.trials.pop(0).items()}
        return [{"type": "run", "run_id": f"t{len(self.trials)}", "program": "train.py", "args": values}]


def _handler(of: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            while of.mood == "silent":
                time.sleep(0.1)
            content = json.dumps(of.answer(self.path, body) if of.mood == "well" else {}).encode()
            self.send_response(200 if of.mood == "well" else 500)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = respond  # noqa: N815  as http.server calls them

        def log_message(self, *_: object) -> None:
            pass

    return Handler
