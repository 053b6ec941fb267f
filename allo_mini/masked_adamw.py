"""AdamW whose state exists for the selected weights only (departures d, e, h), and its schedule.

All selected weights of all tensors stand in one flat fp32 vector, the *master*; gradient and
moments are flat vectors beside it. A dense gradient lives only until its selected entries are added
to the flat one.

    tensor A  . x . . x        tensor B  x . .        selected entries x
               |     |                   |
    master   [ a1    a2                  b1 ]          fp32; so are grad, exp_avg and exp_avg_sq

The fp32 master is not optional: a bf16 weight cannot take a step of 5e-7. Bytes for each *selected*
weight: 2 for its position, 4 master, 4 gradient, 8 moments (2 with state_bits=8), 4 of host memory
for where it started; `offload` keeps master, gradient and moments in host memory.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from allo_mini.mask import Selected, chunk_of, take
from allo_mini.quant import BLOCK, decode, encode


@dataclass
class Slot:
    """The place of one parameter in the flat vectors; linear.py knows it as `parameter.slot`."""
    name: str
    p: Tensor
    selected: Selected
    where: slice  # in the flat vectors
    grad: Tensor  # the flat gradient's slice

    def add(self, dense_of):
        """Add a gradient's selected entries; dense_of(rows) makes some rows of all its entries."""
        for rows, entries, index in self.selected.chunks():
            self.grad[entries] += take(dense_of(rows), index).to(self.grad.device)

    def gather(self, p):
        """Autograd's hook: take the selected entries of a dense gradient, and drop it."""
        if p.grad is not None:  # linear.py has taken a matrix's
            dense = p.grad.view(-1, self.selected.width)
            self.add(lambda rows: dense[rows])
            p.grad = None


class FlatGradient:
    """Adds the selected entries of every gradient to one flat fp32 vector while backward runs.

    named_parameters: (name, parameter) pairs of any nn.Module; mask: name -> Selected or bool
    tensor, or None for all weights; offload: the vector stands in host memory. Parameters without a
    selected entry stop requiring gradients; `close()` undoes everything.
    """

    def __init__(self, named_parameters, mask=None, offload=False):
        parameters = [(name, p, selected_of(name, p, mask)) for name, p in named_parameters]
        self.device = "cpu" if offload else parameters[0][1].device  # of the flat vectors
        self.grad = self.zeros(sum(len(selected) for _, _, selected in parameters))
        self.slots = []
        end = 0
        undo = ExitStack()
        self.close = undo.close  # makes the parameters ordinary again
        for name, p, selected in parameters:
            where = slice(end, end + len(selected))
            end = where.stop
            undo.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(len(selected) > 0 and p.is_floating_point())
            p.grad = None
            if len(selected):
                slot = p.slot = Slot(name, p, selected, where, self.grad[where])
                undo.callback(delattr, p, "slot")
                self.slots.append(slot)
                if p.requires_grad:
                    undo.callback(p.register_post_accumulate_grad_hook(slot.gather).remove)

    def shaped(self, values):
        """{name: its part of a flat vector, in the parameter's shape}; needs mask = None."""
        return {slot.name: values[slot.where].view(slot.p.shape) for slot in self.slots}

    def zeros(self, size):
        """fp32 zeros where the flat vectors stand."""
        return torch.zeros(size, device=self.device)


def selected_of(name, p, mask):
    """Where a parameter's selected entries stand, on its device. Raises ValueError."""
    if hasattr(p, "slot"):
        raise ValueError(f"{name} is in an optimizer already; close() that one first")
    if mask is None:
        return Selected(p.shape).to(p.device)
    selected = mask.get(name)
    if selected is None or selected.shape != p.shape:
        raise ValueError(f"the mask has no entry of shape {list(p.shape)} for {name}")
    if isinstance(selected, Tensor):
        selected = Selected.from_dense(selected)
    if not hasattr(p, "int8"):
        return selected.to(p.device)
    if len(selected) != len(p.int8.selected):
        raise ValueError(f"{name} is in 8 bits but for the entries of another mask")
    return p.int8.selected  # one copy is enough


class MaskedAdamW(FlatGradient):
    """AdamW over the selected weights, equal to torch.optim.AdamW on those.

    After it is made, `backward()` leaves no dense .grad behind, and `step()` changes selected
    entries only: no decay, no rounding and no moment ever touches another weight. Unlike torch's it
    owns what it trains: values that somebody sets in a parameter are lost in the next `step()`; to
    drop gradients take `grad.zero_()`, to clip them `clip`; without a mask all parameters are
    trained, also those that did not require gradients.

    state_bits: 32, or 8 for blockwise 8-bit moments (m, and the square root of v; quant.py).
    offload: master, gradient and moments in host memory.
    """

    def __init__(self, named_parameters, mask=None, lr=1e-6, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0.0, state_bits=32, offload=False):
        super().__init__(named_parameters, mask, offload)
        self.lr = lr
        self.settings = dict(beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        self.steps = torch.tensor(0)
        self.master = self.zeros(len(self.grad))
        for slot in self.slots:
            int8 = getattr(slot.p, "int8", None)  # whose selected entries stand apart
            self.master[slot.where] = int8.values if int8 else slot.selected.gather(slot.p.detach())
        self.start = self.master.to("cpu", copy=True)  # to say how far the weights have come
        self.coarse = state_bits == 8
        self.exp_avg = torch.zeros_like(self.master, dtype=torch.uint8 if self.coarse else None)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        if self.coarse:
            self.exp_avg_scale = torch.zeros_like(self.master[::BLOCK])
            self.exp_avg_sq_scale = torch.zeros_like(self.exp_avg_scale)

    def clip(self, max_norm):
        """Scale the selected gradient to at most max_norm; returns its own norm (departure e).

        By parts: torch's norm of a long vector on a CPU is too small, by 5 % at 300 million.
        """
        norm = float(torch.nn.utils.get_total_norm(self.grad.split(1 << 20)))
        if norm > max_norm:
            self.grad.mul_(max_norm / (norm + 1e-6))
        return norm

    def step(self):
        """AdamW (Loshchilov & Hutter 2019) of the master; the gradient is zero afterwards.

            m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
            theta <- (1 - lr decay) theta - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

        By torch's fused kernel, which counts the step up itself (eps as there: departure h), a
        slice at a time: what a CPU's cache holds.
        """
        size = chunk_of(self.master.device) // 4
        for at in range(0, len(self.master), size):
            part = slice(at, at + size)
            blocks = slice(at // BLOCK, (at + size) // BLOCK)
            m, v = self.exp_avg[part], self.exp_avg_sq[part]
            if self.coarse:
                m = decode(m, self.exp_avg_scale[blocks], True)
                v = decode(v, self.exp_avg_sq_scale[blocks], False).square_()
            # the kernel counts it up: every slice needs its own
            before = self.steps.float().to(self.master.device)
            adamw([self.master[part]], [self.grad[part]], [m], [v], [], [before], fused=True,
                  amsgrad=False, maximize=False, lr=self.lr, **self.settings)
            if self.coarse:
                self.exp_avg[part], self.exp_avg_scale[blocks] = encode(m, True)
                self.exp_avg_sq[part], self.exp_avg_sq_scale[blocks] = encode(v.sqrt_(), False)
        self.steps += 1
        self.grad.zero_()
        self.write_back()

    def write_back(self):
        """The master's values into the parameters, rounded to their dtype."""
        for slot in self.slots:
            values = self.master[slot.where]
            if hasattr(slot.p, "int8"):
                slot.p.int8.values.copy_(values, non_blocking=True)
            else:
                slot.selected.scatter(slot.p.detach(), values)

    def selected_weights(self):
        """{name: what is selected of it}, {name: its fp32 values there}."""
        selected = {slot.name: slot.selected for slot in self.slots}
        return selected, {slot.name: self.master[slot.where] for slot in self.slots}

    def moved(self):
        """|theta - theta_start| of every selected weight in fp32, flat, on the CPU."""
        return self.master.to("cpu", copy=True).sub_(self.start).abs_()

    def state_dict(self):
        """Everything needed to go on: the flat vectors themselves and the step count."""
        return {key: x for key, x in vars(self).items() if isinstance(x, Tensor) and key != "grad"}

    def load_state_dict(self, state):
        """The inverse of state_dict, of the same mask and state_bits; the parameters get the
        master's values."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self.write_back()


def cosine_lr(step, total, peak, warmup):
    """Rate of step 0..total-1: linear from 0 over the share `warmup`, then a half cosine towards 0.

    As Hugging Face's, but rising starts at peak / warm-up steps: no step is wasted at 0.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total - rising)))
