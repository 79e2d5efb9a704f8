"""What the attention of an image tower costs and how far it reaches, and what the model names."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from brainalign.errors import ConfigError, SchemaError
from brainalign.features.attention import full_attention
from brainalign.features.extraction import Stimuli, images_of
from brainalign.features.models import Model, load_model
from brainalign.features.zeroshot import accuracy, zero_shot

if TYPE_CHECKING:
    from brainalign_kernels.probes import Captured

__all__ = ["profile_attention"]


def profile_attention(
    model: Model | str,
    stimuli: Stimuli,
    *,
    attention: str | None = None,
    prompts: Mapping[str, Sequence[str]] | None = None,
    truth: Sequence[str] | None = None,
    n_images: int = 64,
    batch_size: int = 16,
    repeats: int = 5,
) -> dict[str, Any]:
    r"""Measure the attention of an image tower on images.

    The attention distance of head h is
    :math:`d_h = \tfrac{1}{N} \sum_i \sum_j A_{ij} \lVert x_i - x_j \rVert / \sum_j A_{ij}` over
    patches, A being the weights, or the matrix that a mechanism without weights applies to its
    values; see `brainalign_kernels.probes.attention_distance`. The cost is that of
    `brainalign_kernels.adapters.attention_cost`, summed over layers.

    Parameters
    ----------
    model : Model or str
        An open_clip model with a transformer as its image tower, or its name; on the CPU.
    stimuli : StimulusSet
        The images; the first `n_images` for distance and time.
    attention : str, optional
        Swapped into trained weights: what is then measured is damage.
    prompts : mapping of str to sequence of str, optional
        Zero-shot prompts of each label of `truth`.
    truth : sequence of str, optional
        The label of each stimulus.
    n_images : int
        Images for distance and time.
    batch_size : int
        Images in a pass that is timed.
    repeats : int
        Timed passes over the images; the fastest counts, as other work can only slow one down.

    Returns
    -------
    dict
        JSON-able: ``attention``, ``trained_attention``; ``distance`` (patches, mean over heads and
        layers), ``distance_by_layer`` (layer to heads); ``multiply_adds`` and ``scores`` an image
        (attention of all layers, without projections), ``score_bytes`` in float32, ``parameters``
        of the image tower, ``ms_per_image``, ``machine``; and ``zero_shot`` (``correct``,
        ``chance``, ``n``) or None.

    Raises
    ------
    ConfigError
        If the model has no such tower, or a number is out of range.
    """
    from brainalign_kernels import UnsupportedError
    from brainalign_kernels.adapters import attention_cost
    from brainalign_kernels.probes import attention_distance, observe

    if min(n_images, batch_size, repeats) < 1:
        raise ConfigError(
            "n_images, batch_size and repeats must be 1 or more; they are "
            f"{n_images}, {batch_size} and {repeats}."
        )
    if len(stimuli) == 0:
        raise SchemaError("There are no stimuli to measure attention on.")
    if isinstance(model, str):
        model = load_model(model, device="cpu")
    if model.placed is not None and attention is not None:
        raise ConfigError(
            f"{model.name} was trained with {model.attention!r}: damage is measured in a model "
            "trained with softmax attention."
        )
    spec = model.attention if attention is None else full_attention(attention)
    tower: Any = getattr(model.module, "visual", None)
    if tower is None:
        raise ConfigError(f"{model.name} has no image tower.")
    n = min(n_images, len(stimuli))
    batches = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    images = [x for _, x in images_of(model.transform, stimuli, batches)]

    def run() -> None:
        for x in images:
            tower(x)

    def describe(captured: Captured) -> dict[str, Any]:
        _, heads, _, dim = captured.q.shape
        return {
            "shape": captured.shape, "heads": heads, "dim": dim,
            "value_dim": captured.v.shape[-1], "prefix": captured.prefix,
        }  # fmt: skip

    # Probes look through a softmax model with the mechanism given, so what is placed comes out.
    with _out(model):
        try:
            distance = attention_distance(tower, run, attention=spec)
            layers = observe(tower, lambda: tower(images[0][:1]), describe, attention=spec)
        except UnsupportedError as error:
            raise ConfigError(f"{spec} in {model.name}: {error}") from error
        costs = [attention_cost(spec, **calls[0]) for calls in layers.values()]
        with _swapped(tower, spec):
            seconds = _fastest(run, repeats)
            named = None
            if prompts is not None and truth is not None:
                labelled = zero_shot(model, stimuli, prompts)
                named = {
                    "correct": accuracy(labelled, truth), "chance": 1 / len(prompts),
                    "n": len(stimuli),
                }  # fmt: skip
    scores = sum(c.scores for c in costs)
    return {
        "model": model.name,
        "attention": spec,
        "trained_attention": model.attention,
        "distance": float(np.mean([d.mean().item() for d in distance.values()])),
        "distance_by_layer": {k: v.tolist() for k, v in distance.items()},
        "grid": list(next(iter(layers.values()))[0]["shape"]),
        "multiply_adds": sum(c.multiply_adds for c in costs),
        "scores": scores,
        "score_bytes": 4 * scores,
        "parameters": sum(p.numel() for p in tower.parameters()),
        "ms_per_image": 1000 * seconds / n,
        "machine": f"{platform.machine()}, CPU, threads: {torch.get_num_threads()}, torch "
        f"{torch.__version__}, batches of {batch_size}",
        "zero_shot": named,
    }


@contextlib.contextmanager
def _out(model: Model) -> Any:
    """Take the placed attention out of a model for a while."""
    from brainalign.features.attention import place_attention

    if model.placed is None:
        yield
        return
    model.placed.restore()
    try:
        yield
    finally:
        model.placed = place_attention(model.module, model.attention)


def _swapped(tower: Any, spec: str) -> Any:
    """Put softmax, too, through the adapter, so that times differ by the mechanism alone."""
    from brainalign_kernels.adapters import swap_attention

    return swap_attention(tower, spec)


def _fastest(run: Any, repeats: int) -> float:
    seconds = []
    with torch.no_grad():
        run()
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return min(seconds)
