// Nodes by the ids that the server uses, and helpers for the widgets of the pack.

import { app } from "../../../scripts/app.js"

export function make(name, className, parent, text) {
  const made = document.createElement(name)
  if (className) made.className = className
  if (text !== undefined) made.textContent = text
  parent?.append(made)
  return made
}

export const workflowOnScreen = () => (app.rootGraph ?? app.graph)?.id

// in the workflow of another tab, the same id is another node
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

// A widget that shows `root` and has no value. It is hidden in the side panel, which would move it away from its node.
export function addShown(node, name, root, getMinHeight) {
  const widget = node.addDOMWidget(name, name, root, {
    serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight, getValue: () => "", setValue: () => {},
  })
  widget.serialize = false
  widget.label = ""
  return widget
}

// after: called after the node's method of this name, with the same arguments
export function chain(node, method, after) {
  const before = node[method]
  node[method] = function (...args) {
    const result = before?.apply(this, args)
    after.apply(this, args)
    return result
  }
}
