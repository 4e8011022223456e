"""Compare (QVG): the difference between two videos, as pictures and figures.

    QVGCompare  two IMAGE batches -> side by side, heat map, chart, JSON
"""

from __future__ import annotations

import json

import numpy as np
import torch
from comfy_api.latest import io

from ..qvg.report.chart import describe_comparison
from ..qvg.report.draw import draw_comparison
from ..qvg.report.metrics import heat, psnr, ssim
from .live import TEXT


class QVGCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGCompare", display_name="Compare (QVG)", category="QuantVideoGen", is_output_node=True,
            description="Compares two videos: side by side, as a heat map, and by PSNR and SSIM of each frame.",
            search_aliases=["psnr", "ssim", "difference", "side by side", "quality", "qvg"],
            inputs=[
                io.Image.Input("first", tooltip="The reference video, for example made with the preset Off."),
                io.Image.Input("second", tooltip="The video to measure; as many frames, of the same size."),
                io.Float.Input("white_at", default=0.25, min=0.01, max=1.0, step=0.01, advanced=True, optional=True,
                               tooltip="Channel difference (0 to 1) that the heat map shows as white. Lower it to see smaller differences. "
                                       "Default: 0.25."),
            ],
            outputs=[
                io.Image.Output(display_name="side_by_side", tooltip="First on the left, second on the right."),
                io.Image.Output(display_name="heat_map", tooltip="Black where both are equal, then red, yellow and white."),
                io.Image.Output(display_name="chart", tooltip="PSNR and SSIM of each frame."),
                io.String.Output(display_name="report", tooltip="JSON: PSNR in dB and SSIM, the means and of each frame."),
            ])

    @classmethod
    def execute(cls, first, second, white_at=0.25) -> io.NodeOutput:
        decibels, indices = psnr(first, second).tolist(), ssim(first, second).tolist()
        means = {"psnr": sum(decibels) / len(decibels), "ssim": sum(indices) / len(indices)}
        summary = f"PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f}, {len(decibels)} frames"
        chart = draw_comparison(describe_comparison(decibels, indices), title=summary)
        report = {"frames": len(decibels), **means, "psnr_of_frame": decibels, "ssim_of_frame": indices}
        return io.NodeOutput(
            torch.cat([first[..., :3], second[..., :3]], dim=2), heat(first, second, white_at),
            torch.from_numpy(np.asarray(chart, dtype=np.float32) / 255)[None], json.dumps(report, indent=1), ui={TEXT: [summary]})
