// A chart as an SVG, from its description (qvg/report/chart.py): axes, areas and lines in bytes and frames, here mapped to pixels.

import { bytes, isDecimal, say } from "./strings.js"

const SVG = "http://www.w3.org/2000/svg"
const LEFT = 64, RIGHT = 12, TOP = 10, BOTTOM = 24

// A name without a key, such as that of a codec's own part, is shown as it is.
export const nameOf = ({ name, key, values }) => (key ? say(key, values) : name)

export const legendOf = (chart) => [...chart.areas, ...chart.lines].filter(({ name }) => name)

// before: the chart so far; chart: a whole one, or the points that came since
export function continued(before, chart) {
  if (!before || !chart.since) return chart
  const grown = (kind) => chart[kind].map((series) => {
    const known = series.whole ? [] : before[kind].find(({ id }) => id === series.id)?.points ?? []
    // a page that asked in between has some of the points already
    return { ...series, points: [...known, ...series.points.filter(([frame]) => !(frame <= known.at(-1)?.[0]))] }
  })
  return { ...chart, areas: grown("areas"), lines: grown("lines") }
}

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value)
  if (text !== undefined) made.textContent = text
  parent?.append(made)
  return made
}

// now: the latest figures, for a screen reader; width and height in CSS pixels
export function drawChart(chart, now, width, height) {
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", class: "qvg-chart" })
  svg.setAttribute("aria-label", now
    ? say("chart", { stored: bytes(now.stored_bytes), peak: bytes(now.peak_bytes), bf16: bytes(now.bf16_bytes) }) : say("idle"))
  const across = ({ start, end }, value) => Math.min(1, (value - start) / (end - start))
  const x = (frame) => LEFT + (width - LEFT - RIGHT) * across(chart.frames, frame)
  const y = (count) => height - BOTTOM - (height - TOP - BOTTOM) * across(chart.bytes, count)
  // of thousands of points as many as there are pixels
  const column = (point) => Math.floor(x(point[0]))
  const visible = (points) => points.filter((point, i) => !i || i === points.length - 1 || column(point) !== column(points[i + 1]))
  const path = (points) => points.map(([frame, count], i) => `${i ? "L" : "M"}${x(frame).toFixed(1)} ${y(count).toFixed(1)}`).join("")

  for (const [count, text] of chart.bytes.ticks[isDecimal() ? "decimal" : "binary"]) {
    element("line", { x1: LEFT, x2: width - RIGHT, y1: y(count), y2: y(count), class: "qvg-grid" }, svg)
    element("text", { x: LEFT - 6, y: y(count) + 4, "text-anchor": "end" }, svg, text)
  }
  const end = { x: width - RIGHT, y: height - 6, "text-anchor": "end" }
  const label = element("text", end, svg, `${chart.frames.end} ${say("latentFrames")}`)
  const free = width - RIGHT - 7.5 * label.textContent.length - 24
  for (const [frame, text] of chart.frames.ticks)
    if (x(frame) < free) element("text", { x: x(frame), y: height - 6, "text-anchor": "middle" }, svg, text)
  for (const { id, colour, points } of chart.areas) {
    const shown = visible(points)
    const outline = [...shown.map(([frame, , high]) => [frame, high]), ...shown.map(([frame, low]) => [frame, low]).reverse()]
    element("path", { d: `${path(outline)}Z`, fill: colour, "data-part": id }, svg)
  }
  for (const { id, colour, dashed, points } of chart.lines)
    element("path", { d: path(visible(points)), stroke: colour, class: dashed ? "qvg-line qvg-dashed" : "qvg-line", "data-line": id }, svg)
  return svg
}
