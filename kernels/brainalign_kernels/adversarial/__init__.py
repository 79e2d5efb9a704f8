"""Adversarial and virtual adversarial training of attention scores."""

from brainalign_kernels.adversarial.module import AdditiveAttentionPooling
from brainalign_kernels.adversarial.perturbation import (
    interpretable_perturbation,
    masked_attention,
    score_differences,
    score_perturbation,
)
from brainalign_kernels.adversarial.training import (
    AdversarialLoss,
    VirtualAdversarialLoss,
    adversarial_attention_loss,
    virtual_adversarial_attention_loss,
)

__all__ = [
    "AdditiveAttentionPooling",
    "AdversarialLoss",
    "VirtualAdversarialLoss",
    "adversarial_attention_loss",
    "interpretable_perturbation",
    "masked_attention",
    "score_differences",
    "score_perturbation",
    "virtual_adversarial_attention_loss",
]
