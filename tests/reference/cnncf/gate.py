"""The control gate (Liang et al. 2021, Fig. 6c): predictor's judgement, counter, and gate."""

import torch
from torch import Tensor, nn

SUMS = ("tp", "fn", "tn", "fp")


class Gate(nn.Module):
    """Counts in buffers; `judge` is called after every training step."""

    steps: Tensor
    count: Tensor
    open: Tensor
    since: Tensor
    sensitivity: Tensor
    specificity: Tensor

    def __init__(
        self, window: int, sensitivity: float, specificity: float, needed: int, latch: bool
    ):
        super().__init__()
        self.window, self.needed, self.latch = window, needed, latch
        self.least_sensitivity, self.least_specificity = sensitivity, specificity
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("count", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("open", torch.tensor(False))
        self.register_buffer("since", torch.tensor(-1, dtype=torch.int32))
        for name in SUMS:
            self.register_buffer(name, torch.tensor(0.0))
        for name in ("sensitivity", "specificity"):
            self.register_buffer(name, torch.tensor(-1.0))

    @torch.no_grad()
    def judge(self, given: Tensor, truth: Tensor) -> None:
        """Take a step's predictions in, True where positive; at a window's end, decide."""
        self.steps += 1
        for one, other in zip(given.tolist(), truth.tolist(), strict=True):
            if other:
                self.add("tp" if one else "fn")
            else:
                self.add("fp" if one else "tn")
        if int(self.steps) % self.window:
            return
        tp, fn, tn, fp = (float(getattr(self, name)) for name in SUMS)
        for name in SUMS:
            getattr(self, name).zero_()
        if tp + fn == 0:
            return
        self.sensitivity.fill_(tp / (tp + fn))
        self.specificity.fill_(tn / (tn + fp) if tn + fp else 0.0)
        good = tp / (tp + fn) >= self.least_sensitivity
        good = good and float(self.specificity) >= self.least_specificity
        if good:
            self.count += 1
        else:
            self.count.zero_()
        if int(self.count) >= self.needed:
            if not self.open:
                self.since.copy_(self.steps)
            self.open.fill_(True)
        elif not self.latch:
            self.open.fill_(False)
            self.since.fill_(-1)

    def add(self, name: str) -> None:
        getattr(self, name).add_(1)
