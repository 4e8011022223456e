"""The type of a camera path in a graph; its value is a `qvg.video.cameras.CameraPath`."""

from __future__ import annotations

from comfy_api.latest import io

CameraPathType = io.Custom("QVG_CAMERA_PATH")
