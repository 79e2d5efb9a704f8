"""What single heads are worth, and which of them look at the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from brainalign_kernels.adapters import Attend, parse
from brainalign_kernels.adapters.sites import Site
from brainalign_kernels.adapters.swap import swap_sites
from brainalign_kernels.errors import ShapeError, UnsupportedError
from brainalign_kernels.probes.capture import Captured, observe

__all__ = [
    "HeadImportance",
    "accuracy",
    "head_divergence",
    "head_importance",
    "true_class_probability",
]

Score = Callable[[Any], Tensor | float]


@dataclass(frozen=True)
class HeadImportance:
    """What the scores lose without a head.

    Parameters
    ----------
    baseline : dict of str to float
        The scores of the whole model.
    loss : dict of str to dict of str to Tensor, shape (H,)
        By score and layer: baseline minus the score without the head. Positive: the head helps.
    """

    baseline: dict[str, float]
    loss: dict[str, dict[str, Tensor]]


def head_importance(
    model: nn.Module,
    run: Callable[[], Any],
    score: Score | Mapping[str, Score],
    *,
    layers: int | str | Sequence[int | str] | None = None,
    attention: str | Attend = "softmax",
    ablation: Literal["zero", "mean"] = "zero",
) -> HeadImportance:
    r"""Measure the importance of each head by ablating it.

    .. math:: I_h = s(f) - s(f \text{ without head } h)

    One forward pass per head.

    Parameters
    ----------
    model, run, layers, attention
        See `observe`; here `run` returns what `score` takes.
    score : callable or mapping of str to callable
        Takes the model's output, returns a number, or one per sample, which are averaged; such as
        `true_class_probability` and `accuracy`.
    ablation : {"zero", "mean"}
        Replace the head's output by zeros, or by its mean over the tokens.

    Returns
    -------
    HeadImportance

    Raises
    ------
    ShapeError
        For an unknown ablation.
    UnsupportedError
        If run() calls no attention layer.

    References
    ----------
    Li et al. (2023), How does attention work in vision transformers? A visual analytics attempt.
    """
    if ablation not in ("zero", "mean"):
        raise ShapeError(f"ablation is {ablation!r}; expected 'zero' or 'mean'.")
    scores = dict(score) if isinstance(score, Mapping) else {"score": score}
    chosen = parse(attention)
    heads: dict[str, int] = {}
    target: tuple[str, int] | None = None

    def at(site: Site) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            out = chosen(q, k, v, **options)
            heads.setdefault(site.name, q.shape[1])
            if target is None or target[0] != site.name:
                return out
            out = out.clone()
            one = out[:, target[1]]
            out[:, target[1]] = 0.0 if ablation == "zero" else one.mean(1, keepdim=True)
            return out

        return attend

    def measure() -> dict[str, float]:
        output = run()
        return {
            name: float(torch.as_tensor(f(output)).float().mean()) for name, f in scores.items()
        }

    with swap_sites(model, chosen, at, layers=layers), torch.no_grad():
        baseline = measure()
        if not heads:
            raise UnsupportedError("run() called none of the attention layers.")
        loss = {name: {layer: torch.zeros(n) for layer, n in heads.items()} for name in scores}
        for layer, count in list(heads.items()):
            for head in range(count):
                target = (layer, head)
                for name, value in measure().items():
                    loss[name][layer][head] = baseline[name] - value
    return HeadImportance(baseline, loss)


def true_class_probability(labels: Tensor) -> Score:
    """Return a score: softmax probability of each sample's label, from logits (B, classes).

    Parameters
    ----------
    labels : Tensor of int, shape (B,)

    Returns
    -------
    callable
        For `head_importance`; takes logits, or an output that has them as ``logits``.
    """

    def score(output: Any) -> Tensor:
        logits = _logits(output)
        return logits.float().softmax(-1).gather(-1, labels.to(logits.device)[:, None])[:, 0]

    return score


def accuracy(labels: Tensor) -> Score:
    """Return a score: whether each sample's label has the largest logit.

    Parameters
    ----------
    labels : Tensor of int, shape (B,)

    Returns
    -------
    callable
        For `head_importance`; takes logits, or an output that has them as ``logits``.
    """

    def score(output: Any) -> Tensor:
        logits = _logits(output)
        return (logits.argmax(-1) == labels.to(logits.device)).float()

    return score


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ShapeError("The model's output holds no logits of shape (samples, classes).")
    return logits


def head_divergence(
    model: nn.Module,
    with_image: Callable[[], Any],
    without_image: Callable[[], Any],
    *,
    layers: int | str | Sequence[int | str] | None = None,
    attention: str | Attend = "softmax",
) -> dict[str, Tensor]:
    r"""Vision-aware head divergence: what a head's output owes to the image.

    .. math:: \mathrm{VHD}_{l,h} = \lVert o_{l,h}(\text{image}, \text{text})
                                   - o_{l,h}(\text{text}) \rVert_2

    at the last token of the first pass, from which the first token is generated.

    Parameters
    ----------
    model, layers, attention
        See `observe`; by default the layers that both runs call.
    with_image, without_image : callable
        Do the forward pass, or generate, with the image and the text and with the text alone.

    Returns
    -------
    dict of str to Tensor, shape (B, H)
        By layer. For `select_vision_heads` stack them in the order of layers.

    Raises
    ------
    UnsupportedError
        If no layer is called by both.

    References
    ----------
    He et al. (2025), Cracking the code of hallucination in LVLMs with vision-aware head divergence.
    """
    from brainalign_kernels.vision_heads import vision_aware_head_divergence

    def last(captured: Captured) -> Tensor:
        return captured.out[:, :, -1].clone()

    def look(run: Callable[[], Any]) -> dict[str, Tensor]:
        found = observe(model, run, last, layers=layers, attention=attention)
        return {layer: results[0] for layer, results in found.items()}

    image, text = look(with_image), look(without_image)
    shared = [layer for layer in image if layer in text]
    if not shared:
        raise UnsupportedError("The runs with and without the image share no attention layer.")
    return {
        layer: vision_aware_head_divergence(image[layer], text[layer]).cpu() for layer in shared
    }
