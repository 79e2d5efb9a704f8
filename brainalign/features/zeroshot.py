"""Zero-shot labels: which of some texts fits each image best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch.nn import functional

from brainalign.errors import ConfigError, SchemaError
from brainalign.features.extraction import Stimuli, images_of
from brainalign.features.models import Model, load_model

__all__ = ["accuracy", "zero_shot"]

TEMPLATES = ("a photo of a {}.",)


def zero_shot(
    model: Model | str,
    stimuli: Stimuli,
    prompts: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 32,
    workers: int = 2,
) -> xr.Dataset:
    r"""Label every image with the text nearest to it.

    .. math:: p(l \mid I) = \mathrm{softmax}_l \; s \cos(v(I), \bar t_l)

    with :math:`\bar t_l` the mean of the unit embeddings of the label's prompts and :math:`s` the
    model's logit scale.

    Parameters
    ----------
    model : Model or str
        A model with a text tower (open_clip, or a CLIP of transformers), or its name.
    stimuli : StimulusSet
        The images.
    prompts : sequence of str, or mapping of str to sequence of str
        Labels, put into `templates`; or the whole prompts of each label.
    templates : sequence of str
        Each with one ``{}`` for the label.
    batch_size, workers : int
        As in `extract`.

    Returns
    -------
    xarray.Dataset
        ``similarity`` and ``probability`` (stimulus, label), ``predicted`` (stimulus).

    Raises
    ------
    ConfigError
        If the model has no text tower, a template no ``{}``, or there are fewer than 2 labels.

    Notes
    -----
    Radford et al. 2021, *Learning transferable visual models from natural language supervision*.
    """
    if isinstance(model, str):
        model = load_model(model)
    if not isinstance(prompts, Mapping):
        bad = [t for t in templates if "{}" not in t]
        if bad or not templates:
            raise ConfigError(f"A template needs {{}} for the label; got {bad or templates}.")
        prompts = {label: [t.replace("{}", label) for t in templates] for label in prompts}
    if len(prompts) < 2 or not all(prompts.values()):
        raise ConfigError("Zero-shot labels need at least 2 labels, each with a prompt.")
    if len(stimuli) == 0:
        raise SchemaError("There are no stimuli to label.")
    labels = list(prompts)
    texts = [t for label in labels for t in prompts[label]]
    owner = torch.tensor([i for i, label in enumerate(labels) for _ in prompts[label]])
    batches = [
        range(i, min(i + batch_size, len(stimuli))) for i in range(0, len(stimuli), batch_size)
    ]
    with torch.no_grad():
        embedded = [
            functional.normalize(model.encode_text(texts[i : i + 256]).float(), dim=-1)
            for i in range(0, len(texts), 256)
        ]
        text = torch.cat(embedded).cpu()
        mean = torch.zeros(len(labels), text.shape[1]).index_add_(0, owner, text)
        mean = functional.normalize(mean, dim=-1)
        parts = [
            functional.normalize(model.encode_image(x.to(model.device)).float(), dim=-1).cpu()
            @ mean.T
            for _, x in images_of(model.transform, stimuli, batches, workers)
        ]
    similarity = torch.cat(parts)
    scale = getattr(model.module, "logit_scale", None)
    factor = 100.0 if scale is None else float(scale.detach().exp())
    probability = (factor * similarity).softmax(-1)
    best = similarity.argmax(-1).numpy()
    return xr.Dataset(
        {
            "similarity": (("stimulus", "label"), similarity.numpy()),
            "probability": (("stimulus", "label"), probability.numpy()),
            "predicted": ("stimulus", np.array(labels)[best]),
        },
        coords={
            "stimulus_id": ("stimulus", stimuli.ids),
            "label": labels,
            "model": model.name,
        },
    )


def accuracy(labelled: xr.Dataset, truth: Sequence[str]) -> float:
    """Return the share of stimuli whose predicted label is the true one.

    Parameters
    ----------
    labelled : xarray.Dataset
        Of `zero_shot`.
    truth : sequence of str
        One label a stimulus, in the same order.

    Raises
    ------
    SchemaError
        If the numbers differ, or a true label was not among those offered.
    """
    true = np.array([str(t) for t in truth])
    predicted = labelled["predicted"].values.astype(str)
    if len(true) != len(predicted):
        raise SchemaError(f"{len(true)} true labels came for {len(predicted)} stimuli.")
    strange = sorted(set(true.tolist()) - set(labelled["label"].values.astype(str).tolist()))
    if strange:
        raise SchemaError(f"True label {strange[0]!r} was not among the labels offered.")
    return float((true == predicted).mean())
