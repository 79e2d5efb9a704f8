"""Train a very small open_clip model on rendered scenes and their captions.

The result is a folder that open_clip itself loads: ``open_clip.create_model_and_transforms(
"local-dir:FOLDER")`` and ``open_clip.get_tokenizer("local-dir:FOLDER")``.
"""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainalign.data.store import atomic_dir, sha256_file, sha256_of
from brainalign.errors import ConfigError, near
from brainalign.features.attention import ATTENTION_KEY, full_attention, place_attention

from .places import MOMENTS
from .scenes import CATEGORIES, SUBCATEGORIES, Scene, name_of, render_scenes
from .things import COLOURS, FOOD, OBJECTS
from .training import (
    CAPTIONS,
    HELD_OUT_SEED,
    IMAGE_SIZE,
    KINDS,
    augment,
    check_held_out,
    check_run,
    common_options,
    fit,
    half_precision,
    options_parser,
    require,
    soften,
    stored_scenes,
)

if TYPE_CHECKING:
    import torch

__all__ = ["PROMPTS", "TOWERS", "WEIGHTS", "main", "measure", "model_card", "train_clip"]

#: The shipped model's folder.
WEIGHTS = Path(__file__).parent / "weights" / "small_clip"
#: Category -> the words of a zero-shot prompt "a picture of ...".
PROMPTS = {
    "people": "people",
    "bodies": "body parts",
    "places": "a place",
    "words": "words",
    "food": "food",
    "objects": "an object",
}
#: Name of an architecture -> open_clip's settings of its image and text towers. The names that timm
#: gives to its smallest networks begin with "test".
TOWERS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet": {
        "vision": {"width": 16, "layers": [1, 2, 2, 1], "head_width": 64},
        "text": {"width": 128, "heads": 4, "layers": 2},
    },
    # Patches are averaged, so that what a mechanism brings to them is what is read out.
    "vit": {
        "vision": {
            "patch_size": 8, "width": 64, "layers": 4, "head_width": 32, "mlp_ratio": 2.0,
            "pool_type": "avg",
        },
        "text": {"width": 64, "heads": 2, "layers": 1},
    },
    # Grouped convolutions and channel attention, and no spatial attention anywhere.
    "convnet": {
        "vision": {
            "timm_model_name": "test_byobnet", "timm_model_pretrained": False, "timm_pool": "avg",
            "timm_proj": "linear",
        },
        "text": {"width": 64, "heads": 2, "layers": 1},
    },
}  # fmt: skip
_CONTEXT = 32
_WEIGHTS_FILE = "open_clip_model.safetensors"
# Contrast of faint pictures, and the grey towards which they fade.
_FADED, _MIDDLE = (0.15, 1.0), 115.0
# Share of clear pictures in a steady part with the worst changes.
_CLEAR = 0.3
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def _config(vocabulary: int, tower: str) -> dict[str, Any]:
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": IMAGE_SIZE, **TOWERS[tower]["vision"]},
            "text_cfg": {
                "context_length": _CONTEXT, "vocab_size": vocabulary, **TOWERS[tower]["text"],
                "hf_tokenizer_name": "small-clip",
            },
        },
        "preprocess_cfg": {
            "size": IMAGE_SIZE, "mode": "RGB", "mean": list(_MEAN), "std": list(_STD),
            "interpolation": "bicubic", "resize_mode": "shortest",
        },
    }  # fmt: skip


def _fit_tokenizer(texts: list[str]) -> Any:
    """Fit a byte-level BPE to `texts`.

    The end token has the highest id, which is where CLIP's text tower reads its output.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1023, special_tokens=["<pad>", "<start>"], show_progress=False,
        min_frequency=20, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<end>"])
    ids = [(t, tokenizer.token_to_id(t)) for t in ("<start>", "<end>")]
    tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=ids)
    tokenizer.enable_truncation(_CONTEXT)
    tokenizer.enable_padding(length=_CONTEXT, pad_id=0, pad_token="<pad>")
    return tokenizer


def _read_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files from which `transformers.AutoTokenizer` loads."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": _CONTEXT,
        "pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def _loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor) -> Any:
    """CLIP's symmetric cross-entropy, with every picture of an identical caption a match."""
    from torch.nn import functional

    logits = scale * image @ text.T
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (
        functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    )


def train_clip(
    out_folder: Path | str,
    *,
    n_scenes: int = 12_000,
    steps: int = 1200,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | str | None = None,
    scenes: Path | str | None = None,
    tower: str = "resnet",
    attention: str = "softmax",
    start: Path | str | None = None,
    steady_steps: int = 0,
    steady_radius: float = 0.0,
    steady_faint: float = 0.0,
    steady_grey: float = 0.0,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    save_every: int = 100,
    stop_at: int | None = None,
    n_measure: int = 1200,
    overwrite: bool = False,
) -> Path | None:
    r"""Train the small model on scenes rendered on the spot and write it for open_clip.

    Minimises CLIP's symmetric cross-entropy over batches of pictures :math:`x_i` and captions
    :math:`t_j`, with logits :math:`\exp(s) \cos(f(x_i), g(t_j))`; pictures that share a caption
    word for word are all matches of it. To this the cross-entropies of telling a picture's
    category among the names of all, and its sub-category likewise, are added.

    With `steady_steps` the image tower then learns to give pictures that are moved, softened and
    noisy, and in shares `steady_faint` and `steady_grey` of lower contrast and without colour (T),
    the embedding that it gave the clear ones before,

    .. math:: \lVert f(T x) - f_0(x) \rVert^2 / \overline{\lVert f_0 \rVert}^2,

    so that its gradient at an image points at what is seen rather than at noise. With a
    `steady_radius` r the loss is its maximum over small changes, as it is found by two steps of
    ascent,

    .. math:: \max_{\lVert \delta \rVert \le r}
        \lVert f(T x + \delta) - f_0(x) \rVert^2 / \overline{\lVert f_0 \rVert}^2 :

    a change of that size which another network does not see does not move the embedding either.
    Three pictures in ten are then left as they are (T x = x), or clear pictures were named worse.

    Parameters
    ----------
    out_folder : path
        Gets ``open_clip_config.json``, ``open_clip_model.safetensors`` (float16), the tokenizer's
        files, ``training.json`` (settings and measured quality) and ``MODEL_CARD.md``.
    n_scenes : int
        Number of scenes to learn from.
    steps : int
        Number of updates; 0 only with `start`.
    seed : int
        Names the scenes and draws the first weights and the batches; below 10000, the seeds from
        there on being kept for measuring.
    device : str
        Where torch computes.
    checkpoint : path, optional
        A folder for rendered scenes and the state every `save_every` steps; training goes on from
        there where it was cut off and gives the same weights as an uncut run.
    scenes : path, optional
        The folder for rendered scenes, where several runs share them; default `checkpoint`.
    tower : str
        A key of `TOWERS`: CLIP's residual network, a transformer, or timm's smallest `ByobNet`.
    attention : str
        The mechanism in every attention layer of the image tower, from the first step on, such as
        ``"neighborhood:k=3"``; see `brainalign_kernels.adapters.parse`. It has no parameters: with
        one seed, runs of all mechanisms begin with the same weights and see the same batches. The
        folder records it, and `brainalign.features.load_model` puts it in place again.
    start : path, optional
        A folder of this function whose weights and tokenizer are begun with; what was made from
        its embeddings or its text tower stays valid after ``steps=0`` and a steady part.
    steady_steps : int
        Updates of the second part; its checkpoint lies in ``steady`` of `checkpoint`.
    steady_radius : float
        Largest Euclidean length of the changes of a whole standardised picture; 0 for none.
    steady_faint : float
        Share of the second part's pictures that keep only 15 to 100 % of their contrast.
    steady_grey : float
        Share that lose their colour, drawn by itself: such a picture may be faint as well.
    batch_size : int
        Pictures per update.
    learning_rate : float
        Peak of the schedule (linear warm-up, cosine decay); half of it in the second part.
    save_every : int
        Steps between two checkpoints.
    stop_at : int, optional
        Stop after this step and leave only the checkpoint, to be gone on with later.
    n_measure : int
        Held-out scenes for the model card.
    overwrite : bool
        Whether to replace `out_folder`.

    Returns
    -------
    Path or None
        `out_folder`; None where `stop_at` ended the run early.

    Raises
    ------
    ConfigError
        If numbers make no sense, the mechanism is unknown or cannot go into the tower, `start` has
        another architecture, or the checkpoint belongs to other settings.

    References
    ----------
    Radford et al. (2021), Learning transferable visual models from natural language supervision,
    ICML. Madry et al. (2018), Towards deep learning models resistant to adversarial attacks, ICLR.
    """
    require("open_clip", "transformers")
    out_folder = Path(out_folder)
    check_run(out_folder, seed, checkpoint, stop_at, overwrite)
    least = 0 if start else 1
    if n_scenes < batch_size or steps < least or batch_size < 2:
        raise ConfigError(
            f"Training needs steps >= {least} and n_scenes >= batch_size >= 2; got steps={steps}, "
            f"n_scenes={n_scenes}, batch_size={batch_size}."
        )
    if steady_radius < 0:
        raise ConfigError(f"steady_radius must not be negative; got {steady_radius}.")
    for name, share in {"steady_faint": steady_faint, "steady_grey": steady_grey}.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} is a share in 0..1; got {share}.")
    if tower not in TOWERS:
        raise ConfigError(f"There is no tower {tower!r}.{near(tower, TOWERS)}")
    settings = {
        "n_scenes": n_scenes, "steps": steps, "seed": seed, "batch_size": batch_size,
        "learning_rate": learning_rate, "tower": tower, "attention": full_attention(attention),
    }  # fmt: skip
    if start:
        settings["start"] = sha256_file(Path(start) / _WEIGHTS_FILE)
    folder = Path(checkpoint) if checkpoint else None
    shared = Path(scenes) if scenes else folder
    rendered = stored_scenes(n_scenes, seed, shared)
    begun = Path(start) if start else None
    model, tokenizer, done = _train(settings, rendered, device, folder, save_every, stop_at, begun)
    if done < steps:
        return None
    if steady_steps:
        images = rendered[0]
        settings |= {
            "steady_steps": steady_steps, "steady_radius": steady_radius,
            "steady_faint": steady_faint, "steady_grey": steady_grey,
        }  # fmt: skip
        _steady(model, images, settings, device, folder and folder / "steady", save_every)
    out_folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(out_folder, overwrite=overwrite) as made:
        _write_model(model, tokenizer, settings, made)
        count = sum(p.numel() for p in model.parameters())
        measured = measure(made, n=n_measure)
        card = model_card(out_folder.name.replace("_", "-"), measured, settings, count)
        (made / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        record = {"settings": settings, "parameters": count, "measured": measured}
        (made / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return out_folder


def _write_model(model: Any, tokenizer: Any, settings: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    config = _config(tokenizer.get_vocab_size(), settings["tower"])
    config[ATTENTION_KEY] = settings["attention"]
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_tokenizer(tokenizer, folder)
    save_file(half_precision(model), folder / _WEIGHTS_FILE, metadata={"format": "pt"})


def _begin(
    model: torch.nn.Module, config: dict[str, Any], settings: dict[str, Any], folder: Path
) -> None:
    """Give the model the weights of a folder, if that is of the same architecture."""
    from safetensors.torch import load_file

    found = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    wanted = {**config["model_cfg"], ATTENTION_KEY: settings["attention"]}
    has = {**found["model_cfg"], ATTENTION_KEY: found.get(ATTENTION_KEY, "softmax")}
    if has != wanted:
        differ = ", ".join(k for k in wanted if has.get(k) != wanted[k])
        raise ConfigError(
            f"The model in {folder} cannot be begun with: it is not of tower {settings['tower']!r} "
            f"with attention {settings['attention']!r} (they differ in {differ})."
        )
    model.load_state_dict(load_file(folder / _WEIGHTS_FILE))


def _standardised(pictures: np.ndarray) -> torch.Tensor:
    """Return pictures (picture, side, side, 3) of 0..255 as the image tower sees them."""
    import torch

    x = torch.from_numpy(np.ascontiguousarray(pictures, dtype=np.float32))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
    return (x.permute(0, 3, 1, 2) / 255 - mean) / std


def _train(
    settings: dict[str, Any],
    scenes: tuple[np.ndarray, list[list[str]], list[int]],
    device: str,
    folder: Path | None,
    save_every: int,
    stop_at: int | None,
    start: Path | None,
) -> tuple[Any, Any, int]:
    """Return the model, its tokenizer and the step it has reached."""
    import open_clip
    import torch
    from torch.nn.functional import cross_entropy

    seed = settings["seed"]
    images, texts, listed = scenes
    flat = [text for group in texts for text in group]
    kinds = torch.tensor(listed, device=device)
    groups = torch.tensor([CATEGORIES.index(c) for c, _ in KINDS], device=device)[kinds]
    tokenizer = _read_tokenizer(start) if start else _fit_tokenizer(flat)
    tokens = np.array([e.ids for e in tokenizer.encode_batch(flat)], np.int16)
    tokens = tokens.reshape(len(texts), CAPTIONS, _CONTEXT)
    settings = {**settings, "tokenizer": sha256_of(tokenizer.to_str())}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _config(tokenizer.get_vocab_size(), settings["tower"])
        model = open_clip.CLIP(**config["model_cfg"])
    if start:
        _begin(model, config, settings, start)
    model.to(device)
    place_attention(model, settings["attention"])
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    free = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}],
        lr=settings["learning_rate"], betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip

    def loss_of(step: int, chosen: np.ndarray) -> torch.Tensor:
        rng = np.random.default_rng([seed, 2, step])
        pictures = _standardised(augment(images[chosen], rng)).to(device)
        told = tokens[chosen, rng.integers(0, CAPTIONS, len(chosen))]
        said = torch.from_numpy(told.astype(np.int64)).to(device)
        image = model.encode_image(pictures, normalize=True)
        scale = model.logit_scale.exp()
        loss = _loss(image, model.encode_text(said, normalize=True), scale, said)
        names = [name_of(c, variant=int(rng.integers(100))) for c in CATEGORIES]
        names += [name_of(c, k, variant=int(rng.integers(100))) for c, k in KINDS]
        listed_ids = torch.tensor([e.ids for e in tokenizer.encode_batch(names)], device=device)
        logits = scale * image @ model.encode_text(listed_ids, normalize=True).T
        few = len(CATEGORIES)
        loss = loss + cross_entropy(logits[:, :few], groups[chosen])
        return loss + cross_entropy(logits[:, few:], kinds[chosen])

    def after_step() -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    done = fit(
        model, optimiser, loss_of, len(images), settings, folder, save_every=save_every,
        stop_at=stop_at, after_step=after_step,
    )  # fmt: skip
    return model, tokenizer, done


def _steady(
    model: Any,
    images: np.ndarray,
    settings: dict[str, Any],
    device: str,
    folder: Path | None,
    save_every: int,
) -> None:
    """Teach the image tower to see through softness, noise, small movements and changes."""
    import torch

    seed, tower, radius = settings["seed"], model.visual, settings["steady_radius"]
    tower.eval()
    with torch.no_grad():
        parts = [
            model.encode_image(_standardised(images[i : i + 256]).to(device))
            for i in range(0, len(images), 256)
        ]
    wanted = torch.cat(parts)
    size = float(wanted.norm(dim=1).mean()) ** 2
    half = {
        **settings, "steps": settings["steady_steps"],
        "learning_rate": settings["learning_rate"] / 2,
    }  # fmt: skip
    optimiser = torch.optim.AdamW(tower.parameters(), lr=half["learning_rate"], weight_decay=0.02)

    def loss_of(step: int, chosen: np.ndarray) -> torch.Tensor:
        rng = np.random.default_rng([seed, 5, step])
        pictures = augment(images[chosen], rng)
        clear = round(_CLEAR * len(pictures)) if radius else 0
        kept = _standardised(pictures[:clear]).to(device)
        rest = _fade(pictures[clear:], settings["steady_faint"], settings["steady_grey"], rng)
        shown = soften(_standardised(rest), rng).to(device)
        if radius:
            tower.eval()
            shown = shown + _worst_change(tower, shown, wanted[chosen[clear:]], radius, rng)
            tower.train()
        shown = torch.cat([kept, shown])
        return (tower(shown) - wanted[chosen]).square().sum(1).mean() / size

    fit(
        tower, optimiser, loss_of, len(images), half, folder, name="steady",
        save_every=save_every, clip_norm=None,
    )  # fmt: skip


def _fade(pictures: np.ndarray, faint: float, grey: float, rng: np.random.Generator) -> np.ndarray:
    """Take contrast and colour from shares of pictures (picture, side, side, 3) of 0..255."""
    drawn = rng.random((2, len(pictures), 1, 1, 1))
    contrast = rng.uniform(*_FADED, (len(pictures), 1, 1, 1)).astype(np.float32)
    pictures = np.where(drawn[0] < grey, pictures.mean(-1, keepdims=True), pictures)
    return np.where(drawn[1] < faint, contrast * pictures + (1 - contrast) * _MIDDLE, pictures)


def _worst_change(
    tower: Any,
    pictures: torch.Tensor,
    wanted: torch.Tensor,
    radius: float,
    rng: np.random.Generator,
    steps: int = 2,
) -> torch.Tensor:
    """Return changes no longer than `radius` that move embeddings far from the wanted ones."""
    import torch

    def scaled(x: torch.Tensor, most: float | None = None) -> torch.Tensor:
        """Give each picture the length 1, or `most` where it is longer than that."""
        length = x.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(most or 1e-12)
        return x * ((most or 1.0) / length)

    drawn = torch.from_numpy(rng.standard_normal(tuple(pictures.shape), dtype=np.float32))
    change = scaled(drawn.to(pictures.device), radius / 2)
    for _ in range(steps):
        change.requires_grad_()
        away = (tower(pictures + change) - wanted).square().sum()
        (uphill,) = torch.autograd.grad(away, change)
        change = scaled(change.detach() + 1.5 * radius / steps * scaled(uphill), radius)
    return change


def measure(folder: Path | str, *, n: int = 1200, seed: int = HELD_OUT_SEED) -> dict[str, Any]:
    """Measure a model of `train_clip` on held-out scenes, loading it by name.

    Parameters
    ----------
    folder : path
        The model; its recorded attention is put in place.
    n : int
        Number of scenes, of all categories in turn.
    seed : int
        Names the scenes; 10000 or more, as training never uses those.

    Returns
    -------
    dict
        ``category``, ``subcategory`` (within its category), ``colour`` (of food and objects, among
        all colours), ``number`` (of food and objects, one to three), ``moment`` (of outdoor
        places): each a dict with the share ``correct`` in 0..1, ``chance`` and ``n``;
        ``by_category``: share correct of each category; ``retrieval``: share of pictures whose own
        caption is the nearest among 100, likewise.

    Raises
    ------
    ConfigError
        If `seed` is one that training may have used.
    """
    require("open_clip", "transformers")
    import torch
    from PIL import Image
    from torch.nn.functional import normalize

    from brainalign.features import load_model

    check_held_out(seed)
    model = load_model(f"open_clip:local-dir:{folder}", device="cpu")
    scenes = render_scenes(n, seed=seed)

    @torch.inference_mode()
    def say(texts: list[str]) -> np.ndarray:
        return normalize(model.encode_text(texts), dim=-1).numpy()

    @torch.inference_mode()
    def look(shown: list[Scene]) -> np.ndarray:
        pictures = torch.stack([model.transform(Image.fromarray(s.image)) for s in shown])
        return normalize(model.encode_image(pictures), dim=-1).numpy()

    seen = np.concatenate([look(scenes[i : i + 64]) for i in range(0, n, 64)])

    def share(hits: list[bool], chance: float) -> dict[str, Any]:
        return {
            "correct": float(np.mean(hits)) if hits else math.nan, "chance": chance, "n": len(hits)
        }  # fmt: skip

    known: dict[tuple[str, ...], np.ndarray] = {}

    def choose(i: int, texts: list[str]) -> int:
        key = tuple(texts)
        if key not in known:
            known[key] = say(texts)
        return int(np.argmax(known[key] @ seen[i]))

    by_category: dict[str, list[bool]] = {c: [] for c in CATEGORIES}
    hits: dict[str, list[bool]] = {k: [] for k in ("subcategory", "colour", "number", "moment")}
    prompts = [f"a picture of {PROMPTS[c]}" for c in CATEGORIES]
    for i, scene in enumerate(scenes):
        kind, what = scene.subcategory, scene.attributes
        by_category[scene.category].append(CATEGORIES[choose(i, prompts)] == scene.category)
        names = SUBCATEGORIES[scene.category]
        hits["subcategory"].append(names[choose(i, [_named(k) for k in names])] == kind)
        if scene.category in ("food", "objects"):
            plural = {**FOOD, **OBJECTS}[kind].plural or kind + "s"
            counts = [_named(kind), f"a picture of two {plural}", f"a picture of three {plural}"]
            hits["number"].append(choose(i, counts) + 1 == what["number"])
            if what["colour"] and what["number"] == 1:
                colours = list(COLOURS)
                texts = [_named(f"{colour} {kind}") for colour in colours]
                hits["colour"].append(colours[choose(i, texts)] == what["colour"])
        if scene.category == "places" and kind not in ("kitchen", "bedroom"):
            moments = list(MOMENTS)
            texts = [f"{_named(kind)} {MOMENTS[m]}" for m in moments]
            hits["moment"].append(moments[choose(i, texts)] == what["moment"])
    similar: list[bool] = []
    for start in range(0, n - 99, 100):
        own = say([s.caption for s in scenes[start : start + 100]])
        nearest = (seen[start : start + 100] @ own.T).argmax(1)
        similar += [
            scenes[start + int(j)].caption == scenes[start + i].caption
            for i, j in enumerate(nearest)
        ]
    kinds = np.mean([1 / len(v) for v in SUBCATEGORIES.values()])
    return {
        "category": share([h for c in CATEGORIES for h in by_category[c]], 1 / len(CATEGORIES)),
        "subcategory": share(hits["subcategory"], float(kinds)),
        "colour": share(hits["colour"], 1 / len(COLOURS)),
        "number": share(hits["number"], 1 / 3),
        "moment": share(hits["moment"], 1 / len(MOMENTS)),
        "retrieval": share(similar, 0.01),
        "by_category": {c: float(np.mean(v)) for c, v in by_category.items() if v},
        "seed": seed,
    }


def _named(thing: str) -> str:
    if thing in ("mountains", "letters"):
        return f"a picture of {thing}"
    return f"a picture of {'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _described(tower: str, attention: str) -> tuple[str, str]:
    """Return the architecture in words, and how it is loaded."""
    vision, text = TOWERS[tower]["vision"], TOWERS[tower]["text"]
    if tower == "resnet":
        blocks = ", ".join(map(str, vision["layers"]))
        image = f"""CLIP's
ResNet with attention pooling (width {vision["width"]}, blocks {blocks}, pictures of
{IMAGE_SIZE} x {IMAGE_SIZE}; `visual.layer1` to `visual.layer4`, then `visual.attnpool`)"""
    elif tower == "convnet":
        image = f"""timm's
`{vision["timm_model_name"]}` (mixed residual blocks of up to 256 channels with grouped convolutions
and channel attention, pictures of {IMAGE_SIZE} x {IMAGE_SIZE}, average pooling;
`visual.trunk.stages.0` to `visual.trunk.stages.3`)"""
    else:
        side = IMAGE_SIZE // vision["patch_size"]
        image = f"""a
vision transformer (width {vision["width"]}, {vision["layers"]} layers, pictures of {IMAGE_SIZE} x
{IMAGE_SIZE} in {side} x {side} patches, which are averaged; `visual.transformer.resblocks.*`)
whose attention is `{attention}`"""
    words = f"""{image} and a causal text
transformer (width {text["width"]}, layers: {text["layers"]}, {_CONTEXT} tokens, byte-level BPE)"""
    if attention == "softmax":
        return (
            words,
            """import open_clip

model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
        )
    return (
        words,
        f"""from brainalign.features import load_model

# open_clip alone would compute softmax attention, which these weights were not trained with.
model = load_model("open_clip:local-dir:FOLDER", trained_attention="{attention}")""",
    )


def model_card(
    name: str, measured: dict[str, Any], settings: dict[str, Any], n_parameters: int
) -> str:
    """Return the text of ``MODEL_CARD.md``: what the model is, how it was made, how good it is."""
    rows = {
        "category": 'one of six, "a picture of food"',
        "subcategory": 'within the category, "a picture of a hammer"',
        "colour": f'of one item of food or object, among {len(COLOURS)}, "a picture of a red car"',
        "number": 'one, two or three, "a picture of two cups"',
        "moment": 'sun, sunset, night or snow outdoors, "a picture of a beach at night"',
        "retrieval": "the own full caption among 100",
    }
    table = "\n".join(
        f"| {task} | {text} | {100 * measured[task]['correct']:.1f} % | "
        f"{100 * measured[task]['chance']:.1f} % | {measured[task]['n']} |"
        for task, text in rows.items()
    )
    each = ", ".join(f"{c} {100 * v:.1f} %" for c, v in measured["by_category"].items())
    architecture, loading = _described(settings["tower"], settings["attention"])
    prompts = ", ".join(f'"a picture of {p}" ({c})' for c, p in PROMPTS.items())
    told = [
        f"{settings['n_scenes']:,} scenes drawn by `brainalign.small_models.scenes` (people, "
        "bodies, places, words, food, objects; colour, number, place, size, background and light "
        f"vary), {CAPTIONS} captions each; AdamW, batch {settings['batch_size']}, seed "
        f"{settings['seed']}, float32 on the CPU."
    ]
    if settings.get("start"):
        told.append("Training began with the weights of a model of the same architecture.")
    if settings["steps"]:
        told.append(
            f"{settings['steps']:,} steps, peak learning rate {settings['learning_rate']:g}: the "
            "loss is CLIP's between pictures and captions, plus the cross-entropies of naming the "
            "category and the sub-category."
        )
    if settings.get("steady_steps"):
        told.append(
            f"In {settings['steady_steps']:,} steps, peak learning rate "
            f"{settings['learning_rate'] / 2:g}, the image tower alone learnt to give moved, "
            "softened and noisy pictures the embeddings of the clear ones"
            + (
                ", also after the worst small change that two steps of ascent found (of length "
                f"{settings['steady_radius']:g} in a standardised picture), {100 * _CLEAR:g} % of "
                "them left clear"
                if settings.get("steady_radius")
                else ""
            )
            + "".join(
                f"; {100 * settings[key]:g} % of the pictures had lost {what}"
                for key, what in (
                    ("steady_faint", "a part of their contrast"),
                    ("steady_grey", "their colour"),
                )
                if settings.get(key)
            )
            + "."
        )
    told.append("Made by `python -m brainalign.small_models.clip`.")
    training = textwrap.fill(" ".join(told), 99)
    return f"""# {name}

A very small CLIP ({n_parameters / 1e6:.2f} million parameters, stored as float16) for machines
without a network, tests and demonstrations. It is an ordinary open_clip model: {architecture},
with a shared space of 128 dimensions.

```python
{loading}
```

## Training

{training}

## Measured

On {measured["category"]["n"]:,} held-out scenes (seed {measured["seed"]}; training seeds stay below
{HELD_OUT_SEED}), zero-shot, one prompt per answer, no ensembles.

| what | choice | correct | chance | scenes |
|---|---|---|---|---|
{table}

By category: {each}. Prompts: {prompts}.

## Limits

It has seen rendered scenes only: on photographs its zero-shot answers mean little. It does not
read: it tells a word from a number by its look, not what is written. It knows the words of its
captions and no others. It is trained most on what is shown and less on its colour and number: the
table says how far those can be trusted.
"""


def main(arguments: list[str] | None = None) -> int:
    """Train from the command line; see ``--help``."""
    parser = options_parser(
        "clip", "Train a very small open_clip model on rendered scenes.", scenes=12_000,
        steps=1200, seed=0, measured=(1200, "held-out scenes of the card"),
    )  # fmt: skip
    parser.add_argument("--render-only", action="store_true", help="fill --scenes-folder and end")
    parser.add_argument("--tower", choices=TOWERS, default="resnet", help="of images")
    parser.add_argument("--attention", default="softmax", help="such as neighborhood:k=3")
    parser.add_argument("--start", type=Path, help="model folder whose weights are begun with")
    parser.add_argument(
        "--steady-steps", type=int, default=0, help="updates on softened pictures at the end"
    )
    parser.add_argument(
        "--steady-radius", type=float, default=0.0,
        help="length of the worst changes of these, in standardised pictures",
    )  # fmt: skip
    for name, lost in {"faint": "contrast", "grey": "colour"}.items():
        parser.add_argument(
            f"--steady-{name}", type=float, default=0.0, help=f"share of these that lose {lost}"
        )
    parser.add_argument("--batch-size", type=int, default=64, help="pictures per update")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="its peak")
    chosen = parser.parse_args(arguments)
    if chosen.render_only:
        if chosen.scenes_folder is None:
            parser.error("--render-only needs --scenes-folder")
        stored_scenes(chosen.scenes, chosen.seed, chosen.scenes_folder)
        return 0
    out, common = common_options(parser, chosen)
    train_clip(
        out, **common, tower=chosen.tower, attention=chosen.attention,
        start=chosen.start, steady_steps=chosen.steady_steps, steady_radius=chosen.steady_radius,
        steady_faint=chosen.steady_faint, steady_grey=chosen.steady_grey,
        batch_size=chosen.batch_size, learning_rate=chosen.learning_rate,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
