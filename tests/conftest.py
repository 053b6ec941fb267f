"""Settings for every test: offline, CPU, one thread (tiny tensors: threads cost more than they give).

The few tests that need a GPU skip themselves without one: `CUDA_VISIBLE_DEVICES=0 python -m pytest -k gpu` shows it to them.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a bare `pytest` finds allo_mini too

import torch  # noqa: E402

torch.set_num_threads(1)
os.fsync = lambda handle: None  # no test cuts the power, and waiting for the disk would take a third of the time
