"""What the timeline needs of JAX's private modules: the user frame of an equation.

In comes an equation's source info, out goes "file:line" of the innermost user frame. Nothing else may stand here.
"""

from __future__ import annotations

from typing import Any

from jax._src import source_info_util


def user_source(source_info: Any) -> str:
    """Return ``file:line`` of the innermost user frame, or an empty string where none is known."""
    frame = source_info_util.user_frame(source_info.traceback)
    return "" if frame is None else f"{frame.file_name}:{frame.start_line}"
