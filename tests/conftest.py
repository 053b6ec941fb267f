"""Settings for every test: offline, CPU, one thread (tiny tensors: threads cost more than they give).

The few tests that need a GPU skip themselves without one: `CUDA_VISIBLE_DEVICES=0 python -m pytest -k gpu` shows it to them.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a bare `pytest` finds allo_mini too

import torch  # noqa: E402

torch.set_num_threads(1)
os.fsync = lambda handle: None  # no test cuts the power, and waiting for the disk would take a third of the time


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Modules with a function `begin` come last: it starts their processes now, on a core that the other tests leave free."""
    last = [item for item in items if hasattr(getattr(item, "module", None), "begin")]
    items[:] = [item for item in items if item not in last] + last
    if last and not config.option.collectonly:
        folder = tempfile.mkdtemp()
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        for module in dict.fromkeys(item.module for item in last):
            config.add_cleanup(module.begin(Path(folder)))
