"""Captions of image embeddings: ClipCap, and vision-language models of transformers."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm.auto import tqdm

from brainalign.data.store import atomic_dir
from brainalign.device import resolve_device
from brainalign.errors import (
    ConfigError,
    MissingDependencyError,
    SchemaError,
    UnavailableError,
    UnknownNameError,
    near,
)
from brainalign.features.models import shipped_folder

__all__ = [
    "BEAMS",
    "MAX_TOKENS",
    "SMALL_CAPTIONER",
    "Captioner",
    "ClipCap",
    "VisionLanguageCaptioner",
    "beam_search",
    "load_captioner",
]

#: The name of the small decoder that comes with the package.
SMALL_CAPTIONER = "small-captioner"
#: Beams and longest caption in tokens, as published.
BEAMS, MAX_TOKENS = 5, 67
_SOURCES = ("clipcap:", "transformers:")
#: OpenAI's CLIP, which ClipCap's authors used, with the activation it was trained with.
_OPENAI_B32 = "open_clip:ViT-B-32-quickgelu/openai"
_CONFIG, _WEIGHTS = "captioner_config.json", "captioner.safetensors"
_PROMPTED, _MERGED = "vision_tower", "visual"
_TOWERS = ("vision_model", "image_encoder", _PROMPTED, _MERGED)
#: Where the picture is in a prompt.
_PICTURE = "<image>"
#: Buffers of attention masks that old versions of transformers stored.
_MASKS = re.compile(r"\.attn\.(masked_)?bias$")


class Captioner(Protocol):
    """What turns image embeddings into words."""

    @property
    def n_features(self) -> int:
        """The number of features of an embedding."""

    @property
    def clip(self) -> str | None:
        """The model whose embeddings it reads, as `load_model` takes it; None where not known."""

    def caption(
        self,
        embeddings: ArrayLike,
        *,
        beams: int = BEAMS,
        max_tokens: int = MAX_TOKENS,
        batch_size: int = 32,
        progress: bool | None = None,
    ) -> list[str]:
        """Return a caption of every embedding, shape (n, n_features), not normalised."""


def beam_search(
    step: Callable[[Tensor | None, Tensor | None], Tensor],
    n: int,
    *,
    beams: int,
    max_tokens: int,
    stop: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Search for the token sequences of the highest mean log-probability.

    .. math:: \max_t \; \frac{1}{\lvert t \rvert} \sum_i \log p(t_i \mid t_{<i})

    In each step every sequence that has not stopped is continued by each token, and the best
    `beams` by their mean so far are kept, those that have stopped among them.

    Parameters
    ----------
    step : callable
        Called with None, None it returns the logits (n, n_tokens) of the first token. Called with
        the tokens (n * beams,) chosen last and the rows (n * beams,) of the former call that each
        of them continues, it returns the logits (n * beams, n_tokens) of the next.
    n : int
        How many searches run beside one another.
    beams : int
        How many sequences each keeps.
    max_tokens : int
        The longest sequence, its stop token included.
    stop : sequence of int
        The tokens that end a sequence.

    Returns
    -------
    tokens : Tensor of int, shape (n, beams, length)
        From the best to the worst; behind a stop token, repetitions of it.
    lengths : Tensor of int, shape (n, beams)
        In tokens, the stop token included.
    scores : Tensor, shape (n, beams)
        Mean log-probability.

    References
    ----------
    Mokady et al. (2021), ClipCap: CLIP prefix for image captioning.
    """
    first = step(None, None).float().log_softmax(-1)
    size = first.shape[1]
    device = first.device
    ends = torch.tensor([*stop], device=device)
    # Where there are fewer tokens than beams, the rest cannot be continued from.
    total, chosen = first.topk(min(beams, size), dim=1)
    short = beams - total.shape[1]
    if short:
        total = torch.nn.functional.pad(total, (0, short), value=-torch.inf)
        chosen = torch.nn.functional.pad(chosen, (0, short))
    tokens = chosen[:, :, None]
    lengths = torch.ones_like(chosen)
    stopped = torch.isin(chosen, ends)
    rows = torch.arange(n, device=device)[:, None].expand(n, beams)
    for _ in range(max_tokens - 1):
        if bool(stopped.all()):
            break
        logits = step(tokens[:, :, -1].reshape(-1), rows.reshape(-1))
        following = logits.float().log_softmax(-1).view(n, beams, size)
        # A sequence that has stopped has one continuation: itself.
        following = following.masked_fill(stopped[:, :, None], -torch.inf)
        itself = tokens[:, :, -1:]
        following = torch.where(
            stopped[:, :, None],
            following.scatter(2, itself, torch.zeros_like(itself, dtype=following.dtype)),
            following,
        )
        longer = lengths + (~stopped).to(lengths.dtype)
        sums = total[:, :, None] + following
        mean = (sums / longer[:, :, None]).view(n, -1)
        best = mean.topk(beams, dim=1).indices
        source, token = best // size, best % size
        total = sums.view(n, -1).gather(1, best)
        lengths = longer.gather(1, source)
        tokens = torch.cat(
            [tokens.gather(1, source[:, :, None].expand(-1, -1, tokens.shape[2])),
             token[:, :, None]], dim=2,
        )  # fmt: skip
        stopped = stopped.gather(1, source) | torch.isin(token, ends)
        rows = torch.arange(n, device=device)[:, None] * beams + source
    scores, order = (total / lengths).sort(dim=1, descending=True, stable=True)
    tokens = tokens.gather(1, order[:, :, None].expand_as(tokens))
    return tokens, lengths.gather(1, order), scores


class ClipCap(nn.Module):
    r"""A caption decoder of ClipCap's form: an embedding becomes a prefix that GPT-2 continues.

    .. math:: p = W_2 \tanh(W_1 x + b_1) + b_2

    with p the embeddings of the first ``prefix_length`` tokens.

    Parameters
    ----------
    gpt : transformers.GPT2LMHeadModel
        The language model.
    tokenizer : transformers tokenizer
        Its tokenizer.
    n_features : int
        Of an image embedding: 512 for CLIP ViT-B/32.
    prefix_length : int
        Tokens of the prefix.
    stop : str
        Ends a caption; one token.
    clip : str, optional
        The CLIP model whose embeddings the decoder was trained on, as
        `brainalign.features.load_model` takes it.

    References
    ----------
    Mokady et al. (2021), ClipCap: CLIP prefix for image captioning.
    """

    def __init__(
        self,
        gpt: Any,
        tokenizer: Any,
        n_features: int,
        *,
        prefix_length: int = 10,
        stop: str = ".",
        clip: str | None = None,
    ) -> None:
        super().__init__()
        self.clip = clip
        width = gpt.config.n_embd
        out = width * prefix_length
        self.gpt, self._features = gpt, n_features
        self.clip_project = nn.Module()
        self.clip_project.model = nn.Sequential(
            nn.Linear(n_features, out // 2), nn.Tanh(), nn.Linear(out // 2, out)
        )
        self.tokenizer, self.prefix_length, self.stop = tokenizer, prefix_length, stop
        end = _stop_token(tokenizer, stop)
        if end is None:
            raise ConfigError(f"The stop {stop!r} is not one token of the tokenizer.")
        ends = {end, tokenizer.eos_token_id}
        self.ends = sorted(i for i in ends if i is not None)
        room = gpt.config.n_positions - prefix_length
        if room < 1:
            raise ConfigError(
                f"The language model has {gpt.config.n_positions} positions, no more than the "
                f"prefix of {prefix_length}."
            )
        self.room = room

    @property
    def n_features(self) -> int:
        """The number of features of an embedding."""
        return self._features

    def prefix(self, embeddings: Tensor) -> Tensor:
        """Return the prefix of embeddings, shape (n, prefix_length, width)."""
        made: Tensor = self.clip_project.get_submodule("model")(embeddings)
        return made.view(len(embeddings), self.prefix_length, -1)

    @torch.no_grad()
    def caption(
        self,
        embeddings: ArrayLike,
        *,
        beams: int = BEAMS,
        max_tokens: int = MAX_TOKENS,
        batch_size: int = 32,
        progress: bool | None = None,
    ) -> list[str]:
        """Return the best caption of every embedding by beam search.

        Parameters
        ----------
        embeddings : array-like, shape (n, n_features)
            Not normalised: the decoder was trained on embeddings as CLIP gives them.
        beams, max_tokens : int
            As published, 5 and 67.
        batch_size : int
            Embeddings searched beside one another.
        progress : bool, optional
            Whether to draw a progress bar; by default in a terminal.

        Raises
        ------
        SchemaError
            If the embeddings are not finite or have another number of features.
        ConfigError
            If a caption could grow longer than the language model's positions.
        """
        x = _embeddings(embeddings, self.n_features, 2)
        _check_search(beams, max_tokens, batch_size)
        if max_tokens > self.room:
            raise ConfigError(
                f"max_tokens is {max_tokens}; the language model has room for {self.room}."
            )
        device = next(self.parameters()).device
        said: list[str] = []
        for part in _batches(len(x), batch_size, progress):
            prefix = self.prefix(x[part].to(device, next(self.parameters()).dtype))
            step = _Continuation(self.gpt, prefix, beams)
            tokens, lengths, _ = beam_search(
                step, len(prefix), beams=beams, max_tokens=max_tokens, stop=self.ends
            )
            for ids, length in zip(tokens[:, 0].tolist(), lengths[:, 0].tolist(), strict=True):
                text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
                said.append(" ".join(text.split()))
        return said

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the decoder as a folder: float16 weights, configuration and tokenizer."""
        from safetensors.torch import save_file

        folder = Path(folder)
        config = {
            **({} if self.clip is None else {"clip": self.clip}),
            "n_features": self.n_features,
            "prefix_length": self.prefix_length,
            "stop": self.stop,
            "gpt2": {
                k: getattr(self.gpt.config, k)
                for k in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head",
                          "bos_token_id", "eos_token_id")
            },
        }  # fmt: skip
        tied = self.gpt.lm_head.weight is self.gpt.transformer.wte.weight
        half = {
            k: v.detach().cpu().half().contiguous()
            for k, v in self.state_dict().items()
            if not (tied and k == "gpt.lm_head.weight")
        }
        with atomic_dir(folder, overwrite=overwrite) as made:
            (made / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(half, made / _WEIGHTS, metadata={"format": "pt"})
            (made / _WEIGHTS).chmod(0o644)  # safetensors lets only the owner read
            self.tokenizer.save_pretrained(made)
        return folder


class _Continuation:
    """Logits of the next token of sequences that grow from prefixes, with a cache of the past."""

    def __init__(self, gpt: Any, prefix: Tensor, beams: int) -> None:
        self.gpt, self.prefix, self.beams = gpt, prefix, beams
        self.past: Any = None

    def __call__(self, tokens: Tensor | None, rows: Tensor | None) -> Tensor:
        if tokens is None or rows is None:
            out = self.gpt(inputs_embeds=self.prefix, use_cache=True)
        else:
            # The first rows are those of the prefixes, later ones those of the beams.
            self.past.reorder_cache(rows)
            out = self.gpt(input_ids=tokens[:, None], past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        return out.logits[:, -1]


class VisionLanguageCaptioner:
    """A vision-language model of transformers whose vision tower is replaced by given states.

    The embeddings take the place of what the tower gives the language part, so they must come from
    the same tower: the features of a voxel's encoder are then its states, pooled (one state for all
    tokens) or whole. By the name of the tower that is

    - ``vision_model`` or ``image_encoder`` (GIT, BLIP-2): its last hidden state;
    - ``vision_tower`` (LLaVA, PaliGemma): the hidden state that the configuration chooses with
      ``vision_feature_layer``, class token included where the model drops it itself, or the last;
    - ``visual`` (Qwen2-VL, Qwen2.5-VL): its patches merged, as wide as the language model.

    The language model of the last two reads a picture in place of tokens of its prompt.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With ``generate``.
    tokenizer : transformers tokenizer
        Its tokenizer.
    stop : str
        Ends a caption, beside the model's own end token, where it is one token.
    clip : str, optional
        The model whose states these are, as `brainalign.features.load_model` takes it.
    prompt : str, optional
        Of a model with such a prompt: what it is asked, word for word with its special tokens, and
        ``<image>`` where the picture is. Default the first token of a text and the picture.

    Raises
    ------
    ConfigError
        If the model has no such tower, joins several of its layers, or the prompt does not fit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        stop: str = ".",
        clip: str | None = None,
        prompt: str | None = None,
    ) -> None:
        self.clip = clip
        self.model, self.tokenizer = model.eval(), tokenizer
        self.tower, self._kind = _tower(model)
        self._around = self._asked(prompt)
        end = _stop_token(tokenizer, stop)
        text = getattr(model.config, "text_config", None) or model.config
        own = [model.generation_config.eos_token_id, text.eos_token_id, tokenizer.eos_token_id]
        ends = [e for o in own if o is not None for e in (o if isinstance(o, list) else [o])]
        self.ends = sorted({*ends, *([] if end is None else [end])})

    @property
    def n_features(self) -> int:
        """The number of features of a state that the language part is given."""
        vision = self.model.config.vision_config
        merged = getattr(vision, "out_hidden_size", None) if self._kind == _MERGED else None
        return int(merged or vision.hidden_size)

    def _asked(self, prompt: str | None) -> tuple[list[int], list[int]] | None:
        """Return the prompt's tokens before and behind the picture; None for a model without."""
        if self._kind not in (_PROMPTED, _MERGED):
            if prompt is not None:
                raise ConfigError(
                    f"{type(self.model).__name__} reads a picture without a prompt; got {prompt!r}."
                )
            return None
        bos = self.tokenizer.bos_token_id
        if prompt is None:
            before, behind = [] if bos is None else [bos], []
        elif prompt.count(_PICTURE) != 1:
            raise ConfigError(f"The prompt {prompt!r} must have {_PICTURE} in one place.")
        else:
            before, behind = (
                [*self.tokenizer.encode(part, add_special_tokens=False)] if part else []
                for part in prompt.split(_PICTURE)
            )
        if self._kind == _MERGED:  # the model counts pictures by the token that starts them
            config = self.model.config
            before = [*before, config.vision_start_token_id]
            behind = [config.vision_end_token_id, *behind]
        return before, behind

    def _inputs(self, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what the tower gives, (n, token, feature), and inputs of a size that fits."""
        config, n = self.model.config, len(states)
        dropped = int(getattr(config, "vision_feature_select_strategy", "") == "default")
        if dropped and states.shape[1] == 1:
            states = states.repeat(1, 2, 1)
        n_tokens = states.shape[1] - dropped
        inputs: dict[str, Tensor] = {}
        if self._kind == _MERGED:
            side = math.isqrt(n_tokens)
            rows = side if side**2 == n_tokens else 1
            merged = config.vision_config.spatial_merge_size
            grid = [1, rows * merged, n_tokens // rows * merged]
            inputs["image_grid_thw"] = torch.tensor([grid] * n, device=states.device)
            inputs["pixel_values"] = states.new_zeros(n * math.prod(grid), 1)
        else:
            size = config.vision_config.image_size
            inputs["pixel_values"] = states.new_zeros(n, 3, size, size)
        if self._around is None:
            return states, inputs
        before, behind = self._around
        ids = torch.tensor([*before, *[config.image_token_id] * n_tokens, *behind])
        ids = ids.to(states.device).expand(n, -1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._kind == _MERGED:
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        if config.model_type == "paligemma":  # all of the prompt is read in both directions
            inputs["token_type_ids"] = torch.zeros_like(ids)
        return states, inputs

    @torch.no_grad()
    def caption(
        self,
        embeddings: ArrayLike,
        *,
        beams: int = BEAMS,
        max_tokens: int = MAX_TOKENS,
        batch_size: int = 32,
        progress: bool | None = None,
    ) -> list[str]:
        """Return a caption of every embedding by the model's own beam search.

        Parameters
        ----------
        embeddings : array-like, shape (n, n_features) or (n, n_tokens, n_features)
            States of the vision tower: one, or as many as it gives an image. A square number of
            merged ones is taken to lie in a square, another in a row.
        beams, max_tokens, batch_size, progress
            As in `ClipCap.caption`.

        Raises
        ------
        SchemaError
            If the embeddings are not finite or have another number of features.
        """
        x = _embeddings(embeddings, self.n_features, 3)
        _check_search(beams, max_tokens, batch_size)
        device = next(self.model.parameters()).device
        dtype = next(self.model.parameters()).dtype
        n_layers = getattr(self.model.config.vision_config, "num_hidden_layers", 0) + 1
        said: list[str] = []
        for part in _batches(len(x), batch_size, progress):
            states = x[part].to(device, dtype)
            if states.ndim == 2:
                states = states[:, None]
            states, inputs = self._inputs(states)
            with _in_place_of(self.tower, states, len(inputs["pixel_values"]), n_layers):
                ids = self.model.generate(
                    **inputs, num_beams=beams, do_sample=False, max_new_tokens=max_tokens,
                    eos_token_id=self.ends,
                )  # fmt: skip
            if "input_ids" in inputs:
                ids = ids[:, inputs["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            said += [" ".join(t.split()) for t in texts]
        return said


@contextlib.contextmanager
def _in_place_of(tower: nn.Module, states: Tensor, n_shown: int, n_layers: int) -> Iterator[None]:
    """Let a vision tower return given states, in all its layers, whatever it is shown."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def forward(pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        # A beam search may repeat pictures; the states are repeated like them.
        shown = states.repeat_interleave(len(pixel_values) // n_shown, dim=0)
        return BaseModelOutputWithPooling(
            last_hidden_state=shown,
            pooler_output=shown.flatten(0, 1),  # of merged patches, the one that is read
            hidden_states=(shown,) * n_layers,
        )

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


def _stop_token(tokenizer: Any, stop: str) -> int | None:
    """Return the token of `stop` as it stands behind a word, or None where it is not one."""
    ids = tokenizer.encode("a" + stop, add_special_tokens=False, padding=False)
    return int(ids[-1]) if len(ids) and tokenizer.decode([ids[-1]]).strip() == stop else None


def _tower(model: Any) -> tuple[nn.Module, str]:
    """Return the outermost module with the name of a vision tower, and that name."""
    named = ((module, path.rpartition(".")[2]) for path, module in model.named_modules())
    found = next(((module, name) for module, name in named if name in _TOWERS), None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} has no vision tower named {', '.join(_TOWERS)}.",
            "Use a model such as GIT, BLIP-2, LLaVA, PaliGemma or Qwen2-VL.",
        )
    several = isinstance(getattr(model.config, "vision_feature_layer", None), list | tuple)
    if several or hasattr(model.config.vision_config, "deepstack_visual_indexes"):
        raise ConfigError(
            f"{type(model).__name__} gives its language model several layers of its vision tower.",
            "Use a model that reads one layer, such as LLaVA 1.5.",
        )
    return found


def load_captioner(
    name: str | Path,
    *,
    tokenizer: str | Path = "gpt2",
    clip: str | None = None,
    prompt: str | None = None,
    device: str | torch.device = "auto",
) -> ClipCap | VisionLanguageCaptioner:
    """Load a captioner by name or path.

    Parameters
    ----------
    name : str or path
        ``small-captioner``, the small decoder that comes with the package; a folder that
        `ClipCap.save` wrote; ``clipcap:FILE``, a checkpoint of ClipCap with its MLP (such as
        ``coco_weights.pt``); ``transformers:ID_OR_PATH``, see `VisionLanguageCaptioner`.
    tokenizer : str or path
        Of a ``clipcap:`` checkpoint, which holds none: a name or folder for transformers.
    clip : str, optional
        The model whose embeddings the captioner was trained on, as
        `brainalign.features.load_model` takes it: required for a ``clipcap:`` checkpoint, which
        does not name it. ``coco_weights.pt`` was trained on those of
        ``open_clip:ViT-B-32-quickgelu/openai``.
    prompt : str, optional
        Of a vision-language model that reads one, see `VisionLanguageCaptioner`.
    device : str or torch.device
        See `brainalign.device.resolve_device`.

    Raises
    ------
    UnavailableError
        If there is no such file or folder, or it cannot be had.
    SchemaError
        If a checkpoint does not hold what it should.
    UnknownNameError
        If the name is of no known kind.
    ConfigError
        If `clip` is missing for a checkpoint, or is not what a folder names, or a prompt is given
        to what reads none.
    MissingDependencyError
        If transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "Captions need the package transformers.",
            'Install it with: pip install "brainalign[generation]"',
        ) from error
    where, text = resolve_device(device), str(name)
    if prompt is not None and not text.startswith("transformers:"):
        raise ConfigError(f"The captioner {text!r} reads no prompt; got {prompt!r}.")
    if text == SMALL_CAPTIONER:
        return _from_folder(shipped_folder(text), transformers, clip).to(where).eval()
    if text.startswith("clipcap:"):
        path = Path(text.removeprefix("clipcap:"))
        return _from_checkpoint(path, tokenizer, transformers, clip).to(where).eval()
    if text.startswith("transformers:"):
        model, words = _from_transformers(text.removeprefix("transformers:"), transformers)
        return VisionLanguageCaptioner(model.to(where), words, clip=clip, prompt=prompt)
    if Path(name).is_dir():
        return _from_folder(Path(name), transformers, clip).to(where).eval()
    known = [SMALL_CAPTIONER, *_SOURCES]
    raise UnknownNameError(
        f"There is no captioner {text!r}, and no such folder.{near(text, known)}",
        f"Give {SMALL_CAPTIONER!r}, a folder, clipcap:FILE or transformers:ID_OR_PATH.",
    )


def _from_folder(folder: Path, transformers: Any, clip: str | None) -> ClipCap:
    from safetensors.torch import load_file

    if not (folder / _CONFIG).is_file():
        raise UnavailableError(
            f"{folder} holds no captioner: there is no {_CONFIG} in it.",
            "Give a folder that ClipCap.save wrote.",
        )
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    own = config.get("clip", clip)
    if clip is not None and own != clip:
        raise ConfigError(
            f"The captioner {folder} reads embeddings of {own!r}; clip is {clip!r}.",
            "Leave clip out.",
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config["gpt2"]))
    made = ClipCap(
        gpt, tokenizer, config["n_features"], prefix_length=config["prefix_length"],
        stop=config["stop"], clip=own,
    )  # fmt: skip
    _put(made, {k: v.float() for k, v in load_file(folder / _WEIGHTS).items()}, folder)
    return made


def _from_checkpoint(
    path: Path, tokenizer: str | Path, transformers: Any, clip: str | None
) -> ClipCap:
    if clip is None:
        raise ConfigError(
            f"The checkpoint {path} does not say which model's embeddings it reads, and other "
            "models have as many features.",
            f"Name it with clip; coco_weights.pt was trained on those of {_OPENAI_B32!r}.",
        )
    if not path.is_file():
        raise UnavailableError(f"There is no checkpoint {path}.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or "clip_project.model.0.weight" not in state:
        raise SchemaError(
            f"{path} is no ClipCap checkpoint with an MLP: it has no clip_project.model.0.weight.",
            "Checkpoints with a transformer as mapping network are not read.",
        )
    state = {k: v.float() for k, v in state.items() if not _MASKS.search(k)}
    vocabulary, width = state["gpt.transformer.wte.weight"].shape
    layers = {int(m[1]) for k in state if (m := re.match(r"gpt\.transformer\.h\.(\d+)\.", k))}
    prefix_length, rest = divmod(len(state["clip_project.model.2.bias"]), width)
    if rest or width % 64:
        raise SchemaError(
            f"{path}: the prefix ({len(state['clip_project.model.2.bias'])}) is no multiple of the "
            f"width ({width}), or that none of the 64 of a GPT-2 head."
        )
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=len(state["gpt.transformer.wpe.weight"]), n_embd=width,
        n_layer=len(layers), n_head=width // 64,
    )  # fmt: skip
    try:
        words = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError) as error:
        raise UnavailableError(
            f"The tokenizer {str(tokenizer)!r} of the checkpoint could not be had: "
            f"{str(error).splitlines()[0]}",
            "Give a folder with GPT-2's tokenizer.",
        ) from error
    n_features = state["clip_project.model.0.weight"].shape[1]
    gpt = transformers.GPT2LMHeadModel(config)
    made = ClipCap(gpt, words, n_features, prefix_length=prefix_length, clip=clip)
    _put(made, state, path)
    return made


def _put(made: ClipCap, state: dict[str, Tensor], path: Path) -> None:
    # The output layer of GPT-2 is its input layer: one of them is enough.
    state.setdefault("gpt.lm_head.weight", state["gpt.transformer.wte.weight"])
    try:
        made.load_state_dict(state)
    except RuntimeError as error:
        raise SchemaError(f"The weights of {path} do not fit: {error}") from error


def _from_transformers(name: str, transformers: Any) -> tuple[Any, Any]:
    """Return a model and its tokenizer."""
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        classes = config.architectures or []
        cls = (
            getattr(transformers, classes[0])
            if classes
            else transformers.AutoModelForImageTextToText
        )
        model = cls.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UnavailableError(
            f"transformers cannot load {name!r}: {str(error).splitlines()[0]}",
            "Check the name, or give a folder that save_pretrained wrote.",
        ) from error
    return model, tokenizer


def _embeddings(embeddings: ArrayLike, n_features: int, most_dims: int) -> Tensor:
    x = torch.as_tensor(np.require(np.asarray(embeddings), dtype=np.float32, requirements=["W"]))
    if not 2 <= x.ndim <= most_dims or x.shape[-1] != n_features:
        raise SchemaError(
            f"The captioner takes embeddings of {n_features} features; these have shape "
            f"{tuple(x.shape)}.",
            "Use the captioner of the CLIP model that the encoder was fitted to.",
        )
    bad = torch.nonzero(~torch.isfinite(x).flatten(1).all(1))
    if len(bad):
        raise SchemaError(f"{len(bad)} embeddings are not finite, the first is {int(bad[0])}.")
    return x


def _check_search(beams: int, max_tokens: int, batch_size: int) -> None:
    if beams < 1 or max_tokens < 1 or batch_size < 1:
        raise ConfigError(
            f"beams, max_tokens and batch_size are at least 1; got {beams}, {max_tokens} and "
            f"{batch_size}."
        )


def _batches(n: int, size: int, progress: bool | None) -> Any:
    parts = [slice(i, i + size) for i in range(0, n, size)]
    return tqdm(parts, desc="caption", disable=None if progress is None else not progress)
