"""The way from a sampling run to the monitors on the screen: one event, and one route for a page that comes later.

Nodes are named by execution id ("7:3" is node 3 inside the subgraph node 7), and a message says which workflow it belongs to, because
the same id means another node in another tab. Nothing is polled and no thread is started: the run itself sends.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from server import PromptServer

EVENT = "qvg.memory"
ROUTE = "/qvg/memory"
RUNS_KEPT = 16

_latest: OrderedDict[tuple[str, str], object] = OrderedDict()


@dataclass
class Watched:
    """Who watches a run. run: changes with each run; workflow: id of the graph on the screen, "" where a script queued it."""

    nodes: tuple[str, ...] = ()
    workflow: str = ""
    run: str = ""


def watch(log, source: str | None, monitors: Callable[[dict], list[str]]) -> Watched:
    """Find the monitors of the node `source` in the graph being executed, and remember the log for pages that ask later.

    Asked at sampling time, because a cached node does not see what was added to the graph since.
    """
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    for item in queue.get_current_queue_volatile()[0] if queue is not None else ():
        _, prompt_id, graph, extra = item[:4]
        nodes = monitors(graph)
        if nodes:
            workflow = (extra.get("extra_pnginfo") or {}).get("workflow") or {}
            watched = Watched(tuple(nodes), str(workflow.get("id", "")), f"{prompt_id}/{source}/{time.monotonic_ns()}")
            _latest.pop((watched.workflow, *nodes[:1]), None)
            _latest[watched.workflow, nodes[0]] = log
            while len(_latest) > RUNS_KEPT:
                _latest.popitem(last=False)
            return watched
    return Watched()


def address(watched: Watched) -> dict:
    return {"nodes": watched.nodes, "workflow": watched.workflow, "run": watched.run}


def send(watched: Watched, state: dict) -> None:
    PromptServer.instance.send_sync(EVENT, address(watched) | state)


async def answer(request: web.Request) -> web.Response:
    """The latest runs whole, for a page that was opened or refreshed after they began; ?workflow=ID gives those of one graph."""
    wanted = request.query.get("workflow")
    runs = [log for (workflow, _), log in _latest.items() if wanted in (None, workflow)]
    return web.json_response({"runs": [address(log.watched) | log.page() for log in runs]})


def add_route() -> None:
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get(ROUTE)(answer)
