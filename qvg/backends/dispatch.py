"""The earlier name of `qvg.backends`."""

from . import *  # noqa: F403
