// Texts of the pack's own widgets. English is here; the other languages are in locales/LANGUAGE/main.json under "qvg", and ComfyUI
// serves them all at /i18n.

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
  available: "Available on {device}",
  none: "none",
  attention: "Attention to the cache: {chosen}",
  layers: "Bytes of each layer",
  layer: "Layer {number}",
  codebooks: "codebooks and bases",
  workspace: "workspace",
  elements: "{bits}-bit elements",
  pressure: "The KV cache will need {need}, but {free} are free. Choose a smaller preset in QVG Settings, set a budget there, or make the video shorter.",
  pressureTitle: "KV cache may not fit",
  settingsOff: "The model's own cache.",
  settingsOld: "Old frames: keys in {key_bits} bits, values in {value_bits}; {stages} stages of {centroids} centroids, one scale per {group_size} channels.",
  settingsOldBits: "Old frames: keys in {key_bits} bits, values in {value_bits}; codec {codec}.",
  settingsFirst: "First {sink_frames} latent frames: {sink_bits} bits.",
  settingsRecent: "Newest {recent_frames} latent frames: {recent_bits} bits.",
  settingsAll: "Every frame is kept.",
  settingsWindow: "Besides the first, the newest {window_frames} latent frames are kept.",
  settingsOwn: "Set here: {names}. The rest comes from the preset.",
  partial: "{done} of {total} latent frames are finished and continue through the graph. Press Stop again to end immediately.",
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
export const isDecimal = () => app.extensionManager?.setting?.get("QVG.Monitor.Units") === "decimal"

export function bytes(count) {
  const decimal = isDecimal()
  const step = decimal ? 1000 : 1024
  let unit = 0
  while (count >= step && unit < 4) { count /= step; unit++ }
  return `${unit ? count.toFixed(1) : Math.round(count)} ${(decimal ? DECIMAL : BINARY)[unit]}`
}
