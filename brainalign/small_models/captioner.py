"""Train a very small caption decoder of ClipCap's form on embeddings of rendered scenes.

The result is a folder that `brainalign.captioning.load_captioner` loads; it takes the embeddings of
the small CLIP model, and mixtures of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainalign.captioning import ClipCap, first_mentioned, load_captioner, project
from brainalign.data.store import atomic_file, sha256_file
from brainalign.errors import ConfigError

from .clip import WEIGHTS as SMALL_CLIP
from .scenes import CATEGORIES, SUBCATEGORIES, captions, name_of, render_scenes
from .training import (
    CAPTIONS,
    HELD_OUT_SEED,
    KINDS,
    check_held_out,
    check_run,
    common_options,
    fit,
    options_parser,
    require,
    stored_scenes,
)

__all__ = ["WEIGHTS", "main", "measure", "model_card", "named", "train_captioner"]

#: The shipped decoder's folder.
WEIGHTS = Path(__file__).parent / "weights" / "small_captioner"
_PREFIX, _WIDTH, _LAYERS, _HEADS, _POSITIONS = 10, 128, 3, 4, 80
_MOST_MIXED = 32


def named(text: str) -> tuple[str | None, str | None]:
    """Return the category and the sub-category that a caption of scenes names.

    Parameters
    ----------
    text : str
        A caption; what it names first counts, since backgrounds and clothes come later.

    Returns
    -------
    category, subcategory : str or None
        None where nothing known is named, or the category only by a general word.
    """
    # Ways to name a category without a beginning such as "a photo of".
    general = {c: [name_of(c, variant=v) for v in range(0, 40, 5)] for c in CATEGORIES}
    bare = {c: [g.removeprefix("an ").removeprefix("a ") for g in general[c]] for c in CATEGORIES}
    categories = {c: [*bare[c], *SUBCATEGORIES[c]] for c in CATEGORIES}
    category = first_mentioned(text, categories)
    if category is None:
        return None, None
    # "food: two cakes" says the category first, "a photo of food" nothing else.
    rest = text.rstrip(".").partition(": ")[2] or text.rstrip(".")
    if rest in {name_of(category, variant=v) for v in range(40)}:
        return category, None
    return category, first_mentioned(rest, {k: [k] for k in SUBCATEGORIES[category]})


def _embed(
    images: Sequence[NDArray[np.uint8]], clip: Path | str, device: str
) -> NDArray[np.float32]:
    import torch
    from PIL import Image

    from brainalign.features import load_model

    model = load_model(f"open_clip:local-dir:{clip}", device=device)
    out = []
    with torch.inference_mode():
        for start in range(0, len(images), 64):
            x = [model.transform(Image.fromarray(i)) for i in images[start : start + 64]]
            out.append(model.encode_image(torch.stack(x).to(model.device)).float().cpu().numpy())
    return np.concatenate(out)


def _data(
    settings: dict[str, Any],
    clip: Path | str,
    folder: Path | None,
    scenes: Path | None,
    device: str,
) -> tuple[NDArray[np.float32], list[list[str]], NDArray[np.intp]]:
    """Return embeddings, captions and kinds of the scenes; embeddings are kept in `folder`."""
    images, texts, kinds = stored_scenes(settings["n_scenes"], settings["seed"], scenes)
    kept = None if folder is None else folder / f"embeddings-{settings['clip'][:12]}.npy"
    if kept is not None and kept.exists():
        x = np.load(kept, allow_pickle=False)
    else:
        x = _embed(list(images), clip, device)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(kept) as made:
                np.save(made, x, allow_pickle=False)
    return x, texts, np.array(kinds)


def _clip_name(clip: Path | str) -> str:
    """Return the name under which `load_model` gives the CLIP model of a folder."""
    file = "open_clip_model.safetensors"
    same = sha256_file(Path(clip) / file) == sha256_file(SMALL_CLIP / file)
    return "small-clip" if same else f"open_clip:local-dir:{clip}"


def _new(seed: int, clip: Path | str) -> ClipCap:
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(str(clip), local_files_only=True)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=_POSITIONS, n_embd=_WIDTH, n_layer=_LAYERS,
        n_head=_HEADS, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gpt = GPT2LMHeadModel(config)
        return ClipCap(gpt, tokenizer, 128, prefix_length=_PREFIX, clip=_clip_name(clip))


def _mixture(
    x: NDArray[np.float32], rows: NDArray[np.intp], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Mix some embeddings as a projection does: convex in directions, with a typical norm."""
    some = rng.choice(rows, size=min(len(rows), int(rng.integers(2, _MOST_MIXED + 1))))
    norm = np.linalg.norm(x[some], axis=1)
    share = rng.dirichlet(np.full(len(some), rng.uniform(0.2, 2.0)))
    mean = share @ (x[some] / norm[:, None])
    return (share @ norm) * mean / np.linalg.norm(mean)


def train_captioner(
    out_folder: Path | str,
    *,
    clip: Path | str = SMALL_CLIP,
    n_scenes: int = 6000,
    steps: int = 1500,
    seed: int = 1,
    mixtures: float = 0.4,
    device: str = "cpu",
    checkpoint: Path | str | None = None,
    scenes: Path | str | None = None,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    save_every: int = 200,
    stop_at: int | None = None,
    n_measure: int = 600,
    overwrite: bool = False,
) -> Path | None:
    r"""Train the small decoder on scenes and write it with its card.

    Minimises the cross-entropy of the tokens of a caption, which ends in a full stop, after the
    prefix that is made of the embedding,

    .. math:: -\sum_i \log p(t_i \mid f(x), t_{<i})

    Parameters
    ----------
    out_folder : path
        Gets the configuration, weights (float16), tokenizer and ``MODEL_CARD.md``.
    clip : path
        Folder of the small CLIP model whose embeddings are put into words.
    n_scenes : int
        Scenes to learn from.
    steps : int
        Updates.
    seed : int
        Names the scenes (the small CLIP learned from those of seed 0) and draws weights and
        batches; below 10000.
    mixtures : float
        Share, 0 to 1, of examples whose embedding is a convex mixture of up to 32 of one category
        or sub-category, and whose caption is its name: what projections of voxels look like.
    device : str
        Where torch computes.
    checkpoint : path, optional
        A folder for embeddings and the state every `save_every` steps; training goes on from there
        and gives the same weights as an uncut run.
    scenes : path, optional
        The folder for rendered scenes, where several runs share them; default `checkpoint`.
    batch_size : int
        Captions per update.
    learning_rate : float
        Peak of the schedule.
    save_every : int
        Steps between two checkpoints.
    stop_at : int, optional
        Stop after this step and leave only the checkpoint.
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
        If numbers make no sense, or the checkpoint belongs to other settings.
    """
    require("open_clip", "transformers")
    out_folder = Path(out_folder)
    check_run(out_folder, seed, checkpoint, stop_at, overwrite)
    if n_scenes < batch_size or steps < 1:
        raise ConfigError(
            "Training needs steps >= 1 and n_scenes >= batch_size; got "
            f"steps={steps}, n_scenes={n_scenes}, batch_size={batch_size}."
        )
    if not 0 <= mixtures <= 1:
        raise ConfigError(f"mixtures is {mixtures}; expected a share between 0 and 1.")
    settings = {
        "n_scenes": n_scenes, "steps": steps, "seed": seed, "mixtures": mixtures,
        "batch_size": batch_size, "learning_rate": learning_rate,
        "clip": sha256_file(Path(clip) / "open_clip_model.safetensors"),
    }  # fmt: skip
    folder = Path(checkpoint) if checkpoint else None
    shared = Path(scenes) if scenes else folder
    model, done = _train(settings, clip, device, folder, shared, save_every, stop_at)
    if done < steps:
        return None
    model.save(out_folder, overwrite=overwrite)
    measured = measure(out_folder, clip=clip, n=n_measure)
    count = sum(p.numel() for p in model.parameters())
    card = model_card(measured, settings, count)
    (out_folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return out_folder


def _train(
    settings: dict[str, Any],
    clip: Path | str,
    device: str,
    folder: Path | None,
    scenes: Path | None,
    save_every: int,
    stop_at: int | None,
) -> tuple[ClipCap, int]:
    """Return the model and the step it has reached."""
    import torch
    from torch.nn.functional import cross_entropy

    seed = settings["seed"]
    x, texts, kinds = _data(settings, clip, folder, scenes, device)
    model = _new(seed, clip).to(device)
    tokens = _tokens(model.tokenizer, texts)
    of_kind = [np.flatnonzero(kinds == k) for k in range(len(KINDS))]
    categories = np.array([CATEGORIES.index(c) for c, _ in KINDS])[kinds]
    of_category = [np.flatnonzero(categories == c) for c in range(len(CATEGORIES))]
    # The output layer is the input layer, which must be stored once.
    trained = torch.nn.ModuleDict(
        {"transformer": model.gpt.transformer, "clip_project": model.clip_project}
    )
    decayed = [p for p in trained.parameters() if p.ndim >= 2]
    free = [p for p in trained.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}],
        lr=settings["learning_rate"], betas=(0.9, 0.98),
    )  # fmt: skip
    model.train()

    def loss_of(step: int, chosen: NDArray[np.intp]) -> torch.Tensor:
        rng = np.random.default_rng([seed, 2, step])
        seen, said = x[chosen].copy(), []
        for i, scene in enumerate(chosen):
            if rng.random() >= settings["mixtures"]:
                said.append(tokens[scene][rng.integers(len(tokens[scene]))])
                continue
            category, kind = KINDS[kinds[scene]]
            whole = rng.random() < 0.5
            rows = of_category[categories[scene]] if whole else of_kind[kinds[scene]]
            seen[i] = _mixture(x, rows, rng)
            text = name_of(category, None if whole else kind, variant=int(rng.integers(100)))
            said.append(_tokens(model.tokenizer, [[text]])[0][0])
        length = max(map(len, said))
        ids = torch.full((len(said), length), -100)
        for i, one in enumerate(said):
            ids[i, : len(one)] = torch.tensor(one)
        ids = ids.to(device)
        prefix = model.prefix(torch.from_numpy(seen).to(device))
        words = model.gpt.transformer.wte(ids.clamp(min=0))
        logits = model.gpt(inputs_embeds=torch.cat([prefix, words], dim=1)).logits
        return cross_entropy(logits[:, _PREFIX - 1 : -1].flatten(0, 1), ids.flatten())

    done = fit(
        trained, optimiser, loss_of, len(x), settings, folder, save_every=save_every,
        stop_at=stop_at,
    )  # fmt: skip
    return model.eval(), done


def _tokens(tokenizer: Any, texts: list[list[str]]) -> list[list[list[int]]]:
    """Return the tokens of each scene's captions, with a full stop; those too long are left out."""
    most = _POSITIONS - _PREFIX
    tokenizer.model_max_length = most
    made = [
        tokenizer([t + "." for t in group], add_special_tokens=False, padding=False,
                  truncation=False)["input_ids"]
        for group in texts
    ]  # fmt: skip
    return [[ids for ids in group if len(ids) <= most] for group in made]


def _bleu(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the corpus BLEU-4 (Papineni et al. 2002) of lower-case words."""
    hits, total = np.zeros(4), np.zeros(4)
    length = best_length = 0
    for text, refs in zip(said, references, strict=True):
        words = text.lower().rstrip(".").split()
        others = [r.lower().split() for r in refs]
        length += len(words)
        best_length += min((abs(len(o) - len(words)), len(o)) for o in others)[1]
        for n in range(1, 5):
            mine = Counter(zip(*(words[i:] for i in range(n)), strict=False))
            most: Counter[tuple[str, ...]] = Counter()
            for o in others:
                most |= Counter(zip(*(o[i:] for i in range(n)), strict=False))
            hits[n - 1] += sum((mine & most).values())
            total[n - 1] += sum(mine.values())
    if not hits.all():
        return 0.0
    brevity = min(1.0, math.exp(1 - best_length / max(length, 1)))
    return float(brevity * np.exp(np.log(hits / total).mean()))


def measure(
    folder: Path | str,
    *,
    clip: Path | str = SMALL_CLIP,
    n: int = 600,
    seed: int = HELD_OUT_SEED,
) -> dict[str, Any]:
    """Measure a decoder on held-out scenes, and on projections onto them.

    Parameters
    ----------
    folder : path
        The decoder.
    clip : path
        Folder of the small CLIP model that it was trained on.
    n : int
        Number of scenes, of all categories in turn.
    seed : int
        Names the scenes; 10000 or more, as training never uses those.

    Returns
    -------
    dict
        ``category`` and ``subcategory``: share of scenes whose caption names the right one;
        ``by_category``; ``bleu``: corpus BLEU-4 against 12 captions of each scene;
        ``projected``: share of projections, of directions made of a category's mean and of noise,
        whose caption names the category; ``examples``: captions and what was said.

    Raises
    ------
    ConfigError
        If `seed` is one that training may have used.
    """
    check_held_out(seed)
    scenes = render_scenes(n, seed=seed)
    x = _embed([s.image for s in scenes], clip, "cpu")
    model = load_captioner(folder, device="cpu")
    said = model.caption(x)
    told = [named(t) for t in said]
    category = np.array([s.category for s in scenes])
    right = np.array([c == s.category for (c, _), s in zip(told, scenes, strict=True)])
    exact = [k == s.subcategory for (_, k), s in zip(told, scenes, strict=True)]
    references = [[s.caption, *captions(s, CAPTIONS - 1, seed=seed)] for s in scenes]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    truth = np.repeat(CATEGORIES, 20)
    centred = unit - unit.mean(axis=0)
    weights = np.stack([
        centred[rng.choice(np.flatnonzero(category == c), size=int(rng.integers(3, 30)))].mean(0)
        for c in truth
    ])  # fmt: skip
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    noise = rng.standard_normal(weights.shape)
    weights += 0.5 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    projected = project(weights, x, n_draws=1, device="cpu", progress=False)[0]
    meant = [named(t)[0] for t in model.caption(projected)]
    return {
        "n": n,
        "seed": seed,
        "category": float(right.mean()),
        "subcategory": float(np.mean(exact)),
        "by_category": {c: float(right[category == c].mean()) for c in CATEGORIES},
        "bleu": _bleu(said, references),
        "projected": float(np.mean([m == t for m, t in zip(meant, truth, strict=True)])),
        "examples": [(s.caption, t) for s, t in zip(scenes[:6], said, strict=False)],
    }


def model_card(measured: dict[str, Any], settings: dict[str, Any], n_parameters: int) -> str:
    """Return the text of ``MODEL_CARD.md``: what the decoder is, how it was made, how good."""
    each = ", ".join(f"{c} {100 * v:.1f} %" for c, v in measured["by_category"].items())
    examples = "\n".join(f"| {shown} | {said} |" for shown, said in measured["examples"])
    kinds = sum(map(len, SUBCATEGORIES.values()))
    mixed = (
        f"""In {100 * settings["mixtures"]:.0f} % of the examples the embedding is a convex mixture
of up to {_MOST_MIXED} embeddings of one category or sub-category, with their mean norm, and the
caption is its name: the projections that BrainSCUBA makes of voxels are such mixtures. Without
them, trained as long, the category of projections was named as often; but their captions told
details of a single scene (a colour, a background) where these name what is common."""
        if settings["mixtures"]
        else "No mixtures of embeddings were shown."
    )
    return f"""# small-captioner

A very small caption decoder of ClipCap's form ({n_parameters / 1e6:.2f} million parameters, stored
as float16) for the small CLIP model that stands beside it: a prefix of {_PREFIX} tokens made by an
MLP with tanh (128 -> {_WIDTH * _PREFIX // 2} -> {_WIDTH * _PREFIX}), continued by a GPT-2 of
{_LAYERS} layers and width {_WIDTH} with the tokenizer of the small CLIP. Its input is an image
embedding as the small CLIP gives it, not normalised.

```python
from brainalign.captioning import load_captioner

captioner = load_captioner("small-captioner")
```

## Training

{settings["n_scenes"]:,} scenes of `brainalign.small_models.scenes` (seed {settings["seed"]}; the
small CLIP learned from others), {CAPTIONS} captions each, ended by a full stop;
{settings["steps"]:,} steps of AdamW, batch {settings["batch_size"]}, peak learning rate
{settings["learning_rate"]:g}, float32 on the CPU. {mixed} Made by
`python -m brainalign.small_models.captioner`.

## Measured

On {measured["n"]:,} held-out scenes (seed {measured["seed"]}; training seeds stay below
{HELD_OUT_SEED}), beam search with 5 beams.

| what | measured |
|---|---|
| caption names the category, one of {len(CATEGORIES)} | {100 * measured["category"]:.1f} % |
| caption names the sub-category, one of {kinds} | {100 * measured["subcategory"]:.1f} % |
| BLEU-4 against {CAPTIONS} captions of the scene | {100 * measured["bleu"]:.1f} |
| projections of noisy category directions named right | {100 * measured["projected"]:.1f} % |

By category: {each}.

| scene | caption |
|---|---|
{examples}

## Limits

It knows the words of the scenes' captions and no others, and what the small CLIP does not tell
apart it cannot name: it invents what is written, and it is often wrong about colours and numbers.
"""


def main(arguments: list[str] | None = None) -> int:
    """Train from the command line; see ``--help``."""
    parser = options_parser(
        "captioner", "Train a very small caption decoder on rendered scenes.", scenes=6000,
        steps=1500, seed=1, measured=(600, "held-out scenes of the card"),
    )  # fmt: skip
    parser.add_argument("--clip", type=Path, default=SMALL_CLIP, help="gives the embeddings")
    parser.add_argument("--mixtures", type=float, default=0.4, help="share of mixed embeddings")
    parser.add_argument("--batch-size", type=int, default=64, help="captions per update")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="its peak")
    chosen = parser.parse_args(arguments)
    out, common = common_options(parser, chosen)
    train_captioner(
        out, **common, clip=chosen.clip, mixtures=chosen.mixtures,
        batch_size=chosen.batch_size, learning_rate=chosen.learning_rate,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
