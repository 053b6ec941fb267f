"""allo_mini: ALLO (arXiv 2406.12606) on one GPU in plain PyTorch. README: what to read first."""

import os
import platform

if "microsoft" not in platform.release():  # under Windows' WSL the driver may not take it
    # less of a GPU's memory is lost to fragments
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


class UserError(Exception):
    """A mistake in what the user gave us: one line `error: ...`, exit code 2, no traceback."""
