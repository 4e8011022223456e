"""The node of the executing graph that samples, and the nodes that its run reports to.

Looked up when sampling begins. ComfyUI caches a node's output while its inputs stay the same, whatever its id, and two nodes with the same
inputs share one output. So an id stored when a node was executed may belong to an earlier graph, or to another tab.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from comfy_execution.utils import get_executing_context
from server import PromptServer

MONITOR = "QVGMemoryMonitor"
QUANTIZE = "QVGQuantizeKVCache"
SAMPLER = "QVGARVideoSampler"
# output types by which a model reaches the node that samples; "*" is the type of nodes that pass anything through
MODEL_WAYS = {"MODEL", "GUIDER", "*"}
SAMPLER_WAYS = {"SAMPLER", "*"}


@dataclass(frozen=True)
class Place:
    """node: the one being executed; graph: {id: {"class_type", "inputs"}}, ids such as "7:3" in subgraphs; workflow: id of the graph on the
    page, "" if a script queued it."""

    prompt: str
    node: str
    graph: dict
    workflow: str


def here() -> Place | None:
    """The node that ComfyUI is executing; None outside an execution."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    queue = getattr(server, "prompt_queue", None)
    for item in queue.get_current_queue_volatile()[0] if queue is not None else ():
        _, prompt, graph, extra = item[:4]
        # there is no context in the thread of a pack that samples in its own
        node = getattr(server, "last_node_id", None) if context is None else context.node_id
        if node is not None and (context is None or context.prompt_id == prompt):
            workflow = (extra.get("extra_pnginfo") or {}).get("workflow") or {}
            return Place(prompt, in_graph(graph, str(node)), graph, str(workflow.get("id", "")))
    return None


def in_graph(graph: dict, node: str) -> str:
    """The id of a node in the queued graph. Nodes that a loop creates at run time are named "loop.number.original"."""
    return next((name for name in (node, node.rpartition(".")[2], node.partition(".")[0]) if name in graph), node)


def upstream(graph: dict, node: str, ways: set[str] | None = None, last: str = "", through: str = "") -> list[str]:
    """Ids of the nodes that `node` depends on, nearest first, without itself.

    ways: output types to follow; None follows all. last: the search does not go beyond nodes of this class. through: the only input of
    `node` to start from.
    """
    found, waiting = {}, deque([node])
    while waiting:
        at = waiting.popleft()
        for name, link in graph.get(at, {}).get("inputs", {}).items():
            if not _is_link(link) or (through and at == node and name != through):
                continue
            source = str(link[0])
            if source in found or source not in graph or not _gives(graph[source]["class_type"], link[1], ways):
                continue
            found[source] = None
            if graph[source]["class_type"] != last:
                waiting.append(source)
    return list(found)


def quantizer_of(place: Place, made_by: str | None = None) -> str | None:
    """The Quantize KV Cache (QVG) whose MODEL the executing node samples with. made_by: the id that made it when it was executed, preferred
    if there are several."""
    def reached(node: str) -> list[str]:
        # the model may also come through a pack's own type
        for ways in (MODEL_WAYS, None):
            if found := [name for name in upstream(place.graph, node, ways, last=QUANTIZE)
                         if place.graph[name]["class_type"] == QUANTIZE]:
                return found
        return []

    found = reached(place.node)
    return made_by if made_by in found else next(iter(found), None)


def sampler_of(place: Place, made_by: str | None = None) -> str | None:
    """The AR Video Sampler (QVG) whose SAMPLER the executing node uses."""
    found = [name for name in upstream(place.graph, place.node, SAMPLER_WAYS, last=SAMPLER)
             if place.graph[name]["class_type"] == SAMPLER]
    return made_by if made_by in found else next(iter(found), None)


def monitors_of(graph: dict, source: str | None, executing: str | None = None) -> list[str]:
    """Ids of the monitors whose model comes, directly or through others, from the node `source` or from one with the same inputs, which has
    the same MODEL. If some of them wait for the latent of the `executing` node, only those."""
    alike: dict[str, object] = {}
    if source not in graph:
        return []
    same = {name for name, node in graph.items() if node.get("class_type") == graph[source].get("class_type")
            and _signature(graph, name, alike) == _signature(graph, source, alike)}
    found = [name for name, node in graph.items()
             if node.get("class_type") == MONITOR and not same.isdisjoint(upstream(graph, name, through="model"))]
    return [name for name in found if executing in upstream(graph, name, through="samples")] or found


def _is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def _gives(class_type: str, slot: int, ways: set[str] | None) -> bool:
    """Whether this output of a node class has one of the types."""
    if ways is None:
        return True
    import nodes  # ComfyUI's; here, because this module is also imported without ComfyUI's nodes

    types = getattr(nodes.NODE_CLASS_MAPPINGS.get(class_type), "RETURN_TYPES", ())
    name = str(types[slot]) if slot < len(types) else "*"
    return name in ways or ("*" in ways and name.startswith("COMFY_MATCHTYPE"))


def _signature(graph: dict, node: str, known: dict) -> tuple:
    """Equal for nodes whose outputs ComfyUI shares: the class and all inputs, recursively."""
    if node not in known:
        known[node] = ()
        known[node] = graph.get(node, {}).get("class_type"), *(
            (name, (_signature(graph, str(value[0]), known), value[1]) if _is_link(value) else repr(value))
            for name, value in sorted(graph.get(node, {}).get("inputs", {}).items()))
    return known[node]
