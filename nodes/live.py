"""Messages from a run to the nodes on the page: events, and one route for a page that is opened later.

    qvg.memory   state of a cache and its chart, to the monitors that watch it
    qvg.text     text on one node, while another is executed
    qvg.partial  a run was stopped, and the graph continues with the finished frames

Nodes are named by execution id ("7:3" is node 3 inside the subgraph node 7). A message names its workflow, because the same id is another
node in another tab. Nothing is polled and no thread is started: the run sends. The server's thread answers pages while the run's thread
adds to the data, hence the lock.

A node's final text is in its UI output under `TEXT`, which ComfyUI sends, keeps, and sends again when the node is cached.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from aiohttp import web
from server import PromptServer

from .where import Place

EVENT = "qvg.memory"
TEXT_EVENT = "qvg.text"
PARTIAL_EVENT = "qvg.partial"
ROUTE = "/qvg/memory"
# keys of a node's UI output
REPORT, TEXT = "qvg_memory", "qvg_text"
RUNS_KEPT, TEXTS_KEPT, PROMPTS_READ = 16, 256, 200

_lock = threading.Lock()
_runs: OrderedDict[tuple[str, str], object] = OrderedDict()
_texts: OrderedDict[tuple[str, str], str] = OrderedDict()


@dataclass(frozen=True)
class Watched:
    """The monitors that watch a run. run: unique per run; workflow: as in `Place`."""

    nodes: tuple[str, ...] = ()
    workflow: str = ""
    run: str = ""


def keep(run) -> None:
    """Keep a run (`run_log.Run`) for pages that are opened later; each monitor has its latest."""
    with _lock:
        for node in run.watched.nodes:
            _runs.pop((run.watched.workflow, node), None)
            _runs[run.watched.workflow, node] = run
        while len(_runs) > RUNS_KEPT:
            _runs.popitem(last=False)


def address(watched: Watched) -> dict:
    return {"nodes": watched.nodes, "workflow": watched.workflow, "run": watched.run}


def send(watched: Watched, state: dict) -> None:
    PromptServer.instance.send_sync(EVENT, address(watched) | state)


def write(place: Place | None, node: str | None, text: str) -> None:
    """Show a text on a node of the executing graph; an empty one removes it."""
    if place is None or node is None:
        return
    key = place.workflow, node
    with _lock:
        _texts.pop(key, None)
        if text:
            _texts[key] = text
        while len(_texts) > TEXTS_KEPT:
            _texts.popitem(last=False)
    PromptServer.instance.send_sync(TEXT_EVENT, {"node": node, "workflow": place.workflow, "text": text})


def forget(place: Place | None, node: str | None) -> None:
    """Forget a node's text, which from now on is in its UI output."""
    if place is not None:
        with _lock:
            _texts.pop((place.workflow, node), None)


def tell_partial(place: Place | None, done: int, total: int) -> None:
    """Announce that the graph continues with `done` of `total` latent frames of a stopped run."""
    if place is not None:
        PromptServer.instance.send_sync(PARTIAL_EVENT, {"workflow": place.workflow, "done": done, "total": total})


async def answer(request: web.Request) -> web.Response:
    """The latest runs and texts, complete, for a page that was opened or refreshed after they began; ?workflow=ID selects one graph."""
    wanted = request.query.get("workflow")
    texts, runs = _executed(wanted)
    with _lock:
        kept = list(_runs.items())
        texts |= {key: text for key, text in _texts.items() if wanted in (None, key[0])}
    latest = {run.watched.run: run for (workflow, _), run in kept if wanted in (None, workflow)}
    live = [address(run.watched) | run.page() for run in latest.values()]
    shown = {(run["workflow"], node) for run in live for node in run["nodes"]}
    live += [run for key, run in runs.items() if key not in shown]
    return web.json_response({
        "runs": live, "texts": [{"workflow": workflow, "node": node, "text": text} for (workflow, node), text in texts.items()]})


def _executed(wanted: str | None) -> tuple[dict, dict]:
    """Texts and reports of monitors in ComfyUI's history, by workflow and node. It also has cached nodes under their current ids."""
    texts, runs = {}, {}
    history = PromptServer.instance.prompt_queue.get_history(max_items=PROMPTS_READ)
    for prompt_id, entry in history.items():
        extra = entry["prompt"][3] if len(entry.get("prompt", ())) > 3 else {}
        workflow = str(((extra.get("extra_pnginfo") or {}).get("workflow") or {}).get("id", ""))
        if wanted not in (None, workflow):
            continue
        for node, output in entry.get("outputs", {}).items():
            if TEXT in output:
                texts[workflow, node] = output[TEXT][0]
            if REPORT in output:
                runs[workflow, node] = output[REPORT][0] | {"nodes": [node], "workflow": workflow, "run": f"{prompt_id}/{node}"}
    return texts, runs


def add_route() -> None:
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get(ROUTE)(answer)
