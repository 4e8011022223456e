// Text on a node: from an event while another node runs ("qvg.text", nodes/live.py), and from the UI output at its own end. The frontend's
// progress text disappears when a run ends, so the pack draws its own, on the classic canvas and in Nodes 2.0.

import { app } from "../../../scripts/app.js"
import { api } from "../../../scripts/api.js"
import { addShown, chain, isOnScreen, make, nodeByExecutionId } from "./nodes.js"
import { say } from "./strings.js"

const STYLE = `
.qvg-text { box-sizing: border-box; height: 100%; overflow: auto; color: var(--input-text, #ddd); font: 12px/1.45 system-ui, sans-serif;
  user-select: text; cursor: text; }
.qvg-text > p { margin: 0; padding: 4px 6px; white-space: pre-wrap; overflow-wrap: break-word; word-break: normal; hyphens: none; }
`
// in pixels; MARGIN is what the frontend leaves above and below a DOM widget
const LINE = 18, MARGIN = 10

// in Nodes 2.0 the height of a node follows its content
const laysOutItself = () => Boolean(globalThis.LiteGraph?.vueNodesMode)

export class Text {
  constructor(node) {
    this.node = node
    this.root = null
    this.height = 0
  }

  show(text) {
    if (!this.root && !text) return
    if (!this.root) this.build()
    this.shown.textContent = text
    this.shown.hidden = !text
    // an estimate until it is laid out
    this.height = text ? Math.max(this.height, 8 + LINE * text.split("\n").length) : 0
    this.fit()
  }

  build() {
    this.root = make("div", "qvg-text")
    this.root.setAttribute("role", "status")
    this.shown = make("p", "", this.root)
    addShown(this.node, "qvg_text", this.root, () => (this.height && !laysOutItself() ? this.height + 2 * MARGIN : 0))
    this.sizes = new ResizeObserver(() => this.fit())
    this.sizes.observe(this.shown)
    chain(this.node, "onRemoved", () => this.sizes.disconnect())
  }

  // A node grows with its text, and keeps a larger size that the user gave it.
  fit() {
    // an invisible element has no size
    if (this.shown.offsetHeight) this.height = this.shown.offsetHeight
    const { node } = this
    node.setDirtyCanvas?.(true, true)
    if (laysOutItself()) return
    const least = node.computeSize()[1]
    if (node.size[1] < least) node.setSize([node.size[0], least])
  }
}

export function showText({ node, text, ...message }) {
  if (isOnScreen(message)) nodeByExecutionId(node)?.qvgText?.show(text)
}

function tellPartial(message) {
  if (!isOnScreen(message)) return
  app.extensionManager.toast.add({ severity: "info", summary: say("partialTitle"), detail: say("partial", message), life: 15000 })
}

app.registerExtension({
  name: "QuantVideoGen.Text",
  init() {
    make("style", "", document.head, STYLE)
  },
  setup() {
    api.addEventListener("qvg.text", ({ detail }) => showText(detail))
    api.addEventListener("qvg.partial", ({ detail }) => tellPartial(detail))
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("QVG")) return
    node.qvgText = new Text(node)
    chain(node, "onExecuted", (output) => {
      if (output?.qvg_text) node.qvgText.show(output.qvg_text.join("\n"))
    })
  },
})
