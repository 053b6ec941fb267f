"""Settings for every test: offline, CPU, one thread (for tiny tensors the fastest).

Tests that need a GPU skip themselves without one; `CUDA_VISIBLE_DEVICES=0 pytest -k gpu` shows it.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare `pytest` finds allo_mini too

import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Modules with a function `begin` come last: it starts their processes now, on another core."""
    last = [item for item in items if hasattr(getattr(item, "module", None), "begin")]
    items[:] = [item for item in items if item not in last] + last
    if last and not config.option.collectonly:
        folder = tempfile.mkdtemp()
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        for module in dict.fromkeys(item.module for item in last):
            config.add_cleanup(module.begin(Path(folder)))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tiny model, rows of every kind, and samples for them."""
    from runs import make_world
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of one undisturbed run of the demo model through all stages."""
    import train
    from runs import demo_command
    place = tmp_path_factory.mktemp("whole")
    assert train.main(demo_command(place)) == 0
    return place / "run"
