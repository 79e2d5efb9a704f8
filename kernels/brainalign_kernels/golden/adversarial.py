"""Adversarial training of attention against the stored files."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from brainalign_kernels.adversarial import (
    AdditiveAttentionPooling,
    adversarial_attention_loss,
    masked_attention,
    score_differences,
)
from brainalign_kernels.golden.check import FLOAT64, GRADIENT64, GoldenFile, Run
from brainalign_kernels.golden.parameters import Place, load_parameters

__all__ = ["attention_adversarial_training"]

PLACES = {
    "attn_layer.attn.0.weight": Place("0.hidden.weight"),
    "attn_layer.attn.0.bias": Place("0.hidden.bias"),
    "attn_layer.attn.2.weight": Place("0.score.weight"),
    "output.weight": Place("1.weight"),
    "output.bias": Place("1.bias"),
}


def attention_adversarial_training(file: GoldenFile) -> Iterator[Run]:
    """Yield the classifier's two passes and the gradients of its loss."""
    meta = file.meta
    hidden, mask = file.tensor("hidden", grad=True), file.tensor("mask")
    label, pos_weight = file.tensor("label")[:, None], file.tensor("pos_weight")
    pooling = AdditiveAttentionPooling(
        hidden.shape[2], file.arrays["param.attn_layer.attn.0.weight"].shape[0]
    ).double()
    output = nn.Linear(hidden.shape[2], 1).double()
    model = nn.ModuleList([pooling, output])
    load_parameters(model, file, PLACES)

    def logits(scores: Tensor) -> Tensor:
        made: Tensor = output(pooling.pool(scores, hidden, mask))
        return made

    def loss(scores: Tensor) -> Tensor:
        each = binary_cross_entropy_with_logits(logits(scores), label, reduction="none")
        return ((label * pos_weight + 1.0 - label) * each).mean()

    scores = pooling.scores(hidden)
    found = adversarial_attention_loss(
        loss,
        scores,
        kind="iAT published code" if meta["kind"] == "iAT" else meta["kind"],
        xi=meta["xi"],
        weight=meta["lam_adv"],
        mask=mask,
    )
    moved = scores + found.perturbation
    values = {
        "scores": scores,
        "attention": masked_attention(scores, mask),
        "attention_first_pass": masked_attention(scores, mask),
        "logit": logits(scores),
        "loss": found.clean,
        "loss_first_pass": found.clean,
        "perturbation_gradient": found.gradient,
        "perturbation": found.perturbation,
        "attention_adv": masked_attention(moved, mask),
        "logit_adv": logits(moved),
        "loss_adv": found.adversarial,
        "loss_total": found.total,
        "directions_normalised": score_differences(scores, between="samples"),
    }
    own = dict(model.named_parameters())
    inputs = {"grad_hidden": hidden}
    inputs |= {f"grad_param.{name}": own[place.name] for name, place in PLACES.items()}
    grads = torch.autograd.grad(found.total, list(inputs.values()))
    yield Run(
        "reference",
        [file.compare(name, got, FLOAT64) for name, got in values.items() if name in file]
        + file.compare_gradients(dict(zip(inputs, grads, strict=True)), GRADIENT64),
    )
