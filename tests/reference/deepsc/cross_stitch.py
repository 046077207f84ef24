"""The cross-stitch unit (paper, IV-B.2)."""

import torch
from torch import nn


class CrossStitch(nn.Module):
    """`weights`: [[a_LL, a_LC], [a_CL, a_CC]]; the identity, not learnt, in the ablation."""

    weights: torch.Tensor

    def __init__(self, enabled: bool, on: float = 0.9, off: float = 0.1):
        super().__init__()
        if enabled:
            self.weights = nn.Parameter(torch.tensor([[on, off], [off, on]]))
        else:
            self.register_buffer("weights", torch.eye(2), persistent=False)
