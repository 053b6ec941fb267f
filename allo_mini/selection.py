"""Positions of selected entries in few bytes, and walking over large tensors a chunk at a time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 24  # values looked at in one go: 64 MB of fp32


def chunk_of(device) -> int:
    """CHUNK, or on a CPU a sixteenth of it, which its caches hold."""
    return max(1, CHUNK >> 4) if torch.device(device).type == "cpu" else CHUNK


def row_edges(shape, device) -> list[int]:
    """0, ..., rows: where chunks begin and end; multiples of 256 rows, so blocks stay whole."""
    step = max(256, chunk_of(device) // max(1, math.prod(shape[1:])) // 256 * 256)
    return [*range(0, shape[0], step), shape[0]]


class Selection:
    """Where a tensor's selected entries stand: one byte for each, and two for every block of 256 entries.

        flat tensor   . . x . . . . . . x | . . . . . | x . . .       blocks of 256
        offsets           2             9               0             uint8, block after block
        counts                2              0          1             int16

    `chunks()` walks over the tensor in groups of whole rows, so that whoever handles dense values of a large matrix
    (its gradient, its dequantised weights) never holds more than CHUNK of them. Without a mask all are selected.
    """

    def __init__(self, shape, mask: Tensor | None = None, device="cpu"):
        self.width, self.edges, self.all, self.kept = math.prod(shape[1:]), row_edges(shape, device), True, None
        self.ends = [row * self.width for row in self.edges]  # how many are selected up to each edge
        if mask is not None:
            index = mask.reshape(-1).nonzero().squeeze(1)
            counts = torch.bincount(index >> 8, minlength=-(-mask.numel() // 256))
            self._narrow((index & 255).to(device, torch.uint8), counts.to(device, torch.int16))

    def _narrow(self, offsets: Tensor, counts: Tensor) -> None:
        """Of all entries select these alone."""
        self.all, self.offsets, self.counts = False, offsets, counts
        before = F.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))  # selected before each block
        self.ends = before[[-(-end // 256) for end in self.ends]].tolist()

    def named(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """What a file holds of entries with these values: NAME.values and, unless all are selected, NAME.offsets and
        NAME.counts."""
        parts = {} if self.all else {f"{name}.offsets": self.offsets, f"{name}.counts": self.counts}
        return parts | {f"{name}.values": values}

    @classmethod
    def read(cls, tensors: dict[str, Tensor], name: str, shape, device) -> "Selection":
        """The inverse: the selection among the tensors of a file; raises KeyError when half of it is missing."""
        new = cls(shape, device=device)
        if f"{name}.offsets" in tensors or f"{name}.counts" in tensors:
            new._narrow(*(tensors[f"{name}.{part}"].to(device) for part in ("offsets", "counts")))
        return new

    def __len__(self) -> int:
        return self.ends[-1]

    def __eq__(self, other) -> bool:
        """Whether both select the same entries of a masked tensor."""
        return torch.equal(self.counts, other.counts) and torch.equal(self.offsets, other.offsets)

    def chunks(self):
        """(row slice, slice of the selected entries, their flat positions within the chunk; None: all), chunk by chunk.

        A CPU, where memory is plentiful, keeps the positions in 8 bytes each; a GPU decodes them anew.
        """
        if self.all or self.offsets.device.type != "cpu":
            return self.decoded()
        if self.kept is None:
            self.kept = [(*where, index.long()) for *where, index in self.decoded()]
        return iter(self.kept)

    def decoded(self):
        """Yield the chunks, positions as int32."""
        for first, last, begin, end in zip(self.edges, self.edges[1:], self.ends, self.ends[1:]):
            index = None
            if not self.all:
                counts = self.counts[first * self.width // 256:-(-last * self.width // 256)].int()
                blocks = torch.repeat_interleave(counts, output_size=end - begin)  # the size is known: no wait for it
                index = torch.add(self.offsets[begin:end], blocks, alpha=256)
            yield slice(first, last), slice(begin, end), index


def take(dense: Tensor, index: Tensor | None) -> Tensor:
    """The selected entries of a dense chunk, flat. index: int64 as a CPU keeps it, or int32 as a GPU has decoded it."""
    flat = dense.reshape(-1)
    if index is None:
        return flat
    return flat.take(index) if index.dtype == torch.int64 else flat.index_select(0, index)


def put(dense: Tensor, index: Tensor | None, values: Tensor) -> None:
    """Write the selected entries of a (contiguous) dense chunk in place."""
    flat, values = dense.view(-1), values.to(dense.device, dense.dtype, non_blocking=dense.is_cuda)
    if index is None:
        flat.copy_(values)
    elif torch.are_deterministic_algorithms_enabled():  # put_ has no deterministic form
        flat.index_copy_(0, index.long(), values)
    else:
        flat.put_(index.long(), values)
