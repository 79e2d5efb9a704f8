"""Vision models by name, local path or instance, behind one small interface."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from brainalign.data.store import sha256_file, sha256_of
from brainalign.device import resolve_device
from brainalign.errors import (
    BrainalignError,
    ChecksumError,
    ConfigError,
    MissingDependencyError,
    UnavailableError,
    UnknownNameError,
    near,
)
from brainalign.features import baselines
from brainalign.features.attention import full_attention, place_attention, recorded_attention
from brainalign.features.layers import OUTPUT, Layer, match, tensor_of, trace

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Model", "find_weights", "list_layers", "load_model"]

log = logging.getLogger(__name__)

SMALL_CLIP = "small-clip"
#: Vision models that come with the package, by the library that loads them.
SMALL_MODELS = {SMALL_CLIP: "open_clip", "small-judge": "open_clip", "small-classifier": "timm"}
SOURCES = ("open_clip", "timm", "torchvision", "transformers")
HUB_TIMEOUT = 3.0


@dataclass
class Model:
    """A vision model with what is needed to run it on images and to name what it computes.

    Parameters
    ----------
    name : str
        As `load_model` takes it.
    module : torch.nn.Module
        In eval mode, its parameters without gradients.
    transform : callable
        Turns a PIL image into a tensor (channel, row, column).
    preprocessing : dict
        JSON-able: what `transform` does (``image_size``, ``mean``, ``std``, ...) and, under
        ``options``, the options that the architecture was built with.
    forward : callable
        Runs the module on a batch of images; its result is the layer ``"output"``.
    text : callable, optional
        Returns the embeddings of a list of texts, for models that have a text tower.
    placed : Swap, optional
        Holds the attention that the weights were trained with, where it is not softmax.
    attention : str
        Its specification.
    """

    name: str
    module: nn.Module
    transform: Callable[[Image], Tensor]
    preprocessing: dict[str, Any]
    forward: Callable[[Tensor], Any]
    text: Callable[[list[str]], Tensor] | None = None
    placed: Any = None
    attention: str = "softmax"

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def to(self, device: str | torch.device) -> Model:
        """Move the module to a device, see `resolve_device`, and return the model."""
        self.module.to(resolve_device(device))
        return self

    @cached_property
    def weights_sha256(self) -> str:
        """The SHA-256 over names, dtypes, shapes and bytes of the state dict."""
        return _hash_state(self.module)

    @cached_property
    def traced(self) -> dict[str, Layer]:
        """The layers by name, found by a dry forward pass."""
        return trace(self.module, self.forward, self.noise())

    def noise(self) -> Tensor:
        """Return a transformed image of noise (channel, row, column), always the same."""
        from PIL import Image as PILImage

        noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        return self.transform(PILImage.fromarray(noise)).to(self.device)

    def layers(self) -> list[str]:
        """Return the names of all layers, in the order in which they finish."""
        return list(self.traced)

    def blocks(self) -> list[str]:
        """Return the main layers: the blocks that the model is a stack of, and the output.

        They are the members of its outermost sequences (``Sequential``, ``ModuleList``) of two or
        more layers; for a model without such sequences, all layers but the output.
        """
        outer: list[str] = []
        chosen: list[str] = []
        for name, sub in self.module.named_modules():
            if not name or not isinstance(sub, nn.Sequential | nn.ModuleList):
                continue
            if any(name.startswith(f"{o}.") for o in outer):
                continue
            members = [f"{name}.{child}" for child, _ in sub.named_children()]
            members = [m for m in members if m in self.traced]
            if len(members) > 1:
                outer.append(name)
                chosen.extend(members)
        if not chosen:
            return [n for n in self.traced if n != OUTPUT] or self.layers()
        return [n for n in self.traced if n in {*chosen, OUTPUT}]

    def select(self, layers: str | Sequence[str] | None) -> list[str]:
        """Return the layers that names, globs or ``re:`` patterns choose; `blocks` for None.

        Raises
        ------
        UnknownNameError
            Naming the first that matches nothing, and its near matches.
        """
        return self.blocks() if layers is None else match(layers, self.layers(), self.name)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the output for a batch of transformed images, with gradients where wanted."""
        output = tensor_of(self.forward(images))
        if output is None:
            raise ConfigError(f"{self.name} returns no tensor for a batch of images.")
        return output

    def encode_text(self, texts: list[str]) -> Tensor:
        """Return the embeddings of texts, shape (text, feature), unnormalised.

        Raises
        ------
        ConfigError
            If the model has no text tower.
        """
        if self.text is None:
            raise ConfigError(
                f"{self.name} has no text tower.", "Use a CLIP model, such as 'small-clip'."
            )
        return self.text(texts)


def list_layers(model: str | Model) -> list[Layer]:
    """Return every layer of a model with its output shape, in the order in which they finish."""
    return list((load_model(model) if isinstance(model, str) else model).traced.values())


def find_weights(path: str | Path, sha256: str | None = None) -> Path:
    """Return a weights file, looked for where weights are kept, its checksum verified.

    An absolute path is taken as it is. A relative one is looked for in the current folder, in
    ``BRAINALIGN_WEIGHTS``, and in ``weights`` inside and beside the folder ``BRAINALIGN_MIRROR``.

    Parameters
    ----------
    path : path
        Of a ``.safetensors`` file (or a checkpoint that loads with ``weights_only=True``).
    sha256 : str, optional
        The file's checksum.

    Raises
    ------
    UnavailableError
        If it is in none of the folders.
    ChecksumError
        If its bytes are not the ones promised.
    """
    path = Path(path)
    folders = [Path()]
    if not path.is_absolute():
        mirror = os.environ.get("BRAINALIGN_MIRROR", "")
        if os.environ.get("BRAINALIGN_WEIGHTS"):
            folders.append(Path(os.environ["BRAINALIGN_WEIGHTS"]))
        if mirror and "://" not in mirror:
            folders += [Path(mirror) / "weights", Path(mirror).absolute().parent / "weights"]
    found = next((f / path for f in folders if (f / path).is_file()), None)
    if found is None:
        tried = ", ".join(str((f / path).absolute()) for f in folders)
        raise UnavailableError(
            f"There is no weights file {str(path)!r}; looked at {tried}.",
            "Give its absolute path, or set BRAINALIGN_WEIGHTS to the folder that holds it.",
        )
    if sha256 is not None:
        came = sha256_file(found)
        if came != sha256.lower():
            raise ChecksumError(
                f"{found} has SHA-256 {came}; expected {sha256}.",
                "Fetch the file again, or correct the checksum.",
            )
    return found


def load_model(
    name: str | nn.Module,
    *,
    weights: str | Path | None = None,
    sha256: str | None = None,
    options: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    seed: int = 0,
    trained_attention: str | None = None,
    device: str | torch.device = "auto",
    transform: Callable[[Image], Tensor] | None = None,
) -> Model:
    """Load a vision model by name, local path or instance.

    Parameters
    ----------
    name : str or torch.nn.Module
        ``open_clip:ARCH/PRETRAINED``, ``open_clip:local-dir:PATH``, ``open_clip:hf-hub:ID``,
        ``timm:NAME``, ``timm:local-dir:PATH``, ``torchvision:NAME`` (a classifier with its default
        weights), ``torchvision:NAME/WEIGHTS``, ``transformers:ID_OR_PATH`` (without its head) and
        ``transformers:classifier:ID_OR_PATH`` (with it; the output are logits); ``small-clip``,
        ``small-judge`` and ``small-classifier``, which come with the package; the baselines
        ``pixels``, ``v1`` and ``v1:kay2017``. ``random:`` before a name gives the same architecture
        with its library's own initialisation, seeded. Or a module, with `transform` or with
        `image_size`, `mean` and `std`.
    weights : path, optional
        A state dict for the architecture, instead of its published weights; see `find_weights`.
    sha256 : str, optional
        The checksum of `weights`.
    options : mapping, optional
        Passed to the constructor of the architecture (``num_classes``, ``pad_type``, ...).
    mean, std : sequence of float, optional
        Per channel, instead of the model's own.
    image_size : int, optional
        Side in pixels, instead of the model's own.
    seed : int
        Of ``random:`` weights.
    trained_attention : str, optional
        The attention that the weights were trained with, such as ``"neighborhood:k=3"``. A folder
        of ``local-dir:`` that records one has it put in place in any case; naming it here makes
        sure that it is the one expected.
    device : str or torch.device
        ``"auto"`` is CUDA where there is one.
    transform : callable, optional
        For an instance: turns a PIL image into a tensor.

    Raises
    ------
    UnknownNameError
        If there is no such model; with near matches.
    UnavailableError
        If its weights are neither on this machine nor to be had.
    ChecksumError
        If `weights` does not match `sha256`.
    ConfigError
        If the weights do not fit the architecture or were trained with another attention than
        `trained_attention`, or the arguments do not go together.
    MissingDependencyError
        If the library that it comes from is not installed.
    """
    target = resolve_device(device)
    options = dict(options or {})
    try:
        json.dumps(options)
    except TypeError as error:
        raise ConfigError(
            f"options must be JSON-able, for they name what the features were made with: {error}."
        ) from error
    request = _Request(options, mean, std, image_size, seed)
    if isinstance(name, nn.Module):
        model = _instance(name, transform, request)
    else:
        if transform is not None:
            raise ConfigError("transform goes with a module; a model by name has its own.")
        bare = name.removeprefix("random:")
        request.random = bare != name
        if request.random and (weights is not None or bare in baselines.BASELINES):
            what = "weights" if weights is not None else f"{bare!r}, which has no weights,"
            raise ConfigError(f"'random:' and {what} do not go together: {name!r}.")
        if sha256 is not None and weights is None:
            raise ConfigError("sha256 is the checksum of weights; weights is missing.")
        request.weights = None if weights is None else find_weights(weights, sha256)
        model = _by_name(bare, request)
        model.name = name
    if request.random:
        options = {**options, "seed": seed}
    if options:
        model.preprocessing["options"] = options
    if trained_attention is not None and full_attention(trained_attention) != model.attention:
        raise ConfigError(
            f"{model.name} was trained with the attention {model.attention!r}; expected "
            f"{trained_attention!r}.",
            "Name the model that was trained with it. To swap another attention into trained "
            "weights, which measures damage, use `attention` of the extraction.",
        )
    model.module.eval().requires_grad_(False)
    return model.to(target)


@dataclass
class _Request:
    """What `load_model` was asked for, beside the name."""

    options: dict[str, Any]
    mean: Sequence[float] | None
    std: Sequence[float] | None
    image_size: int | None
    seed: int
    random: bool = False
    weights: Path | None = None


def _by_name(name: str, request: _Request) -> Model:
    if name in baselines.BASELINES:
        if request.weights is not None or request.mean is not None or request.std is not None:
            raise ConfigError(f"{name!r} takes neither weights nor mean and std.")
        module, transform, preprocessing = baselines.build(
            name, request.options, request.image_size
        )
        return Model(name, module, transform, preprocessing, module)
    if name in SMALL_MODELS:
        name = f"{SMALL_MODELS[name]}:local-dir:{shipped_folder(name)}"
    source, colon, rest = name.partition(":")
    loaders = dict(zip(SOURCES, (_open_clip, _timm, _torchvision, _transformers), strict=True))
    if not colon or source not in loaders or not rest:
        known = [*baselines.BASELINES, *SMALL_MODELS, *SOURCES]
        hint = near(name, known) or near(source, known) or _near_source(name)
        raise UnknownNameError(
            f"There is no model {name!r}.{hint}",
            f"Known: {', '.join([*baselines.BASELINES, *SMALL_MODELS])}, and names that begin with "
            "open_clip:, timm:, torchvision: or transformers:.",
        )
    with _seeded(request.seed):
        return loaders[source](rest, request)


def shipped_folder(name: str) -> Path:
    """Return the folder of a small model that comes with the package, such as ``small-clip``.

    Raises
    ------
    UnavailableError
        If this installation lacks it.
    """
    folder = Path(str(files("brainalign"))) / "small_models" / "weights" / name.replace("-", "_")
    if not folder.is_dir():
        raise UnavailableError(
            f"This installation lacks the weights of {name}: there is no {folder}.",
            "Install brainalign again.",
        )
    return folder


def _near_source(name: str) -> str:
    """Return a hint for a library's model given without its library."""
    try:
        import timm
    except ImportError:
        return ""
    return f" Did you mean 'timm:{name}'?" if timm.is_model(name) else ""


def _library(name: str, package: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"Models of {name} need the package {package}.",
            'Install it: pip install "brainalign[features]".',
        ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Give random initialisations a seed, and the global generator its state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _hub(name: str) -> Iterator[None]:
    """Let a library ask the hub; where that cannot be reached, only its cache, without retries."""
    constants = _library("huggingface_hub", "huggingface_hub").constants
    offline = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, offline
    try:
        yield
    except BrainalignError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        missing = _library("huggingface_hub.errors", "huggingface_hub").RepositoryNotFoundError
        chain: BaseException | None = error
        while chain is not None and not offline:
            if isinstance(chain, missing):
                raise UnknownNameError(
                    f"The hub {constants.ENDPOINT} has no model for {name!r}.",
                    "Check its spelling, and that you may read it.",
                ) from error
            chain = chain.__cause__ or chain.__context__
        why = (
            f"{constants.ENDPOINT} cannot be reached and this machine's cache does not hold them"
            if offline
            else f"{type(error).__name__}: {str(error).splitlines()[0]}"
        )
        raise UnavailableError(
            f"The files of {name!r} could not be had: {why}.",
            "Connect to the network, copy the model here and give its path, pass weights=FILE "
            "(open_clip, timm, torchvision), or use 'small-clip', which needs none.",
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT
        ):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _hash_state(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def _load_state(module: nn.Module, path: Path, name: str) -> None:
    """Load weights strictly: a tensor too many, too few or of another shape is an error."""
    state, own = _read_state(path), module.state_dict()
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        problem = (
            f"{wrong[0]!r} has shape {tuple(state[wrong[0]].shape)}, "
            f"expected {tuple(own[wrong[0]].shape)}"
        )
    elif missing := sorted(own.keys() - state.keys()):
        problem = f"{missing[0]!r} is missing ({len(missing)} tensors are)"
    elif extra := sorted(state.keys() - own.keys()):
        problem = f"{extra[0]!r} is unknown ({len(extra)} tensors are)"
    else:
        module.load_state_dict(state)
        return
    raise ConfigError(
        f"{path} does not fit {name!r}: {problem}.",
        "Check the architecture and its options (such as options={'num_classes': 1001}).",
    )


def _build(make: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
    """Call a library's constructor; an option that it does not know is an error of ours."""
    try:
        return make(*args, **options)
    except TypeError as error:
        raise ConfigError(f"{name!r} cannot be built with these options: {error}.") from error


def _open_clip(rest: str, request: _Request) -> Model:
    open_clip = _library("open_clip", "open_clip_torch")
    full = f"open_clip:{rest}"
    size = {} if request.image_size is None else {"force_image_size": request.image_size}
    common: dict[str, Any] = {
        **size,
        "image_mean": None if request.mean is None else tuple(request.mean),
        "image_std": None if request.std is None else tuple(request.std),
        "pretrained_text": False,
        **request.options,
    }
    schema, colon, where = rest.partition(":")
    tag: str | None = None
    if colon and schema in ("local-dir", "hf-hub"):
        arch = rest
        if schema == "local-dir" and not (Path(where) / "open_clip_config.json").is_file():
            raise UnavailableError(
                f"{where} holds no open_clip model: there is no open_clip_config.json in it.",
                "Give the folder that open_clip.push_to_hf_hub or save_pretrained wrote.",
            )
        if request.weights is not None:
            raise ConfigError(f"{full!r} has its own weights; weights goes with ARCH alone.")
    else:
        arch, _, tag = rest.partition("/")
        known = open_clip.list_models()
        if arch not in known:
            raise UnknownNameError(
                f"open_clip has no architecture {arch!r}.{near(arch, known)}",
                "open_clip.list_models() lists them.",
            )
        tags = open_clip.list_pretrained_tags_by_model(arch)
        if tag and tag not in tags:
            raise UnknownNameError(
                f"open_clip has no weights {tag!r} of {arch}.{near(tag, tags)}",
                f"Known: {', '.join(tags)}.",
            )
        if not tag and not request.random and request.weights is None:
            raise ConfigError(
                f"{full!r} does not say which weights.",
                f"Write open_clip:{arch}/TAG with TAG one of {', '.join(tags) or '(none)'}; pass "
                f"weights=FILE; or ask for random:{full}.",
            )
        if tag and request.weights is not None:
            raise ConfigError(f"{full!r} names its weights; with weights write open_clip:{arch}.")
    load = not request.random and request.weights is None
    if load and schema == "local-dir" and not _has_checkpoint(Path(where)):
        raise UnavailableError(
            f"{where} holds an open_clip configuration without weights.",
            "Put open_clip_model.safetensors beside it, or ask for random: weights.",
        )

    def make() -> Any:
        return _build(
            open_clip.create_model_and_transforms,
            full,
            arch,
            pretrained=tag if load and tag else None,
            load_weights=load,
            **common,
        )

    remote = schema == "hf-hub" or (load and schema != "local-dir")
    with _hub(full) if remote else nullcontext():
        module, _, transform = make()
    if request.weights is not None:
        _load_state(module, request.weights, full)
    config = dict(module.visual.preprocess_cfg)
    preprocessing = {
        "image_size": _pair(config["size"]),
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "resize": config["resize_mode"],
    }
    tokenizer: list[Any] = []

    def text(texts: list[str]) -> Tensor:
        if not tokenizer:
            tokenizer.append(open_clip.get_tokenizer(arch))
        return module.encode_text(tokenizer[0](texts).to(next(module.parameters()).device))

    attention = recorded_attention(where) if schema == "local-dir" else "softmax"
    placed = place_attention(module, attention)
    return Model(
        full, module, transform, preprocessing, module.encode_image, text, placed, attention
    )


def _has_checkpoint(folder: Path) -> bool:
    return any(f.suffix in (".safetensors", ".bin", ".pt", ".pth") for f in folder.iterdir())


def _pair(size: Any) -> list[int]:
    return [int(s) for s in size] if isinstance(size, Sequence) else [int(size)] * 2


def _timm(rest: str, request: _Request) -> Model:
    timm = _library("timm", "timm")
    full = f"timm:{rest}"
    schema, colon, where = rest.partition(":")
    local = bool(colon) and schema == "local-dir"
    pretrained = not request.random and request.weights is None
    if local and not Path(where, "config.json").is_file():
        raise UnavailableError(f"{where} holds no timm model: there is no config.json in it.")
    if not colon:
        arch, _, tag = rest.partition(".")
        known = timm.list_models()
        if arch not in known:
            raise UnknownNameError(
                f"timm has no model {arch!r}.{near(arch, known)}", "timm.list_models() lists them."
            )
        tags = [n.partition(".")[2] for n in timm.list_models(f"{arch}.*", pretrained=True)]
        if tag and tag not in tags:
            raise UnknownNameError(
                f"timm has no weights {tag!r} of {arch}.{near(tag, tags)}",
                f"Known: {', '.join(tags) or 'none'}.",
            )
        if pretrained and not tags:
            raise ConfigError(
                f"timm has no weights for {arch}.", f"Pass weights=FILE, or use random:{full}."
            )
    build = {"pretrained": pretrained, **request.options}
    with _hub(full) if not local and (pretrained or colon) else nullcontext():
        module = _build(timm.create_model, full, rest, **build)
    if request.weights is not None:
        _load_state(module, request.weights, full)
    overrides: dict[str, Any] = {
        "mean": None if request.mean is None else tuple(request.mean),
        "std": None if request.std is None else tuple(request.std),
        "input_size": None
        if request.image_size is None
        else (3, request.image_size, request.image_size),
    }
    config = timm.data.resolve_data_config(
        {k: v for k, v in overrides.items() if v is not None}, model=module
    )
    preprocessing = {
        "image_size": list(config["input_size"][1:]),
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "crop_mode": config["crop_mode"],
    }
    return Model(full, module, timm.data.create_transform(**config), preprocessing, module)


def _torchvision(rest: str, request: _Request) -> Model:
    models = _library("torchvision.models", "torchvision")
    full = f"torchvision:{rest}"
    arch, slash, tag = rest.partition("/")
    known = models.list_models(module=models)
    if arch not in known:
        raise UnknownNameError(
            f"torchvision has no classifier {arch!r}.{near(arch, known)}",
            "torchvision.models.list_models(module=torchvision.models) lists them.",
        )
    published = models.get_model_weights(arch)
    tags = [w.name for w in published]
    if slash and tag not in tags:
        raise UnknownNameError(
            f"torchvision has no weights {tag!r} of {arch}.{near(tag, tags)}",
            f"Known: {', '.join(tags)}.",
        )
    if tag and request.weights is not None:
        raise ConfigError(f"{full!r} names its weights; with weights write torchvision:{arch}.")
    chosen = published[tag] if tag else published.DEFAULT
    load = not request.random and request.weights is None
    weights = chosen if load else None
    try:
        with _published_state(full, chosen) if load else nullcontext():
            module = _build(models.get_model, full, arch, weights=weights, **request.options)
    except ValueError as error:
        raise ConfigError(f"{full!r} cannot be built with these options: {error}.") from error
    if request.weights is not None:
        _load_state(module, request.weights, full)
    own = chosen.transforms()
    side, short = own.crop_size[0], own.resize_size[0]
    if request.image_size is not None:
        # The same part of the image, at another resolution.
        side, short = request.image_size, round(short * request.image_size / side)
    transform = chosen.transforms(
        crop_size=side,
        resize_size=short,
        mean=tuple(own.mean if request.mean is None else request.mean),
        std=tuple(own.std if request.std is None else request.std),
    )
    preprocessing = {
        "image_size": [side, side],
        "mean": list(transform.mean),
        "std": list(transform.std),
        "interpolation": transform.interpolation.value,
        "resize": short,
    }
    return Model(full, module, transform, preprocessing, module)


@contextmanager
def _published_state(name: str, weights: Any) -> Iterator[None]:
    """Let torchvision's constructor take published weights from our reading of their file.

    The constructor knows what else belongs to them: scaling of the input, auxiliary heads.
    """
    state = _read_state(_published_file(name, weights.url))
    weights.get_state_dict = lambda *_, **__: state
    try:
        yield
    finally:
        del weights.get_state_dict


def _published_file(name: str, url: str) -> Path:
    """Return a checkpoint of torchvision from where weights are kept, torch's cache or its server.

    The file's name ends in the first digits of its SHA-256.
    """
    file = url.rpartition("/")[2]
    digits = Path(file).stem.rpartition("-")[2]
    cached = Path(torch.hub.get_dir(), "checkpoints", file)
    try:
        found = find_weights(file)
    except UnavailableError as error:
        found = cached
        if not found.is_file() and not _reachable(url):
            raise UnavailableError(
                f"The weights of {name!r} could not be had: {url} cannot be reached. {error}",
                f"Put {file} there, pass weights=FILE, or connect to the network.",
            ) from error
    if found == cached and not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(cached), digits, progress=False)
        except (OSError, RuntimeError) as error:
            raise UnavailableError(
                f"The weights of {name!r} could not be had from {url}: {error}.",
                "Try again, or pass weights=FILE.",
            ) from error
    came = sha256_file(found)
    if not came.startswith(digits):
        raise ChecksumError(
            f"{found} has SHA-256 {came}; expected one that begins with {digits}.",
            "Remove the file, and fetch it again.",
        )
    return found


def _transformers(rest: str, request: _Request) -> Model:
    library = _library("transformers", "transformers")
    full = f"transformers:{rest}"
    bare = rest.removeprefix("classifier:")
    classifies, rest = bare != rest, bare
    builder = library.AutoModelForImageClassification if classifies else library.AutoModel
    local = Path(rest).is_dir()
    if not local and rest.startswith(("/", ".", "~")):
        raise UnavailableError(f"There is no folder {rest!r} with a transformers model.")
    if local and not Path(rest, "config.json").is_file():
        raise UnavailableError(f"{rest} holds no transformers model: there is no config.json.")

    def make() -> tuple[Any, Any]:
        changes: dict[str, Any] = {}
        if request.mean is not None:
            changes["image_mean"] = list(request.mean)
        if request.std is not None:
            changes["image_std"] = list(request.std)
        if request.image_size is not None:
            side = {"height": request.image_size, "width": request.image_size}
            changes |= {"size": side, "crop_size": side}
        processor = library.AutoImageProcessor.from_pretrained(rest, **changes)
        if not request.random and request.weights is None:
            module, report = builder.from_pretrained(
                rest, output_loading_info=True, **request.options
            )
            if report["missing_keys"] and classifies:
                raise ConfigError(
                    f"{full} has no trained head: its weights lack "
                    f"{', '.join(sorted(report['missing_keys'])[:5])}.",
                    "Name a checkpoint of a classifier.",
                )
            if report["missing_keys"]:
                log.warning(
                    "%s: the weights lack %s; it keeps its seeded initialisation.",
                    full,
                    ", ".join(sorted(report["missing_keys"])[:5]),
                )
            return module, processor
        config = library.AutoConfig.from_pretrained(rest, **request.options)
        return builder.from_config(config), processor

    with nullcontext() if local else _hub(full):
        module, processor = make()
    if request.weights is not None:
        _load_state(module, request.weights, full)
    settings = processor.to_dict()
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = dict(crop or settings.get("size") or {})
    side = size.get("shortest_edge", 224)
    preprocessing = {
        "image_size": [int(size.get("height") or side), int(size.get("width") or side)],
        "mean": list(settings.get("image_mean") or [0.0] * 3),
        "std": list(settings.get("image_std") or [1.0] * 3),
        "processor": {
            k: settings[k]
            for k in sorted(settings)
            if k.startswith(("do_", "resample", "rescale", "size", "crop", "image_processor"))
            and isinstance(settings[k], bool | int | float | str | dict)
        },
    }

    def transform(image: Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    text: Callable[[list[str]], Tensor] | None = None
    forward: Callable[[Tensor], Any]
    if classifies:

        def forward(images: Tensor) -> Tensor:
            return module(pixel_values=images).logits

    elif hasattr(module, "get_image_features"):
        forward = _image_features(module)
        tokenizer: list[Any] = []

        def text(texts: list[str]) -> Tensor:
            if not tokenizer:
                tokenizer.append(library.AutoTokenizer.from_pretrained(rest))
            # SigLIP was trained on texts padded to full length; CLIP ignores what follows the end.
            length = module.config.text_config.max_position_embeddings
            tokens = tokenizer[0](
                texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).to(next(module.parameters()).device)
            return _pooled(module.get_text_features(**tokens))

    else:

        def forward(images: Tensor) -> Any:
            return module(pixel_values=images)

    return Model(full, module, transform, preprocessing, forward, text)


def _image_features(module: Any) -> Callable[[Tensor], Tensor]:
    """Return what runs the image tower of a dual encoder of transformers."""

    def forward(images: Tensor) -> Tensor:
        return _pooled(module.get_image_features(pixel_values=images))

    return forward


def _pooled(output: Any) -> Tensor:
    """Return the embedding that a dual encoder's ``get_*_features`` gives."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _instance(
    module: nn.Module, transform: Callable[[Image], Tensor] | None, request: _Request
) -> Model:
    if transform is None:
        if request.image_size is None or request.mean is None or request.std is None:
            raise ConfigError(
                "A module needs transform, or image_size, mean and std to make one from."
            )
        transform = _standard_transform(request.image_size, request.mean, request.std)
    from PIL import Image as PILImage

    # What an arbitrary callable does can be named only by what it makes of a fixed image.
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    probe = transform(PILImage.fromarray(noise))
    preprocessing: dict[str, Any] = {
        "image_size": list(probe.shape[-2:]),
        "mean": None if request.mean is None else list(request.mean),
        "std": None if request.std is None else list(request.std),
        "probe_sha256": sha256_of(probe.numpy()),
        "module_sha256": sha256_of(repr(module)),
    }
    name = f"instance:{type(module).__name__}"
    forward: Any = getattr(module, "encode_image", module)
    if hasattr(module, "get_image_features"):
        forward = _image_features(module)
    return Model(name, module, transform, preprocessing, forward)


def _standard_transform(
    size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image], Tensor]:
    transforms = _library("torchvision.transforms", "torchvision")
    return transforms.Compose(
        [
            transforms.Resize(
                size, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
            ),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(list(mean), list(std)),
        ]
    )
