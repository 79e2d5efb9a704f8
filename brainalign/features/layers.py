"""The layers of a model: their names, their shapes, and how their outputs are pooled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainalign.errors import ConfigError, UnknownNameError, near

__all__ = [
    "OUTPUT",
    "POOLINGS",
    "Layer",
    "Pooling",
    "match",
    "pool",
    "pooled",
    "pooled_shape",
    "trace",
]

Pooling = Literal["mean", "class", "none", "flatten", "unit"]
POOLINGS: tuple[Pooling, ...] = ("mean", "class", "none", "flatten", "unit")
OUTPUT = "output"

_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token")
_REGISTER_TOKENS = ("reg_token", "register_tokens")


class Layer(NamedTuple):
    """One layer, as a forward pass of one image showed it.

    Parameters
    ----------
    name : str
        The module's dotted name, or ``"output"`` for what the forward pass returns.
    shape : tuple of int
        Of the output for one image.
    kind : str
        ``"vector"`` (feature), ``"tokens"`` (token, feature), ``"maps"`` (channel, row, column),
        ``"maps_last"`` (row, column, channel) or ``"other"``.
    module : str
        The module's class.
    batch_axis : int
        The axis of the output that runs over images.
    prefix : int
        How many leading tokens are no image patch (class, distillation, registers).
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    module: str
    batch_axis: int
    prefix: int


def tensor_of(output: Any) -> Tensor | None:
    """Return the tensor that a module's output stands for, or None.

    Of a mapping (a transformers output) ``last_hidden_state`` or else the first tensor; of a tuple
    or list the first tensor.
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        known = output.get("last_hidden_state")
        return tensor_of(known if known is not None else tuple(output.values()))
    if isinstance(output, tuple | list):
        return next((t for t in map(tensor_of, output) if t is not None), None)
    return None


@contextmanager
def hooked(
    module: nn.Module, names: Sequence[str] | None, receive: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `receive` with the outputs of the named sub-modules (None: all) at each pass."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = tensor_of(output)
            if tensor is not None:
                receive(name, tensor)

        return record

    wanted = None if names is None else set(names)
    handles = [
        sub.register_forward_hook(hook(name))
        for name, sub in module.named_modules()
        if name and (wanted is None or name in wanted)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _prefix_tokens(module: nn.Module) -> int:
    count = 0
    for name, parameter in module.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in _CLASS_TOKENS:
            count += 1
        elif leaf in _REGISTER_TOKENS:
            count += parameter.shape[-2]
    return count


def _kind(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        # Square maps: the axis that differs from the other two holds the channels. All three equal
        # or none: channels first, torch's own order.
        return "maps_last" if shape[0] == shape[1] != shape[2] else "maps"
    return {1: "vector", 2: "tokens"}.get(len(shape), "other")


def trace(module: nn.Module, forward: Callable[[Tensor], Any], image: Tensor) -> dict[str, Layer]:
    """Return the layers that a forward pass reaches, in the order in which they finish.

    A layer is a sub-module whose output is a floating-point tensor with one axis that runs over
    images, found by passing one image and then two; ``Identity`` and ``Dropout``, which change
    nothing, are left out. A module called several times in one pass stands for its last call.

    Parameters
    ----------
    module : torch.nn.Module
        The model, in eval mode.
    forward : callable
        What runs it on a batch of images.
    image : tensor, shape (channel, row, column)
        One transformed image.
    """
    seen: list[dict[str, tuple[int, ...]]] = []
    for n in (1, 2):
        shapes: dict[str, tuple[int, ...]] = {}

        def receive(name: str, output: Tensor, shapes: dict[str, tuple[int, ...]] = shapes) -> None:
            shapes[name] = tuple(output.shape)

        with hooked(module, None, receive), torch.no_grad():
            output = tensor_of(forward(image.expand(n, *image.shape)))
        if output is not None:
            shapes.setdefault(OUTPUT, tuple(output.shape))
        seen.append(shapes)
    types = {name: type(sub) for name, sub in module.named_modules()}
    found: dict[str, Layer] = {}
    for name, one in seen[0].items():
        two = seen[1].get(name, ())
        if types.get(name) in (nn.Identity, nn.Dropout):
            continue
        axes = [a for a, (p, q) in enumerate(zip(one, two, strict=False)) if p != q]
        if len(one) != len(two) or len(one) < 2 or len(axes) != 1:
            continue
        axis = axes[0]
        if (one[axis], two[axis]) != (1, 2):
            continue
        shape = one[:axis] + one[axis + 1 :]
        label = types[name].__name__ if name in types else ""
        found[name] = Layer(name, shape, _kind(shape), label, axis, 0)
    # The longest sequence is the one that carries the prefix tokens; a shorter one (patch
    # embeddings) does not have them yet.
    longest = max((x.shape[0] for x in found.values() if x.kind == "tokens"), default=0)
    prefix = _prefix_tokens(module)
    return {
        name: x._replace(prefix=prefix) if x.kind == "tokens" and x.shape[0] == longest else x
        for name, x in found.items()
    }


def _pattern(text: str) -> re.Pattern[str]:
    if text.startswith("re:"):
        try:
            return re.compile(text[3:])
        except re.error as error:
            raise ConfigError(f"{text!r} is not a regular expression: {error}.") from error
    parts = re.split(r"(\*\*|\*|\?)", text)
    wild = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile("".join(wild.get(p, re.escape(p)) for p in parts))


def match(patterns: str | Sequence[str], names: Sequence[str], model: str) -> list[str]:
    """Return the names that any of the patterns matches, in the order of `names`.

    Parameters
    ----------
    patterns : str or sequence of str
        Exact names; globs, where ``*`` and ``?`` stay within one dotted part and ``**`` crosses
        dots; or regular expressions after ``re:``, which must match the whole name.
    names : sequence of str
        The known names.
    model : str
        Whose layers they are, for the message.

    Raises
    ------
    UnknownNameError
        For the first pattern that matches nothing.
    """
    chosen: set[str] = set()
    for text in [patterns] if isinstance(patterns, str) else patterns:
        expression = _pattern(text)
        hits = [n for n in names if n == text or expression.fullmatch(n)]
        if not hits:
            raise UnknownNameError(
                f"{model} has no layer {text!r}.{near(text, names)}",
                f"`brainalign layers {model}` lists its {len(names)} layers.",
            )
        chosen.update(hits)
    return [n for n in names if n in chosen]


def pooled_shape(layer: Layer, pooling: Pooling) -> tuple[int, ...]:
    """Return the shape of one image's features: (feature,), or (token, feature).

    Raises
    ------
    ConfigError
        If the layer cannot be pooled so.
    """
    if pooling not in POOLINGS:
        raise ConfigError(
            f"pooling is {pooling!r}.{near(pooling, POOLINGS)}", f"Known: {', '.join(POOLINGS)}."
        )
    size = 1
    for n in layer.shape:
        size *= n
    if pooling == "unit" and layer.kind != "vector":
        raise ConfigError(
            f"Layer {layer.name!r} is {layer.kind} of shape {layer.shape}; pooling='unit' gives "
            "vectors unit length.",
            "Use it with a layer whose output is a vector, such as 'output'.",
        )
    if pooling == "flatten" or layer.kind == "vector":
        return (size,)
    if layer.kind == "other":
        raise ConfigError(
            f"Layer {layer.name!r} has outputs of shape {layer.shape}, which pooling={pooling!r} "
            "cannot read as tokens or maps.",
            "Use pooling='flatten' or another layer.",
        )
    if pooling == "class" and not layer.prefix:
        raise ConfigError(
            f"Layer {layer.name!r} has no class token: its output is {layer.kind} of shape "
            f"{layer.shape}.",
            "Use pooling='mean', 'none' or 'flatten'.",
        )
    channels = layer.shape[0] if layer.kind == "maps" else layer.shape[-1]
    return (size // channels, channels) if pooling == "none" else (channels,)


def pooled(output: Tensor, layer: Layer, pooling: Pooling) -> Tensor:
    """Return a batch's features, ``(image, *pooled_shape)``, with gradients and of the same dtype.

    ``mean`` averages over the positions of a map, or over patch tokens (class, distillation and
    register tokens left out); ``class`` takes the class token; ``none`` keeps every token, the
    positions of a map being its tokens in row-major order; ``flatten`` makes one vector of all;
    ``unit`` divides a vector by its Euclidean norm. Vectors stay as they are otherwise.
    """
    x = output.movedim(layer.batch_axis, 0)
    if pooling == "unit":
        return functional.normalize(x, dim=-1)
    if pooling == "flatten" or layer.kind == "vector":
        return x.flatten(1)
    if layer.kind == "maps":
        x = x.flatten(2).mT
    elif layer.kind == "maps_last":
        x = x.flatten(1, 2)
    if pooling == "class":
        return x[:, 0]
    return x[:, layer.prefix :].mean(1) if pooling == "mean" else x


def pool(output: Tensor, layer: Layer, pooling: Pooling) -> Tensor:
    """Return what `pooled` does, without gradients, as float32 in memory of its own."""
    # A copy: a later layer may work in place on the very memory hooked here.
    x = pooled(output.detach().float(), layer, pooling)
    return x.clone(memory_format=torch.contiguous_format)
