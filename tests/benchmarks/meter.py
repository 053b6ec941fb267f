"""Live bytes of tensors, counted by watching every operation: what a caching allocator would report, on any device."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allo_mini.selection import Selection


class Meter(TorchDispatchMode):
    """`peak` is the most bytes that storages made inside the block held at one time; kernels' own scratch is not seen.

    Inside, positions of selected weights are decoded anew every time, as on a GPU, where a CPU would keep them.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.sizes = 0, 0, {}

    def __enter__(self):
        self.chunks, Selection.chunks = Selection.chunks, Selection.decoded
        return super().__enter__()

    def __exit__(self, *error):
        Selection.chunks = self.chunks
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.take_in(tensor.untyped_storage())
        return out

    def take_in(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes or storage.device.type == "meta":
            return
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.let_go, key)

    def let_go(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)
