// QVG Settings: its widgets show the preset's values, which change with it, instead of "preset" and -1. Where Nodes 2.0 folds them, a text
// shows them. Saved graphs and prompts keep "preset" and -1 for every widget that the user has not set.

import { app } from "../../../scripts/app.js"
import { api } from "../../../scripts/api.js"
import { chain } from "./nodes.js"
import { say } from "./strings.js"

const NODE = "QVGSettings"
const NODES_2 = "Comfy.VueNodes.Enabled"
const COUNTS = ["stages", "centroids", "sink_frames", "recent_frames", "window_frames"]
const CHOICES = ["key_bits", "value_bits", "group_size", "sink_bits", "recent_bits", "codec"]
// others have no codebooks
const WITH_CODEBOOKS = ["qvg", "paper"]
const unset = (name) => (COUNTS.includes(name) ? -1 : "preset")

let presets = {}
// what a codec that is not the preset's begins with
let codebooks = {}

class Knobs {
  constructor(node) {
    this.node = node
    this.preset = node.widgets.find((widget) => widget.name === "preset")
    this.knobs = node.widgets.filter((widget) => COUNTS.includes(widget.name) || CHOICES.includes(widget.name))
    // names of the widgets that the user set
    this.own = new Set()
    for (const widget of this.knobs) {
      chain(widget, "callback", () => {
        this.adopt(widget)
        this.show()
      })
      widget.serializeValue = () => this.kept(widget)
    }
    for (const widget of node.widgets) if (!this.knobs.includes(widget)) chain(widget, "callback", () => this.show())
    chain(node, "onConfigure", (data) => {
      for (const widget of this.knobs) {
        // in a graph from before there was this widget
        if (!(node.widgets.indexOf(widget) in (data.widgets_values ?? []))) widget.value = unset(widget.name)
        this.adopt(widget, true)
      }
      this.show()
    })
    chain(node, "onSerialize", (data) => this.write(data))
    this.show()
  }

  // what is not set here
  numbers() {
    const preset = presets[this.preset.value]
    const codec = this.knobs.find(({ name }) => name === "codec")
    return preset && this.own.has("codec") && codec.value !== preset.codec ? { ...preset, ...codebooks } : preset
  }

  // loaded: from a graph, where a value was set even if it equals the preset's
  adopt(widget, loaded = false) {
    const number = this.numbers()?.[widget.name]
    if (widget.value === unset(widget.name) || (!loaded && widget.value === number)) this.own.delete(widget.name)
    else this.own.add(widget.name)
  }

  kept(widget) {
    return this.own.has(widget.name) ? widget.value : unset(widget.name)
  }

  write(data) {
    for (const widget of this.knobs) {
      const place = this.node.widgets.indexOf(widget)
      if (data.widgets_values && place in data.widgets_values) data.widgets_values[place] = this.kept(widget)
      if (data.widgets_values_named && widget.name in data.widgets_values_named)
        data.widgets_values_named[widget.name] = this.kept(widget)
    }
  }

  show() {
    const numbers = this.numbers()
    if (!numbers) return
    for (const widget of this.knobs) if (!this.own.has(widget.name)) widget.value = numbers[widget.name]
    this.node.qvgText?.show(foldsKnobs() ? this.text() : "")
    this.node.setDirtyCanvas?.(true, true)
  }

  text() {
    if (this.preset.value === "Off" && !this.own.size) return say("settingsOff")
    const now = Object.fromEntries(this.node.widgets.map((widget) => [widget.name, widget.value]))
    const lines = [say(WITH_CODEBOOKS.includes(now.codec) ? "settingsOld" : "settingsOldBits", now)]
    if (now.sink_frames) lines.push(say("settingsFirst", now))
    if (now.recent_frames) lines.push(say("settingsRecent", now))
    lines.push(now.window_frames ? say("settingsWindow", now) : say("settingsAll"))
    if (this.own.size) lines.push(say("settingsOwn", { names: this.knobs.filter(({ name }) => this.own.has(name)).map(({ label, name }) => label || name).join(", ") }))
    return lines.join("\n")
  }
}

// the classic canvas shows all of them, and saved graphs have no space below
const foldsKnobs = () => Boolean(app.extensionManager.setting.get(NODES_2))

const refresh = () => allNodes(app.rootGraph ?? app.graph).forEach((node) => node.qvgKnobs?.show())

function allNodes(graph) {
  return (graph?.nodes ?? []).flatMap((node) => [node, ...(node.subgraph ? allNodes(node.subgraph) : [])])
}

app.registerExtension({
  name: "QuantVideoGen.Settings",
  async setup() {
    ({ presets, codebooks } = await (await api.fetchApi("/qvg/presets")).json())
    app.ui.settings.addEventListener(`${NODES_2}.change`, refresh)
    refresh()
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) node.qvgKnobs = new Knobs(node)
  },
  afterConfigureGraph: refresh,
})
