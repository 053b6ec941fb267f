"""AdamW whose state exists for the selected weights only (departures d, e, h), and the learning-rate schedule.

All selected weights of all tensors stand in one flat fp32 vector, the *master*; gradient and moments are flat
vectors beside it. A parameter's dense gradient lives only until backward has finished that parameter: a hook
gathers its selected entries and drops it. So state costs 16 bytes and a 4-byte index per *selected* weight, plus
4 bytes of host memory for where it started.

    tensor A  . x . . x        tensor B  x . .        selected entries x
               |     |                   |
    master   [ a1    a2                  b1 ]          fp32; so are grad, exp_avg and exp_avg_sq

The fp32 master is not optional: a bf16 weight cannot take a step of 5e-7.
"""

import math

import torch
from torch import Tensor


class FlatGradient:
    """Gathers the selected entries of every gradient into one flat fp32 buffer while backward runs.

    named_parameters: pairs of (name, parameter) of any nn.Module; mask: name -> bool tensor, or None for all weights.
    Parameters without a selected entry stop requiring gradients; `close()` undoes everything.
    Raises ValueError when a mask entry is missing or has another shape than its parameter.
    """

    def __init__(self, named_parameters, mask: dict[str, Tensor] | None = None):
        self.slots, self.handles, self.before, size = [], [], [], 0  # slot: name, parameter, indices or None, slice
        for name, p in named_parameters:
            if mask is not None and (name not in mask or mask[name].shape != p.shape):
                raise ValueError(f"the mask does not fit parameter {name} of shape {list(p.shape)}")
            indices, count = None, p.numel()
            if mask is not None:
                indices = mask[name].reshape(-1).nonzero().squeeze(1).to(p.device, torch.int32)
                count = indices.numel()
            if not p.is_contiguous():
                raise ValueError(f"parameter {name} is not contiguous")
            self.before.append((p, p.requires_grad))
            p.requires_grad_(count > 0)
            p.grad = None
            if count:
                self.slots.append((name, p, indices, slice(size, size + count)))
                size += count
        if not self.slots:
            raise ValueError("the mask selects nothing")
        self.grad = torch.zeros(size, dtype=torch.float32, device=self.slots[0][1].device)
        for _, p, indices, where in self.slots:
            self.handles.append(p.register_post_accumulate_grad_hook(self._gather(indices, where)))

    def _gather(self, indices, where):
        def hook(p):
            entries = p.grad.reshape(-1)
            self.grad[where] += entries if indices is None else entries[indices]
            p.grad = None  # the dense gradient ends here
        return hook

    def gather_weights(self) -> Tensor:
        """The selected weights as they stand in the parameters, flat fp32."""
        parts = [p.detach().reshape(-1) if i is None else p.detach().reshape(-1)[i] for _, p, i, _ in self.slots]
        return torch.cat([part.float() for part in parts])

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat vector cut into tensors of the parameters' shapes; needs mask = None."""
        return {name: flat[where].view(p.shape) for name, p, _, where in self.slots}

    def close(self) -> None:
        """Remove the hooks; the parameters are ordinary again."""
        for handle in self.handles:
            handle.remove()
        for p, required in self.before:
            p.grad = None
            p.requires_grad_(required)


class MaskedAdamW(FlatGradient):
    """AdamW (Loshchilov & Hutter 2019) over the selected weights, equal to torch.optim.AdamW on those.

    After it is made, `backward()` leaves no dense .grad behind, and `step()` changes selected entries only: no
    decay, no rounding and no moment ever touches another weight. `state_bits` is 32.
    """

    def __init__(self, named_parameters, mask=None, lr: float = 1e-6, betas=(0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, state_bits: int = 32):
        if state_bits != 32:
            raise ValueError(f"state_bits must be 32, got {state_bits}")
        super().__init__(named_parameters, mask)
        self.lr, self.betas, self.eps, self.weight_decay, self.steps = lr, betas, eps, weight_decay, 0
        self.master = self.gather_weights()
        self.start = self.master.to("cpu", copy=True)  # to say at the end how far the weights have come
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Scale the selected gradient to at most max_norm; return its norm before (departure e)."""
        norm = float(self.grad.norm())
        if norm > max_norm:
            self.grad.mul_(max_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """One update, five verbs; the gradient buffer is empty afterwards."""
        self.steps += 1
        self._decay()
        self._update_moments()
        self._move()
        self.write_back()
        self.grad.zero_()

    def _decay(self):
        if self.weight_decay:
            self.master.mul_(1 - self.lr * self.weight_decay)

    def _update_moments(self):
        self.exp_avg.lerp_(self.grad, 1 - self.betas[0])
        self.exp_avg_sq.mul_(self.betas[1]).addcmul_(self.grad, self.grad, value=1 - self.betas[1])

    def _move(self):
        bias1, bias2 = 1 - self.betas[0] ** self.steps, 1 - self.betas[1] ** self.steps
        denominator = self.exp_avg_sq.sqrt().div_(math.sqrt(bias2)).add_(self.eps)  # eps after bias correction
        self.master.addcdiv_(self.exp_avg, denominator, value=-self.lr / bias1)

    def write_back(self):
        for _, p, indices, where in self.slots:
            values = self.master[where].to(p.dtype)
            if indices is None:
                p.detach().view(-1).copy_(values)
            else:
                p.detach().view(-1).index_copy_(0, indices.long(), values)

    def movement(self) -> dict[str, Tensor]:
        """|theta - theta_start| of every weight in fp32, on the CPU; needs mask = None."""
        return self.named((self.master.cpu() - self.start).abs())

    def largest_change(self) -> float:
        """max |theta - theta_start| over the selected weights."""
        return float((self.master.cpu() - self.start).abs().max())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on: flat tensors and the step count."""
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq,
                "start": self.start, "steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of state_dict; the parameters get the master's values."""
        for name in ("master", "exp_avg", "exp_avg_sq", "start"):
            getattr(self, name).copy_(state[name])
        self.steps = int(state["steps"])
        self.write_back()


def cosine_lr(step: int, total: int, peak: float, warmup_fraction: float) -> float:
    """Learning rate of step 0..total-1: linear from 0 over the first share of steps, then a half cosine to 0.

    As Hugging Face's cosine schedule, but rising starts at peak / warm-up steps, so that no step is wasted at 0.
    """
    warmup = math.ceil(warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
