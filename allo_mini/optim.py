"""AdamW whose state exists for the selected weights only (departures d, e, h), and the learning-rate schedule.

All selected weights of all tensors stand in one flat fp32 vector, the *master*; gradient and moments are flat
vectors beside it. A dense gradient lives only until its selected entries are added to the flat one.

    tensor A  . x . . x        tensor B  x . .        selected entries x
               |     |                   |
    master   [ a1    a2                  b1 ]          fp32; so are grad, exp_avg and exp_avg_sq

The fp32 master is not optional: a bf16 weight cannot take a step of 5e-7. Bytes per *selected* weight: 1.2 for its
position (on a CPU 9.2), 4 master, 4 gradient, 8 moments (2 with state_bits=8), 4 of host memory for its start; offload
moves master and moments ("state"), or these and the gradient ("gradient"), to host memory.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

from allo_mini.selection import CHUNK, Selection, put, take
from allo_mini.quant import BLOCK, decode, encode

SLICE = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights updated in one go, whole blocks: a CPU's cache, few GPU launches


@dataclass
class Slot:
    """The place of one parameter in the flat vectors; linear.py finds it as `parameter.slot`."""
    name: str
    p: Tensor
    selection: Selection
    where: slice  # in the flat vectors
    grad: Tensor  # the flat gradient's part, fp32
    handle: Tensor | None = None  # stands in for an int8 parameter in autograd's graph

    def gather(self, p: Tensor) -> None:
        """Autograd's hook for parameters outside linear.py: norms, biases, and any other module's."""
        dense, p.grad = p.grad, None  # the dense gradient ends here, even if memory runs out in the next lines
        if dense is not None:
            for rows, entries, index in self.selection.chunks():
                self.add(entries, take(dense[rows], index))

    def add(self, entries: slice, values: Tensor) -> None:
        """Accumulate gradient values of some selected entries."""
        self.grad[entries].add_(values.to(self.grad.device))

    def add_at(self, places: Tensor, values: Tensor) -> None:
        """For an embedding [V,H]: accumulate gradient values of selected entries by their numbers, both [n], or, all of
        its entries being selected, rows [n,H] by theirs; one may occur often."""
        grad = self.grad.view(-1, *values.shape[1:])
        grad.index_add_(0, places.to(grad.device), values.float().to(grad.device))

    @cached_property
    def by_row(self) -> tuple[Tensor, Tensor, int]:
        """Of a masked embedding [V,H]: where each row's selected entries begin, [V+1]; their columns; the most."""
        width, columns, counts = self.selection.width, [], []
        for rows, _, index in self.selection.chunks():
            columns.append((index % width).to(torch.int16 if width < 1 << 15 else torch.int32))
            counts.append(torch.bincount(index // width, minlength=rows.stop - rows.start))
        ends = F.pad(torch.cat(counts).cumsum(0), (1, 0))
        return ends, torch.cat(columns), int(ends.diff().max())


class FlatGradient:
    """Adds the selected entries of every gradient to one flat fp32 buffer while backward runs.

    named_parameters: pairs of (name, parameter) of any nn.Module; mask: name -> bool tensor, or None for all weights.
    host: the buffer stands in (pinned) host memory. Parameters without a selected entry stop requiring gradients;
    `close()` undoes everything. Raises ValueError when a mask entry is missing or has another shape than its parameter.
    """

    def __init__(self, named_parameters, mask: dict[str, Tensor] | None = None, host: bool = False):
        chosen, self.hooks, self.before, size = [], [], [], 0
        for name, p in named_parameters:
            if mask is not None and (name not in mask or mask[name].shape != p.shape):
                raise ValueError(f"the mask does not fit parameter {name} of shape {list(p.shape)}")
            int8 = getattr(p, "int8", None)
            if not (int8 or p.is_contiguous()):
                raise ValueError(f"parameter {name} is not contiguous")
            selection = Selection(p.shape, None if mask is None else mask[name], p.device)
            if int8 and mask is not None:
                if selection != int8.selection:
                    raise ValueError(f"parameter {name} is int8 and keeps other entries than the mask selects")
                selection = int8.selection  # one copy is enough
            self.before.append((p, p.requires_grad))
            p.requires_grad_(len(selection) > 0 and p.is_floating_point())
            p.grad = None
            if len(selection):
                chosen.append((name, p, selection, slice(size, size + len(selection))))
                size += len(selection)
        if not chosen:
            raise ValueError("the mask selects nothing")
        self.grad = flat_zeros(size, chosen[0][1].device, host)
        self.slots = [Slot(*one, self.grad[one[-1]]) for one in chosen]
        for slot in self.slots:
            slot.p.slot = slot
            if slot.p.is_floating_point():
                self.hooks.append(slot.p.register_post_accumulate_grad_hook(slot.gather))
            else:
                slot.handle = torch.zeros(1, requires_grad=True, device=slot.p.device)

    def gather_weights(self, flat: Tensor | None = None) -> Tensor:
        """The selected weights as they stand in the parameters, flat fp32 (into `flat` if given)."""
        flat = torch.empty_like(self.grad) if flat is None else flat
        for slot in self.slots:
            int8 = getattr(slot.p, "int8", None)
            for rows, entries, index in slot.selection.chunks():
                flat[slot.where][entries] = int8.values[entries] if int8 else take(slot.p.detach()[rows], index)
        return flat

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector cut into tensors of the parameters' shapes; needs mask = None."""
        return {s.name: flat[s.where].view(s.p.shape) for s in self.slots}

    def close(self) -> None:
        """Remove hooks and slots; the parameters are ordinary again."""
        for hook in self.hooks:
            hook.remove()
        for slot in self.slots:
            del slot.p.slot
        for p, required in self.before:
            p.grad = None
            p.requires_grad_(required)


def flat_zeros(size: int, device, host: bool) -> Tensor:
    """fp32 zeros on the device, or in host memory that a GPU can copy from and to without a detour."""
    return torch.zeros(size, pin_memory=device.type == "cuda") if host else torch.zeros(size, device=device)


def adamw(master: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float, betas, eps: float, decay: float):
    """One AdamW update in place (Loshchilov & Hutter 2019; eps after bias correction, departure h). All fp32 [n].

        m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
        theta <- (1 - lr decay) theta - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    By torch's fused kernel, which reads and writes every value once; it counts the step up itself.
    """
    before = torch.full((), step - 1.0, device=master.device)
    fused_adamw([master], [grad], [m], [v], [], [before], fused=True, amsgrad=False, maximize=False, lr=lr,
                beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps)


class MaskedAdamW(FlatGradient):
    """AdamW over the selected weights, equal to torch.optim.AdamW on those.

    After it is made, `backward()` leaves no dense .grad behind, and `step()` changes selected entries only: no
    decay, no rounding and no moment ever touches another weight.

    state_bits: 32, or 8 for blockwise 8-bit moments (m, and the square root of v; quant.py).
    offload: "none"; "state": master and moments in host memory; "gradient": the gradient buffer too.
    """

    def __init__(self, named_parameters, mask=None, lr: float = 1e-6, betas=(0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, state_bits: int = 32, offload: str = "none"):
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits must be 8 or 32, got {state_bits}")
        super().__init__(named_parameters, mask, host=offload == "gradient")
        if mask is None and any(hasattr(slot.p, "int8") for slot in self.slots):
            raise ValueError("int8 weights can only be trained through a mask: load the model without int8 to train "
                             "all")
        self.lr, self.betas, self.eps, self.weight_decay, self.steps = lr, betas, eps, weight_decay, torch.tensor(0)
        self.bits, size, device = state_bits, len(self.grad), self.slots[0].p.device
        self.master = flat_zeros(size, device, offload != "none")
        self.gather_weights(self.master)
        self.start = self.master.to("cpu", copy=True)  # to say at the end how far the weights have come
        kind = torch.uint8 if state_bits == 8 else torch.float32
        self.exp_avg = torch.zeros_like(self.master, dtype=kind)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        if state_bits == 8:
            self.exp_avg_scale = torch.zeros(-(-size // BLOCK), device=self.master.device)
            self.exp_avg_sq_scale = torch.zeros_like(self.exp_avg_scale)

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Scale the selected gradient to at most max_norm; return its norm before (departure e)."""
        norm = float(self.grad.norm())
        if norm > max_norm:
            self.grad.mul_(max_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """One update; the gradient buffer is empty afterwards."""
        self.steps += 1
        size = SLICE.get(self.master.device.type, SLICE["cuda"])
        for at in range(0, len(self.master), size):
            part, blocks = slice(at, at + size), slice(at // BLOCK, (at + size) // BLOCK)
            m, v = self.exp_avg[part], self.exp_avg_sq[part]  # at 32 bits views, which the update changes in place
            if self.bits == 8:  # copies, to be stored afterwards
                m = decode(m, self.exp_avg_scale[blocks], True)
                v = decode(v, self.exp_avg_sq_scale[blocks], False).square_()
            adamw(self.master[part], self.grad[part].to(self.master.device), m, v, int(self.steps), self.lr, self.betas,
                  self.eps, self.weight_decay)
            if self.bits == 8:
                self.exp_avg[part], self.exp_avg_scale[blocks] = encode(m, True)
                self.exp_avg_sq[part], self.exp_avg_sq_scale[blocks] = encode(v.sqrt_(), False)
        self.write_back()
        self.grad.zero_()

    @torch.no_grad()
    def write_back(self) -> None:
        """The master's values into the parameters, rounded to their dtype."""
        for slot in self.slots:
            master, int8 = self.master[slot.where], getattr(slot.p, "int8", None)
            if int8:
                int8.values.copy_(master, non_blocking=True)
                continue
            for rows, entries, index in slot.selection.chunks():
                put(slot.p.detach()[rows], index, master[entries])

    def movement(self) -> dict[str, Tensor]:
        """|theta - theta_start| of every weight in fp32, on the CPU; needs mask = None."""
        return self.named(self.master.to("cpu", copy=True).sub_(self.start).abs_())

    def change(self, dtype: torch.dtype) -> tuple[float, float]:
        """max |theta - theta_start| over the selected weights, and the share of them that the parameters, rounded to
        `dtype`, show as changed. In slices, and in the gradient's memory, which is free between two steps."""
        largest, moved = torch.zeros(()), 0
        stored = self.gather_weights(self.grad)
        for master, start, now in zip(*(x.split(CHUNK) for x in (self.master, self.start, stored))):
            largest = torch.maximum(largest, (master.cpu() - start).abs().max())  # NaN stays NaN
            moved += int((now.cpu() != start.to(dtype).float()).sum())
        self.grad.zero_()
        return float(largest), moved / len(self.start)

    def exact(self) -> dict[str, Tensor]:
        """The masters in fp32 by parameter, NAME.values at NAME.offsets and NAME.counts (Selection's; without a mask
        none): of a step of 1e-6 on a weight of 0.02, a model folder in bf16 keeps nothing."""
        parts = {}
        for slot in self.slots:
            parts |= slot.selection.named(slot.name, self.master[slot.where])
        return parts

    @torch.no_grad()
    def begin_at(self, exact: dict[str, Tensor]) -> None:
        """Take over, before the first step, another stage's masters, of this mask or another. Raises ValueError when
        the parameters are not what those round to."""
        device = self.master.device
        for slot in (s for s in self.slots if f"{s.name}.values" in exact):
            values, theirs = exact[f"{slot.name}.values"], Selection.read(exact, slot.name, slot.p.shape, slot.p.device)
            for (rows, ours, our_index), (_, given, their_index) in zip(slot.selection.chunks(), theirs.chunks()):
                # our values, over them theirs where they have any; read back where ours stand
                dense = torch.zeros(slot.p[rows].shape, device=slot.p.device)
                put(dense, our_index, self.master[slot.where][ours])
                put(dense, their_index, values[given])
                self.master[slot.where][ours] = take(dense, our_index).to(device)
            stored = slot.p.int8.values if hasattr(slot.p, "int8") else slot.p
            if not torch.equal(self.master[slot.where].to(stored.dtype).float(), self.start[slot.where].to(device)):
                raise ValueError(f"it holds other values of {slot.name}")
        self.start = self.master.to("cpu", copy=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on: flat tensors and the step count."""
        names = ["master", "start", "exp_avg", "exp_avg_sq", "steps"]
        if self.bits == 8:
            names += ["exp_avg_scale", "exp_avg_sq_scale"]
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of state_dict; the parameters get the master's values."""
        for name, mine in self.state_dict().items():  # the vectors themselves, not copies
            mine.copy_(state[name])
        self.write_back()


def cosine_lr(step: int, total: int, peak: float, warmup_fraction: float) -> float:
    """Learning rate of step 0..total-1: linear from 0 over the first share of steps, then a half cosine to 0.

    As Hugging Face's cosine schedule, but rising starts at peak / warm-up steps, so that no step is wasted at 0.
    """
    warmup = math.ceil(warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
