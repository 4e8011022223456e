// What the pack's own widgets say. English is here; locales/LANGUAGE/main.json holds the rest under "qvg", and ComfyUI
// serves all languages merged at /i18n.

import { app } from "../../../scripts/app.js"
import { api } from "../../../scripts/api.js"

export const ENGLISH = {
  idle: "No run yet. Press Run, and the KV cache appears here while the model samples.",
  sampling: "Sampling: {done} of {total} latent frames",
  done: "{total} latent frames, finished",
  stopped: "Stopped at {done} of {total} latent frames",
  instead: "{stored} instead of {bf16} in bf16",
  chart: "KV cache in bytes over latent frames: {stored} held, {peak} at the peak, {bf16} in bf16",
  latentFrames: "latent frames",
  peak: "Peak with workspace",
  forecast: "Forecast",
  held: "Held",
  heldValue: "{frames} frames, {tokens} tokens",
  bits: "Bits a number",
  free: "Free on {device}",
  freeHost: "Free host memory",
  host: "Offloaded to host memory",
  budget: "Budget",
  none: "none",
  layers: "Bytes of each layer",
  layer: "Layer {number}",
  codebooks: "codebooks",
  workspace: "workspace",
  planes: "{bits}-bit planes",
  plain: "{bits}-bit numbers",
  pressure: "The KV cache will need {need}, but {free} are free. Choose a smaller preset in QVG Settings, set a budget there, or make the video shorter.",
  pressureTitle: "KV cache may not fit",
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

export function bytes(count) {
  const decimal = app.extensionManager?.setting?.get("QVG.Monitor.Units") === "decimal"
  const step = decimal ? 1000 : 1024
  let unit = 0
  while (count >= step && unit < 4) { count /= step; unit++ }
  return `${unit ? count.toFixed(1) : Math.round(count)} ${(decimal ? DECIMAL : BINARY)[unit]}`
}
