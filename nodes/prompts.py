"""Prompts that change over time, as CONDITIONING for AR Video Sampler (QVG).

    QVGPromptSchedule  CLIP, "0s: ...  6.5s: ..." -> CONDITIONING
    QVGPromptAt        CONDITIONING, CONDITIONING, seconds -> CONDITIONING

The first conditioning carries the others under the key `SCHEDULE`, which other samplers ignore.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..qvg.video import Schedule, first_frame
from .adapters.causal import SCHEDULE


def _scheduled(conditionings: list[tuple[float, list, str]], frame_rate: int) -> list:
    """The first conditioning, carrying the others with the latent frame at which each begins."""
    entries = [(first_frame(seconds, frame_rate), conditioning[0][0], name) for seconds, conditioning, name in conditionings]
    (embedding, extra), *more = conditionings[0][1]
    return [[embedding, {**extra, SCHEDULE: entries}], *more]


class QVGPromptSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGPromptSchedule", display_name="Prompt Schedule (QVG)", category="QuantVideoGen",
            description="Prompts that change while the video is made.",
            search_aliases=["qvg", "prompt travel", "timeline", "multi prompt", "storyboard"],
            inputs=[
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.String.Input("text", multiline=True, default="0s: a calm sea\n6.5s: a storm comes up",
                                tooltip="One prompt per line, with the time at which it begins: '0s: ...', '6.5s: ...', '1:05: ...'. A "
                                        "line without a time continues the one above."),
                io.Int.Input("frame_rate", default=16, min=1, max=120, tooltip="The model's frames per second. Default: 16."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For AR Video Sampler (QVG); other samplers use only the "
                                                                                 "first prompt.")])

    @classmethod
    def execute(cls, clip, text, frame_rate) -> io.NodeOutput:
        return io.NodeOutput(_scheduled([
            (seconds, clip.encode_from_tokens_scheduled(clip.tokenize(prompt)), prompt)
            for seconds, prompt in Schedule.parse(text).entries], frame_rate))


class QVGPromptAt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGPromptAt", display_name="Prompt at Time (QVG)", category="QuantVideoGen",
            description="Adds a prompt, from any text encoder, that takes over at a given time of the video.",
            search_aliases=["qvg", "prompt travel", "timeline", "multi prompt"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt until then; may come from another Prompt at Time."),
                io.Conditioning.Input("next", tooltip="The prompt from then on."),
                io.Float.Input("seconds", default=5.0, min=0.0, max=86400.0, step=0.1, tooltip="Time of the switch in seconds. Default: "
                                                                                               "5."),
                io.Int.Input("frame_rate", default=16, min=1, max=120, tooltip="The model's frames per second. Default: 16."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For AR Video Sampler (QVG); other samplers use only the "
                                                                                 "first prompt.")])

    @classmethod
    def execute(cls, conditioning, next, seconds, frame_rate) -> io.NodeOutput:
        (embedding, extra), *more = conditioning
        entries = list(extra.get(SCHEDULE) or [(0, embedding, "0")])
        at = first_frame(seconds, frame_rate)
        if at <= entries[-1][0]:
            raise ValueError(f"The prompt at {seconds:g}s is not later than the one before it; chain the nodes in order of time.")
        # a session identifies prompts by name, so the name is derived from the embedding
        name = f"{at} {float(next[0][0].float().sum()):.6g}"
        return io.NodeOutput([[embedding, {**extra, SCHEDULE: [*entries, (at, next[0][0], name)]}], *more])
