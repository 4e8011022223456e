"""KV Memory Monitor (QVG): the cache of a sampling run as a chart and as figures.

    QVGMemoryMonitor  patched MODEL, LATENT of the sampler -> IMAGE, STRING

While the model samples, the run sends its state to this node's widget (`run_log`, web/js/monitor.js). Because of its latent input, the node
executes after the sampler, and then draws the whole history.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from comfy_api.latest import io

from ..qvg.report.chart import describe
from ..qvg.report.draw import draw_chart
from . import where
from .live import REPORT
from .run_log import ATTACHMENT, RunLog


class QVGMemoryMonitor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=where.MONITOR, display_name="KV Memory Monitor (QVG)", category="QuantVideoGen", is_output_node=True,
            description="Shows the bytes of the KV cache while the model samples and afterwards: now, in bf16, at the peak, per layer, and "
                        "as forecast.",
            search_aliases=["memory", "vram", "kv cache", "monitor", "chart", "qvg"],
            inputs=[
                io.Model.Input("model", tooltip="MODEL from Quantize KV Cache (QVG), directly or through LoRA loaders."),
                io.Latent.Input("samples", tooltip="LATENT of the sampler that used this model; the monitor waits for it."),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="Bytes over latent frames, and bytes per layer."),
                io.String.Output(display_name="report", tooltip="JSON: settings, forecast, bytes after every chunk."),
            ])

    @classmethod
    def execute(cls, model, samples) -> io.NodeOutput:
        log: RunLog | None = model.get_attachment(ATTACHMENT)
        if log is None:
            raise ValueError("This model's KV cache is not watched. Connect the MODEL from Quantize KV Cache (QVG); with the preset Off "
                             "it leaves the cache as it is, and still counts it.")
        run = log.run_of(where.here())
        if not run.history:
            raise ValueError("This model has not sampled. Connect the LATENT of the sampler that uses it.")
        title, frames = run.title, samples["samples"].shape[2]
        if frames != run.total_frames:
            title += f" (the latent has {frames})"
        report = run.report()
        chart = describe(run.history, forecast=run.forecast, total_frames=run.total_frames, budget_bytes=report["budget_bytes"])
        picture = draw_chart(chart, title=title, notes=run.notes())
        image = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
        return io.NodeOutput(image, json.dumps(report, indent=1), ui={REPORT: [run.page()]})
