"""Whereabouts: where in the code a thread is. If it does not get on, this tells whose fault that is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).parent)


def whereabouts(thread: int | None) -> str:
    """The first function on the way that is not rustord's own, a plugin's perhaps; or else the one it is in.

    ``thread`` is the ident of a `threading.Thread`.
    """
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "no code any more"
    while _is_foreign(frame) and frame.f_back is not None and _is_foreign(frame.f_back):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}, {frame.f_code.co_name}"


def _is_foreign(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith(_PACKAGE)
