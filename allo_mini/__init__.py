"""allo_mini: ALLO (arXiv 2406.12606) on one GPU in plain PyTorch.

Read in this order: losses.py (the equations), optim.py and mask.py (which weights move), logprobs.py and
model.py (how log-probabilities are made), scoring.py (which tokens count), then train.py from top to bottom.
"""

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less of a GPU's memory is lost to fragments


class UserError(Exception):
    """A mistake in what the user gave us: printed as one line `error: ...`, exit code 2, no traceback."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
