// What the pack's own widgets say. English is here; locales/LANGUAGE/main.json holds the rest under "qvg", and ComfyUI
// serves all languages merged at /i18n.

import { app } from "../../../scripts/app.js"
import { api } from "../../../scripts/api.js"

export const ENGLISH = {
  idle: "No run yet. Press Run, and the KV cache appears here while the model samples.",
  sampling: "Sampling: {done} of {total} latent frames",
  done: "{total} latent frames, finished",
  stopped: "Stopped at {done} of {total} latent frames",
  ratio: "smaller than bf16",
  ratioPeak: "at the peak",
  instead: "{stored} instead of {bf16} in bf16",
  chart: "KV cache in bytes over latent frames: {stored} held, {peak} at the peak, {bf16} in bf16",
  latentFrames: "latent frames",
  peak: "Peak with workspace",
  forecast: "Forecast",
  forecastValue: "{stored} held, {peak} peak",
  held: "Held",
  heldValue: "{frames} frames, {tokens} tokens",
  bits: "Bits per element",
  free: "Free on {device}",
  freeHost: "Free host memory",
  host: "Offloaded to host memory",
  budget: "Budget",
  room: "Room on {device}",
  none: "none",
  layers: "Bytes of each layer",
  layer: "Layer {number}",
  codebooks: "codebooks",
  workspace: "workspace",
  planes: "{bits}-bit planes",
  plain: "{bits}-bit numbers",
  pressure: "The KV cache will need {need}, but {free} are free. Choose a smaller preset in QVG Settings, set a budget there, or make the video shorter.",
  pressureTitle: "KV cache may not fit",
  settingsOff: "The model's own cache. Nothing below changes it.",
  settingsOld: "Old frames: keys in {key_bits} bits, values in {value_bits}; {stages} stages of {centroids} centroids, a scale for {group_size} channels.",
  settingsFirst: "First {sink_frames} latent frames: {sink_bits} bits.",
  settingsRecent: "Newest {recent_frames} latent frames: {recent_bits} bits.",
  settingsAll: "Every frame is kept.",
  settingsWindow: "Besides the first, the newest {window_frames} latent frames are kept.",
  settingsOwn: "Set here: {names}. The rest is the preset's.",
  partial: "The {done} latent frames that are finished, of {total}, go on through the graph. Press Stop again to end at once.",
  partialTitle: "Stopped",
}

let translations = {}

export async function loadStrings() {
  const all = await (await api.fetchApi("/i18n")).json()
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en"
  translations = (all[locale] ?? all[locale.split("-")[0]] ?? {}).qvg ?? {}
}

export function say(key, values = {}) {
  return (translations[key] ?? ENGLISH[key]).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "")
}

const BINARY = ["B", "KiB", "MiB", "GiB", "TiB"]
const DECIMAL = ["B", "kB", "MB", "GB", "TB"]
const isDecimal = () => app.extensionManager?.setting?.get("QVG.Monitor.Units") === "decimal"

// round: 5 MiB instead of 5.0 MiB
export function bytes(count, round = false) {
  const decimal = isDecimal()
  const step = decimal ? 1000 : 1024
  let unit = 0
  while (count >= step && unit < 4) { count /= step; unit++ }
  const whole = !unit || (round && Math.abs(count - Math.round(count)) < 1e-9)
  return `${whole ? Math.round(count) : count.toFixed(1)} ${(decimal ? DECIMAL : BINARY)[unit]}`
}

// [0, step, 2 step, ...] up to most, about `count` steps of 1, 2 or 5 times a power of ten, in the unit that bytes() would choose
export function roundSteps(most, count, ofBytes = false) {
  const base = isDecimal() ? 1000 : 1024
  let unit = 1
  while (ofBytes && most / count >= unit * base) unit *= base
  const rough = most / count / unit
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = Math.max([1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power, ofBytes && unit > 1 ? 0 : 1) * unit
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step)
}
