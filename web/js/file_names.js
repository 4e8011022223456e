// File names of this pack's nodes take the tokens of core's save nodes, such as %date:yyyy-MM-dd% and %KSampler.seed%: the page fills them in
// when a graph is sent. What is left of them the server refuses (nodes/outputs.py).

import { app } from "../../../scripts/app.js"
import { chain } from "./nodes.js"

const FILE_NAMES = { QVGStreamVideo: "filename_prefix", QVGLongCatContinue: "stream_to" }

app.registerExtension({
  name: "QVG.FileNames",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const name = FILE_NAMES[nodeData.name]
    if (!name) return
    chain(nodeType.prototype, "onNodeCreated", function () {
      const widget = this.widgets?.find(widget => widget.name === name)
      const fill = window.comfyAPI?.utils?.applyTextReplacements
      if (widget && fill) widget.serializeValue = () => fill(app, String(widget.value ?? ""))
    })
  },
})
