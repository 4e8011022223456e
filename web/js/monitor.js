// KV Memory Monitor (QVG): the node's widget. A sampling run sends the state of its cache ("qvg.memory", nodes/live.py); after a refresh the
// page requests the earlier messages once. Nothing is polled.

import { app } from "../../../scripts/app.js"
import { api } from "../../../scripts/api.js"
import { continued, drawChart, legendOf, nameOf } from "./chart.js"
import { addShown, chain, isOnScreen, make, nodeByExecutionId, workflowOnScreen } from "./nodes.js"
import { showText } from "./text.js"
import { bytes, loadStrings, say } from "./strings.js"

const MONITOR = "QVGMemoryMonitor"

const STYLE = `
.qvg-monitor { box-sizing: border-box; height: 100%; overflow: auto; padding: 8px 10px; font: 12px/1.45 system-ui, sans-serif;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); border-radius: 6px; display: flex; flex-direction: column; }
.qvg-monitor > * { flex: none; }
.qvg-monitor > [hidden] { display: none; }
.qvg-monitor:focus-visible, .qvg-monitor summary:focus-visible { outline: 2px solid #4c8dff; outline-offset: -2px; }
.qvg-monitor p { margin: 0; }
.qvg-monitor .qvg-head { display: flex; gap: 0 20px; align-items: baseline; flex-wrap: wrap; }
.qvg-monitor .qvg-ratio { font-size: 24px; font-weight: 700; margin-right: 6px; }
.qvg-monitor .qvg-faint, .qvg-monitor dt { color: color-mix(in srgb, var(--input-text, #ddd) 72%, var(--comfy-input-bg, #222)); }
.qvg-monitor .qvg-spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.qvg-monitor .qvg-plot { flex: 1 0 150px; min-height: 0; margin: 6px 0; overflow: hidden; }
.qvg-chart { display: block; }
.qvg-chart text { fill: color-mix(in srgb, var(--input-text, #ddd) 72%, var(--comfy-input-bg, #222)); font-size: 11px; }
.qvg-chart .qvg-grid { stroke: var(--border-color, #4e4e4e); stroke-width: 0.6; }
.qvg-chart .qvg-line { fill: none; stroke-width: 2; }
.qvg-chart .qvg-dashed { stroke-dasharray: 5 4; opacity: 0.8; }
.qvg-monitor .qvg-legend { display: flex; gap: 3px 12px; flex-wrap: wrap; list-style: none; margin: 0 0 8px; padding: 0; }
.qvg-legend i { display: inline-block; width: 10px; height: 10px; margin-right: 5px; border-radius: 2px; }
.qvg-legend i[class] { height: 0; border-width: 2px 0 0; border-style: solid; border-radius: 0; vertical-align: middle; width: 14px; }
.qvg-legend i.qvg-dashed { border-style: dashed; }
.qvg-monitor dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 4px 14px; margin: 0 0 6px; }
.qvg-monitor dd { margin: 0; font-variant-numeric: tabular-nums; }
.qvg-monitor summary { cursor: pointer; }
`

function pair(list, name, text) {
  const both = make("div", "", list)
  make("dt", "", both, name)
  make("dd", "", both, text)
}

class Monitor {
  // elements are made once and updated, so that focus, an open list and the scroll position stay while a model samples
  constructor(node) {
    this.root = make("div", "qvg-monitor")
    this.root.setAttribute("role", "group")
    this.root.setAttribute("aria-label", node.title || "KV Memory Monitor (QVG)")
    this.root.tabIndex = 0
    const head = make("div", "qvg-head", this.root)
    this.ratios = ["ratio", "ratioPeak"].map((name) => {
      const both = make("span", "", head)
      return { name, figure: make("span", "qvg-ratio", both), caption: make("span", "qvg-faint", both) }
    })
    this.instead = make("p", "", this.root)
    this.status = make("p", "qvg-faint qvg-status", this.root)
    // announced by screen readers when a run begins and ends, not at every chunk
    this.spoken = make("p", "qvg-spoken", this.root)
    this.spoken.setAttribute("role", "status")
    this.plot = make("div", "qvg-plot", this.root)
    this.legend = make("ul", "qvg-legend", this.root)
    this.figures = make("dl", "", this.root)
    this.attention = make("p", "qvg-faint qvg-attention", this.root)
    this.layers = make("details", "", this.root)
    this.summary = make("summary", "", this.layers)
    this.layerList = make("dl", "", this.layers)
    this.layers.addEventListener("toggle", () => this.drawLayers())
    // a wheel over the node scrolls it only where there is something to scroll
    this.root.addEventListener("wheel", (event) => {
      if (this.root.scrollHeight > this.root.clientHeight) event.stopPropagation()
    }, { passive: true })
    this.state = null
    this.waiting = 0
    addShown(node, "qvg_memory", this.root, () => 340)
    this.sizes = new ResizeObserver(() => this.drawPlot())
    this.sizes.observe(this.plot)
    chain(node, "onRemoved", () => {
      this.sizes.disconnect()
      clearTimeout(this.waiting)
    })
    this.draw()
  }

  // message: a whole report, or an event that continues one with further points
  take(message) {
    const before = this.state && (!message.run || this.state.run === message.run) ? this.state.chart : null
    this.state = { ...message, run: message.run ?? this.state?.run, chart: continued(before, message.chart) }
    if (message.ended) return this.draw()
    const wait = 1000 / (app.extensionManager.setting.get("QVG.Monitor.Rate") || 4)
    this.waiting ||= setTimeout(() => this.draw(), wait - 10)
  }

  draw() {
    clearTimeout(this.waiting)
    this.waiting = 0
    const { state } = this
    const now = state?.now
    const done = now?.frames ?? 0
    const phase = !state ? "idle" : !state.ended ? "sampling" : done < state.latent_frames ? "stopped" : "done"
    for (const { name, figure, caption } of this.ratios) {
      figure.textContent = now ? `${(name === "ratio" ? now.ratio : now.peak_ratio).toFixed(1)}x` : ""
      caption.textContent = now ? say(name) : ""
    }
    this.instead.textContent = now ? say("instead", { stored: bytes(now.stored_bytes), bf16: bytes(now.bf16_bytes) }) : ""
    this.status.textContent = say(phase, { done, total: state?.latent_frames })
    if (this.root.dataset.phase !== phase && this.root.dataset.phase) this.spoken.textContent = this.status.textContent
    this.root.dataset.phase = phase
    this.root.dataset.stored = now?.stored_bytes ?? 0
    this.summary.textContent = say("layers")
    for (const part of [this.legend, this.figures, this.layers]) part.hidden = !now
    this.attention.hidden = !now?.attention
    this.drawPlot()
    if (!now) return
    this.drawLegend(state)
    this.drawFigures(state, now)
    this.attention.textContent = now.attention ? say("attention", { chosen: now.attention }) : ""
    this.drawLayers()
  }

  drawPlot() {
    const { clientWidth, clientHeight } = this.plot
    // a node that is not visible has no size
    if (!this.state) return this.plot.replaceChildren()
    this.plot.replaceChildren(drawChart(this.state.chart, this.state.now, clientWidth || 520, clientHeight || 200))
  }

  drawLegend({ chart }) {
    this.legend.replaceChildren()
    for (const series of legendOf(chart)) {
      const item = make("li", "", this.legend)
      const isLine = chart.lines.includes(series)
      const mark = make("i", isLine ? `qvg-line${series.dashed ? " qvg-dashed" : ""}` : "", item)
      mark.style[isLine ? "borderColor" : "background"] = series.colour
      item.append(nameOf(series))
    }
  }

  drawFigures(state, now) {
    const { forecast } = state
    this.figures.replaceChildren()
    pair(this.figures, say("peak"), `${bytes(now.peak_bytes)} (${now.peak_ratio.toFixed(1)}x)`)
    if (forecast)
      pair(this.figures, say("forecast"), say("forecastValue", { stored: bytes(forecast.stored_bytes), peak: bytes(forecast.peak_bytes) }))
    if (now.host_bytes) pair(this.figures, say("host"), bytes(now.host_bytes))
    pair(this.figures, say("held"), say("heldValue", { frames: now.held_frames, tokens: now.tokens }))
    pair(this.figures, say("bits"), now.bits_per_element.toFixed(2))
    if (state.device !== "cpu") pair(this.figures, say("free", { device: state.device }), bytes(state.free_bytes))
    pair(this.figures, say("freeHost"), bytes(state.free_host_bytes))
    pair(this.figures, say("budget"), state.budget_bytes ? bytes(state.budget_bytes) : say("none"))
  }

  drawLayers() {
    if (!this.layers.open || !this.state?.now) return
    this.layerList.replaceChildren()
    this.state.now.by_layer.forEach((count, number) => pair(this.layerList, say("layer", { number }), bytes(count)))
  }
}

function deliver(message) {
  if (!isOnScreen(message)) return
  for (const id of message.nodes) nodeByExecutionId(id)?.qvgMonitor?.take(message)
}

function warnUnderPressure(message) {
  const need = message.forecast?.peak_bytes
  if (message.now || message.ended || !need || need <= message.free_bytes) return
  if (!app.extensionManager.setting.get("QVG.Monitor.Toasts")) return
  app.extensionManager.toast.add({
    severity: "warn", summary: say("pressureTitle"), life: 12000,
    detail: say("pressure", { need: bytes(need), free: bytes(message.free_bytes) }),
  })
}

async function restore() {
  const id = workflowOnScreen()
  if (!id) return
  const { runs, texts } = await (await api.fetchApi(`/qvg/memory?workflow=${encodeURIComponent(id)}`)).json()
  runs.forEach(deliver)
  texts.forEach(showText)
}

app.registerExtension({
  name: "QuantVideoGen.Monitor",
  settings: [
    {
      id: "QVG.Monitor.Rate", name: "Updates per second", category: ["QuantVideoGen", "KV Memory Monitor", "Rate"], type: "slider",
      defaultValue: 4, attrs: { min: 1, max: 4, step: 1 }, tooltip: "How often the monitor redraws while a model samples.",
    },
    {
      id: "QVG.Monitor.Units", name: "Units of memory", category: ["QuantVideoGen", "KV Memory Monitor", "Units"], type: "combo",
      defaultValue: "binary", options: [{ text: "GiB (1024)", value: "binary" }, { text: "GB (1000)", value: "decimal" }],
      tooltip: "Cards and ComfyUI count in GiB, most file managers in GB.",
    },
    {
      id: "QVG.Monitor.Toasts", name: "Warn when the cache may not fit", category: ["QuantVideoGen", "KV Memory Monitor", "Toasts"],
      type: "boolean", defaultValue: true, tooltip: "Shows a message before the first step when the forecast exceeds free memory.",
    },
  ],
  aboutPageBadges: [{
    label: "ComfyUI-QuantVideoGen", url: "https://github.com/quantvideogen/ComfyUI-QuantVideoGen", icon: "pi pi-chart-bar",
  }],
  init() {
    make("style", "", document.head, STYLE)
  },
  async setup() {
    await loadStrings()
    api.addEventListener("qvg.memory", ({ detail }) => {
      warnUnderPressure(detail)
      deliver(detail)
    })
    await restore()
  },
  nodeCreated(node) {
    if (node.comfyClass !== MONITOR) return
    node.qvgMonitor = new Monitor(node)
    chain(node, "onExecuted", (output) => {
      const report = output?.qvg_memory?.[0]
      if (report) node.qvgMonitor.take(report)
    })
    node.setSize([Math.max(node.size[0], 460), Math.max(node.size[1], 540)])
  },
  afterConfigureGraph: restore,
})
