"""Distillation (Hinton et al. 2015), by PyTorch's own divergence."""

from torch import Tensor, nn


def fused(teachers: Tensor, temperature: float) -> Tensor:
    """The mean of the teachers' probabilities, of logits (image, teacher, class)."""
    return (teachers / temperature).softmax(2).mean(1)


def loss(logits: Tensor, teachers: Tensor, temperature: float) -> Tensor:
    """The mean over images of T² KL."""
    student = (logits / temperature).log_softmax(1)
    of_batch = nn.functional.kl_div(student, fused(teachers, temperature), reduction="batchmean")
    return temperature**2 * of_batch
