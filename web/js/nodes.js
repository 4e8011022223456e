// Nodes as the server names them, and the two widgets of the pack that show something: how they come onto a node.

import { app } from "../../../scripts/app.js"

export function make(name, className, parent, text) {
  const made = document.createElement(name)
  if (className) made.className = className
  if (text !== undefined) made.textContent = text
  parent?.append(made)
  return made
}

export const workflowOnScreen = () => (app.rootGraph ?? app.graph)?.id

// the same id means another node in the workflow of another tab
export function isOnScreen(message) {
  const open = workflowOnScreen()
  return !message.workflow || !open || message.workflow === open
}

// "7:3" is node 3 inside the subgraph node 7
export function nodeByExecutionId(id) {
  const path = String(id).split(":")
  let graph = app.rootGraph ?? app.graph
  for (const part of path.slice(0, -1)) graph = graph?.getNodeById(part)?.subgraph ?? graph?.getNodeById(Number(part))?.subgraph
  const last = path.at(-1)
  return graph?.getNodeById(last) ?? graph?.getNodeById(Number(last))
}

// A widget that shows `root` and has no value. The panel beside the graph would take it off its node, and name it by its type.
export function addShown(node, name, root, getMinHeight) {
  const widget = node.addDOMWidget(name, name, root, {
    serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight, getValue: () => "", setValue: () => {},
  })
  widget.serialize = false
  widget.label = ""
  return widget
}

// after: called with what the node's method of this name was called with
export function chain(node, method, after) {
  const before = node[method]
  node[method] = function (...args) {
    const result = before?.apply(this, args)
    after.apply(this, args)
    return result
  }
}
