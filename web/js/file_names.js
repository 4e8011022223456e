// File names of this pack's nodes may have the tokens of ComfyUI's save nodes, such as %date:yyyy-MM-dd% and %KSampler.seed%. The page
// replaces them when a graph is sent; the server refuses those that remain (nodes/outputs.py).

import { app } from "../../../scripts/app.js"
import { chain } from "./nodes.js"

const FILE_NAMES = { QVGStreamVideo: "filename_prefix", QVGLongCatContinue: "stream_to", QVGWorldWalk: "stream_to" }

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
