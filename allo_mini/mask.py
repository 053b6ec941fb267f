"""Which weights are trained: the exact global top p % of an importance over all weights.

"Neuron" means one scalar weight, as in the paper; norms, biases and embeddings included. The
official script first cuts every tensor to its own top 2p %, so that tensors which move a lot are
capped and asking for 5 % can select 21 % (departure a); here the threshold is global and the count
is exact.

A mask is {tensor name: Selected}, the same in files, in the optimizer, beside int8 weights and in
patches.
"""

from fractions import Fraction

import torch

from allo_mini import UserError

CHUNK = 1 << 24  # values that are looked at in one go: 64 MB of fp32
INFINITE = 0x7F800000  # the bits of fp32's infinity: above those of every finite value


def chunk_of(device):
    """CHUNK, or on a CPU a sixteenth of it, which its caches hold."""
    return CHUNK >> 4 if str(device) == "cpu" else CHUNK


# ---- where selected entries stand --------------------------------------------------------------

class Selected:
    """Where the selected entries of a tensor stand, row by row: about two bytes each.

        . x . x
        . . . .        columns  1 3 0      int16 (int32 where rows are wider), row after row
        x . . .        counts   2 0 1      int32, one for each row

    A vector is one row; a tensor of more than two dimensions has rows of its last. `columns` None:
    all entries are selected. `chunks()` walks over the tensor in groups of whole rows, so that
    whoever handles its dense values (a gradient, dequantised weights) holds one chunk of them.
    """

    def __init__(self, shape, columns=None, counts=None):
        self.shape = torch.Size(shape)
        self.columns = columns
        self.width = (self.shape or [1])[-1]
        if counts is None:
            counts = torch.full([self.shape[:-1].numel()], self.width)
        self.counts = counts
        self.ends = counts.cpu().cumsum(0)  # how many stand in a row and before it

    @classmethod
    def from_dense(cls, mask):
        """From a bool tensor."""
        rows = torch.atleast_2d(mask).flatten(0, -2)
        kind = torch.int16 if rows.shape[1] < 1 << 15 else torch.int32
        return cls(mask.shape, rows.nonzero()[:, 1].to(kind), rows.sum(1).int())

    def dense(self):
        """The bool tensor, on the CPU."""
        mask = torch.zeros(self.shape).bool()
        self.to("cpu").scatter(mask, torch.ones(len(self)))
        return mask

    def to(self, device):
        """The same on another device."""
        columns = None if self.columns is None else self.columns.to(device)
        return Selected(self.shape, columns, self.counts.to(device))

    def __len__(self):
        return int(self.ends[-1])

    def chunks(self):
        """Yield (row slice, slice of the selected entries, their flat positions in these rows).

        Positions are None where all are selected.
        """
        step = max(1, chunk_of(self.counts.device) // self.width)
        begin = 0
        for first in range(0, len(self.counts), step):
            rows = slice(first, first + step)
            end = int(self.ends[rows][-1])
            index = None
            if self.columns is not None:
                counts = self.counts[rows].long()
                row = torch.repeat_interleave(counts, output_size=end - begin)  # 0 0 2
                index = self.columns[begin:end].add(row, alpha=self.width)
            yield rows, slice(begin, end), index
            begin = end

    def gather(self, tensor):
        """The selected entries of a tensor of this shape, flat."""
        dense = tensor.view(-1, self.width)
        return torch.cat([take(dense[rows], index) for rows, _, index in self.chunks()])

    def scatter(self, tensor, values):
        """Write the selected entries of a tensor of this shape, in place."""
        dense = tensor.view(-1, self.width)
        for rows, entries, index in self.chunks():
            put(dense[rows], index, values[entries])


def take(dense, index):
    """The selected entries of a dense chunk, flat."""
    return dense.reshape(-1) if index is None else dense.take(index)


def put(dense, index, values):
    """Write the selected entries of a (contiguous) dense chunk, in place."""
    values = values.to(dense.device, dense.dtype, non_blocking=dense.is_cuda)
    dense.view(-1)[index] = values  # [None]: all


# ---- a mask as tensors of a file ---------------------------------------------------------------

def to_tensors(mask, values=()):
    """NAME.columns and NAME.counts of every tensor, none where all is selected; NAME.values if any.

    mask: {name: Selected}; values: {name: flat tensor}.
    """
    tensors = {f"{name}.values": values[name] for name in values}
    for name, selected in mask.items():
        if selected.columns is not None:
            tensors |= {f"{name}.columns": selected.columns, f"{name}.counts": selected.counts}
    return tensors


def from_tensors(tensors, shapes):
    """{name: Selected} of the tensors in `shapes`. Raises ValueError for what is no mask."""
    mask = {}
    for name, shape in shapes.items():
        columns, counts = tensors.get(f"{name}.columns"), tensors.get(f"{name}.counts")
        selected = mask[name] = Selected(shape, columns, counts)
        if columns is not None:
            fits = len(counts) == shape[:-1].numel() and len(columns) == len(selected)
            if not fits or ((columns < 0) | (columns >= selected.width)).any():
                raise ValueError(f"the mask of {name} does not fit its shape {list(shape)}")
    return mask


# ---- the top p % -------------------------------------------------------------------------------

def bit_patterns(tensors, device):
    """Yield |values| as int32 bit patterns, by chunks: floats >= 0 sort as their bits do."""
    for values in tensors:
        for chunk in values.reshape(-1).split(chunk_of(device)):
            bits = chunk.to(device).float().abs().view(torch.int32)
            if bits.max() >= INFINITE:
                raise UserError("importance is inf or NaN; use --dtype fp32 or lower --lr-warmup")
            yield bits


def kth_largest(tensors, k, device):
    """Radix select: the bits of the k-th largest |value| over all tensors, how many equals to take.

    Two passes, each with a histogram: the upper 16 bits, then the lower 16 of values with the
    k-th's upper ones. Exact, and never more than a chunk of memory beyond the inputs.
    """
    threshold = 0
    for shift in (16, 0):
        histogram = 0
        for bits in bit_patterns(tensors, device):
            if shift == 0:
                bits = bits[bits >> 16 == threshold] & 0xFFFF
            histogram += (bits >> shift).bincount(minlength=1 << 16).cpu()
        larger = histogram.sum() - histogram.cumsum(0)  # [d]: how many digits are above d
        digit = int((larger >= k).sum())
        k -= int(larger[digit])
        threshold = threshold << 16 | digit
    return threshold, k


def select_neurons(importance, fraction, device="cpu"):
    """{tensor name: importance} -> the mask of the exact top `fraction` (0..1) of all |values|.

    floor(fraction * N) weights are selected, in integer arithmetic (0.07 means 7/100); ties at the
    threshold go to the earlier (tensor, flat index). It may lie in a memory-mapped file: three
    passes go over it, a chunk at a time on `device`. Raises ValueError for a fraction outside
    (0, 1], UserError for inf or NaN.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    total = sum(values.numel() for values in importance.values())
    count = int(Fraction(fraction).limit_denominator(10**12) * total)
    threshold, ties = kth_largest(importance.values(), count, device) if count else (INFINITE, 0)
    mask = {}
    for name, values in importance.items():
        chunks = []
        for bits in bit_patterns([values], device):
            chosen = bits > threshold
            equal = (bits == threshold).nonzero()[:ties]
            chosen[equal] = True
            ties -= len(equal)
            chunks.append(chosen.cpu())
        mask[name] = Selected.from_dense(torch.cat(chunks).view(values.shape))
    return mask
