"""ComfyUI's HTTP and websocket interface, as a test wants it.

`run` queues a graph in API format and returns what its output nodes left in the history; a graph that is refused or
fails raises `ComfyError` with the node's own sentence. Meanwhile a thread collects the websocket's messages: JSON
ones as they are, binary ones decoded into the same shape (types "preview", "text").
"""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4
PATIENCE = 600  # seconds, for what takes a few where no other process has the cores


class ComfyError(RuntimeError):
    """A graph that ComfyUI refused or could not finish; `details` is the server's own record.

    `interrupted` is true when the run ended because somebody asked for it.
    """

    def __init__(self, text: str, details: dict, interrupted: bool = False):
        super().__init__(text)
        self.details = details
        self.interrupted = interrupted


@dataclass(frozen=True)
class Message:
    """One websocket message: `at` is time.monotonic(), `data` a dict, `size` its bytes as they came."""

    type: str
    data: dict
    size: int = 0
    at: float = field(default_factory=time.monotonic)


class ComfyClient:
    def __init__(self, url: str, output: Path):
        self.url = url
        self.output = output
        self.client_id = uuid.uuid4().hex
        self.messages: list[Message] = []
        self._connected = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._listen(),), daemon=True)
        self._thread.start()
        if not self._connected.wait(PATIENCE):
            raise TimeoutError(f"no websocket at {url} within {PATIENCE} s")

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._listener.cancel)
        self._thread.join(10)

    # -- graphs

    def run(self, prompt: dict, timeout: float = PATIENCE) -> dict:
        """Queues `prompt` and waits: {node id: {output name: [...]}} of its output nodes."""
        return self.wait(self.submit(prompt), timeout)

    def submit(self, prompt: dict, **extra) -> str:
        """Queues `prompt` (API format) and returns its id without waiting. extra: what a frontend sends beside it (extra_data)."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.client_id, "extra_data": extra})["prompt_id"]
        except urllib.error.HTTPError as refusal:
            details = json.loads(refusal.read())
            raise ComfyError(_refusal_text(details), details) from None

    def wait(self, prompt_id: str, timeout: float = PATIENCE) -> dict:
        """The history outputs of a queued prompt, once it has ended and its messages have come."""
        entry = self.wait_until(lambda: self.history(prompt_id), timeout, f"prompt {prompt_id}")
        # the last message of a run comes after its history: from here on `messages` is complete
        self.wait_for("executing", lambda data: data["node"] is None and data["prompt_id"] == prompt_id)
        for kind, details in entry["status"]["messages"]:
            if kind == "execution_error":
                where = f"{details['node_type']} (node {details['node_id']})"
                raise ComfyError(f"{where}: {details['exception_type']}: {details['exception_message']}", details)
            if kind == "execution_interrupted":
                raise ComfyError("interrupted", details, interrupted=True)
        return entry["outputs"]

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self) -> None:
        """Asks the server to unload models and drop its caches; it does so when its queue next wakes."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    # -- state

    def object_info(self, node: str = "") -> dict:
        return self.get(self.url + "/object_info" + (f"/{node}" if node else ""))

    def history(self, prompt_id: str) -> dict | None:
        return self.get(f"{self.url}/history/{prompt_id}").get(prompt_id)

    def queue(self) -> dict:
        """{"queue_running": [...], "queue_pending": [...]}"""
        return self.get(self.url + "/queue")

    def output_path(self, item: dict) -> Path:
        """Where a file lies that an output names: {"filename", "subfolder", "type"}."""
        folder = self.output if item["type"] == "output" else self.output.parent / item["type"]
        return folder / item["subfolder"] / item["filename"]

    # -- messages

    def of_type(self, kind: str, since: int = 0) -> list[dict]:
        """The data of all messages of this type, from the `since`-th message on."""
        return [message.data for message in self.messages[since:] if message.type == kind]

    def wait_for(self, kind: str, where=lambda data: True, timeout: float = PATIENCE, since: int = 0) -> dict:
        """The first message of this type for which `where(data)` holds, waited for if it has not come yet."""
        return self.wait_until(
            lambda: next(filter(where, self.of_type(kind, since)), None), timeout, f"a {kind} message"
        )

    @staticmethod
    def wait_until(ask, timeout: float, what: str):
        """Calls `ask` until its answer is true, and returns the answer."""
        deadline = time.monotonic() + timeout
        while not (answer := ask()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout:g} s for {what}")
            time.sleep(0.05)
        return answer

    # -- transport

    @staticmethod
    def get(url: str, timeout: float = PATIENCE):
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    async def _listen(self) -> None:
        import aiohttp  # one of ComfyUI's requirements: where they are missing, this module is imported all the same

        self._listener = asyncio.current_task()
        try:
            async with aiohttp.ClientSession() as session:
                await self._collect(session)
        except asyncio.CancelledError:
            pass

    async def _collect(self, session) -> None:
        async with session.ws_connect(f"{self.url}/ws?clientId={self.client_id}", max_msg_size=0) as socket:
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            async for raw in socket:
                message = _decode(raw)
                if message is not None:
                    size = len(raw.data.encode() if isinstance(raw.data, str) else raw.data)
                    message = replace(message, size=size)
                    self.messages.append(message)
                    # the server's answer to the flags: from here on previews carry metadata
                    if message.type == "feature_flags":
                        self._connected.set()


def _decode(raw) -> Message | None:
    """raw: an aiohttp.WSMessage. None: it is of a kind that ComfyUI does not send."""
    from aiohttp import WSMsgType

    if raw.type == WSMsgType.TEXT:
        message = json.loads(raw.data)
        return Message(message["type"], message.get("data") or {})
    if raw.type != WSMsgType.BINARY:
        return None
    (kind,) = struct.unpack(">I", raw.data[:4])
    if kind == TEXT:
        node, text = _split(raw.data[4:])
        return Message("text", {"node": node.decode(), "text": text.decode()})
    if kind == PREVIEW_WITH_METADATA:
        metadata, image = _split(raw.data[4:])
        return Message("preview", {**json.loads(metadata), "image": image})
    if kind == PREVIEW:
        return Message("preview", {"image": raw.data[8:]})
    return Message(f"binary {kind}", {"bytes": raw.data[4:]})


def _split(data: bytes) -> tuple[bytes, bytes]:
    """A part with its length (4 bytes, big endian) in front, and the rest."""
    (length,) = struct.unpack(">I", data[:4])
    return data[4 : 4 + length], data[4 + length :]


def _refusal_text(details: dict) -> str:
    """The sentences of a 400 answer: the graph's own error, then one for each node."""
    error = details.get("error") or {}
    lines = [f"{error.get('message', '')} {error.get('details', '')}".strip()]
    for node, refusal in details.get("node_errors", {}).items():
        for item in refusal["errors"]:
            lines.append(f"{refusal['class_type']} (node {node}): {item['message']}: {item['details']}")
    return "\n".join(lines)


class Graph(dict):
    """A graph in API format that grows node by node; `add` returns the link to the node's first output."""

    def add(self, node, kind, /, **inputs):
        self[node] = {"class_type": kind, "inputs": inputs}
        return [node, 0]
