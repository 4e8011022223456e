// The KV cache of a run as an SVG: what it holds, stacked by precision over latent frames, under the line that it would be in bf16.

import { bytes, roundSteps, say } from "./strings.js"

const SVG = "http://www.w3.org/2000/svg"
const LEFT = 64, RIGHT = 12, TOP = 10, BOTTOM = 24
// a run of thousands of chunks is drawn at as many moments as there are pixels to show them
const MOMENTS = 300

// from what costs most care to what costs least; readable on dark and on light; qvg/chart.py has the same
const COLOURS = {
  codebooks: "#d9609b", 1: "#2f6fd6", 2: "#4c8dff", 3: "#27a3b8", 4: "#2fa67f", 8: "#7fae3f", 16: "#c78a2c", 32: "#b8703a",
  workspace: "#8f7bd8",
}

export function kindsOf(history) {
  const bits = new Set(history.flatMap((point) => Object.keys(point.by_bits)))
  return ["codebooks", ...[...bits].sort((a, b) => a - b), "workspace"].filter((kind) => history.some((point) => amount(point, kind)))
}

export function nameOf(kind) {
  if (kind === "codebooks" || kind === "workspace") return say(kind)
  return say(kind > 4 ? "plain" : "planes", { bits: kind })
}

export const colourOf = (kind) => COLOURS[kind] ?? "#888"

// what the device can give to this cache: what it holds, and what is free besides
export const roomOf = ({ now, free_bytes }) => free_bytes + (now ? now.stored_bytes + now.workspace_bytes : 0)

function amount(point, kind) {
  if (kind === "codebooks") return point.codebook_bytes
  if (kind === "workspace") return point.workspace_bytes
  return point.by_bits[kind] ?? 0
}

function thin(history) {
  const every = Math.ceil(history.length / MOMENTS)
  return every < 2 ? history : history.filter((point, i) => i % every === 0 || i === history.length - 1)
}

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  if (text !== undefined) made.textContent = text
  parent?.append(made)
  return made
}

// state: as a run sends it, with its history; width and height in CSS pixels
export function drawChart(state, width, height) {
  const { forecast, latent_frames, budget_bytes } = state
  const history = thin(state.history)
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", class: "qvg-chart" })
  const last = history.at(-1)
  svg.setAttribute("aria-label", last
    ? say("chart", { stored: bytes(last.stored_bytes), peak: bytes(last.peak_bytes), bf16: bytes(last.bf16_bytes) }) : say("idle"))
  const frames = Math.max(latent_frames, 1)
  const highest = Math.max(1, forecast?.bf16_bytes ?? 0, forecast?.peak_bytes ?? 0,
    ...history.map((point) => Math.max(point.bf16_bytes, point.peak_bytes)))
  const top = highest * 1.04
  const x = (frame) => LEFT + (width - LEFT - RIGHT) * Math.min(1, frame / frames)
  const y = (count) => height - BOTTOM - (height - TOP - BOTTOM) * count / top
  const path = (points) => points.map(([frame, count], i) => `${i ? "L" : "M"}${x(frame).toFixed(1)} ${y(count).toFixed(1)}`).join("")

  for (const count of roundSteps(highest, Math.max(2, Math.round(height / 55)), true)) {
    element("line", { x1: LEFT, x2: width - RIGHT, y1: y(count), y2: y(count), class: "qvg-grid" }, svg)
    element("text", { x: LEFT - 6, y: y(count) + 4, "text-anchor": "end" }, svg, bytes(count, true))
  }
  const end = element("text", { x: width - RIGHT, y: height - 6, "text-anchor": "end" }, svg, `${frames} ${say("latentFrames")}`)
  const room = width - RIGHT - 7.5 * end.textContent.length - 24
  for (const frame of roundSteps(frames, Math.max(2, Math.round(width / 110))))
    if (x(frame) < room) element("text", { x: x(frame), y: height - 6, "text-anchor": "middle" }, svg, frame)
  if (!last) return svg

  let floor = history.map(() => 0)
  for (const kind of kindsOf(history)) {
    const ceiling = history.map((point, i) => floor[i] + amount(point, kind))
    const along = history.map((point, i) => [point.frames, ceiling[i]])
    const back = history.map((point, i) => [point.frames, floor[i]]).reverse()
    element("path", { d: `${path([[0, 0], ...along, ...back])}Z`, fill: colourOf(kind), "data-kind": kind }, svg)
    floor = ceiling
  }
  const line = (key, name) => element("path", { d: path([[0, 0], ...history.map((point) => [point.frames, point[key]])]), class: name }, svg)
  line("bf16_bytes", "qvg-bf16")
  line("peak_bytes", "qvg-peak")
  if (forecast && last.frames < frames) {
    for (const [key, name] of [["bf16_bytes", "qvg-bf16"], ["peak_bytes", "qvg-peak"]])
      element("path", { d: path([[last.frames, last[key]], [frames, forecast[key]]]), class: `${name} qvg-ahead` }, svg)
  }
  for (const [count, name] of [[budget_bytes, "qvg-budget"], [roomOf(state), "qvg-room"]])
    if (count && count < top) element("path", { d: path([[0, count], [frames, count]]), class: name }, svg)
  return svg
}
