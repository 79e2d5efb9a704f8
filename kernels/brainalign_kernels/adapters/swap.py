"""Swap the attention of a model, and put it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import TracebackType

from torch import nn

from brainalign_kernels.adapters import diffusers, intercept, transformers
from brainalign_kernels.adapters.sites import Attend, Grid, Site, find_grids, read_grids
from brainalign_kernels.adapters.specs import Attention, parse
from brainalign_kernels.errors import ShapeError, UnsupportedError

__all__ = ["Swap", "attention_layers", "swap_attention"]


class Swap:
    """A model whose attention is swapped, until `restore` or the end of a ``with`` block.

    Attributes
    ----------
    layers : tuple of str
        The attention layers that were swapped.
    skipped : dict of str to str
        Those that were not though no layers were named, and why.
    """

    def __init__(
        self, sites: Sequence[Site], skipped: dict[str, str], undo: list[Callable[[], None]]
    ) -> None:
        self.layers = tuple(site.name for site in sites)
        self.skipped, self._undo, self._sites = skipped, undo, sites

    @property
    def calls(self) -> int:
        """How often the swapped attention has been computed so far, over all layers."""
        return sum(site.calls for site in self._sites)

    def restore(self) -> None:
        """Put the model's own attention back; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Swap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def swap_attention(
    model: nn.Module,
    attention: str | Attend,
    *,
    layers: int | str | Sequence[int | str] | None = None,
    grid: tuple[int, ...] | None = None,
) -> Swap:
    """Replace the attention in a trained model; projections, norms and weights stay.

    This measures what a mechanism does to a model that was trained with another one. Only what
    lies between the projected q, k, v and the output projection changes. Models of transformers
    are swapped through its AttentionInterface, of diffusers through attention processors, of timm,
    open_clip and PyTorch module by module.

    Mechanisms on a grid get the grid of the image tokens, which is read behind the patch embedding
    at each forward pass. Tokens before it (class token, registers) attend to all tokens and are
    attended to by all; then, or where the model has a mask, the mechanism runs as softmax attention
    with a dense mask. In a model with a grid, its text layers keep their own attention unless
    `layers` names them; text is one axis. Cross-attention is replaced only by mechanisms whose
    queries and keys may be different tokens.

    Parameters
    ----------
    model : torch.nn.Module
        In eval mode if it has attention dropout.
    attention : str or callable
        Such as ``"softmax"``, ``"neighborhood:k=7"``, ``"agent:m=49"``; see `parse`. Or a callable
        ``(q, k, v, *, shape, mask, is_causal, scale) -> out``, see `Attend`.
    layers : int, str or sequence of them, optional
        Numbers in the order of `attention_layers`, names, or globs (``"visual.*"``). By default
        all that the mechanism can replace.
    grid : tuple of int, optional
        Rows and columns of the image tokens, where they cannot be read from the model.

    Returns
    -------
    Swap
        A context manager with ``restore()``.

    Raises
    ------
    ShapeError
        If the specification, or a layer, is unknown; with what there is.
    UnsupportedError
        If the model's attention cannot be swapped, or is swapped already.
    """
    chosen = parse(attention)
    return swap_sites(model, chosen, lambda site: chosen, layers=layers, grid=grid)


def swap_sites(
    model: nn.Module,
    chosen: Attention,
    at: Callable[[Site], Attend],
    *,
    layers: int | str | Sequence[int | str] | None = None,
    grid: tuple[int, ...] | None = None,
) -> Swap:
    """Replace attention by what `at` gives for each layer, where `chosen` could go."""
    family, sites = _find(model)
    if grid is not None:
        given = Grid(fixed=tuple(grid))
        for site in sites:
            site.grid = given if site.grid is None or site.grid.module is not None else site.grid
    wanted, skipped = _select(sites, layers), {}
    has_grid = any(site.grid is not None for site in sites)
    kept = []
    for site in wanted:
        reason = _unfit(site, chosen, has_grid and layers is None)
        if not reason:
            kept.append(site)
        elif layers is None:
            skipped[site.name] = reason
        else:
            raise UnsupportedError(f"{chosen} cannot replace {site.name!r}: {reason}.")
    if not kept:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention layer that {chosen} can replace: "
            + "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
            + "."
        )
    undo: list[Callable[[], None]] = []
    try:
        undo += [h.remove for h in read_grids([s.grid for s in kept if s.grid is not None])]
        pairs = [(site, at(site)) for site in kept]
        if family == "transformers":
            undo.append(transformers.swap(model, pairs))
        elif family == "diffusers":
            undo.append(diffusers.swap(model, pairs))
        else:
            for site, attend in pairs:
                undo.append(intercept.swap(site, attend))
    except BaseException:
        Swap([], {}, undo).restore()
        raise
    return Swap(kept, skipped, undo)


def attention_layers(model: nn.Module) -> list[str]:
    """Return the names of the attention layers that can be swapped, in the model's order.

    Parameters
    ----------
    model : torch.nn.Module
        Of transformers, diffusers, timm or open_clip, or with ``nn.MultiheadAttention``.

    Returns
    -------
    list of str

    Raises
    ------
    UnsupportedError
        If there are none.
    """
    return [site.name for site in _find(model)[1]]


def _find(model: nn.Module) -> tuple[str, list[Site]]:
    if diffusers.is_model(model):
        return "diffusers", diffusers.find_sites(model)
    family = "transformers" if transformers.is_model(model) else "modules"
    test = transformers.is_attention if family == "transformers" else intercept.is_attention
    sites = [Site(name, module) for name, module in model.named_modules() if test(module)]
    if not sites:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention layer that can be swapped: expected a model "
            "of transformers, diffusers, timm or open_clip, or with nn.MultiheadAttention."
        )
    grids = find_grids(model, [site.name for site in sites])
    for site in sites:
        site.grid = grids.get(site.name)
        site.cross = _is_cross(site)
    return family, sites


def _is_cross(site: Site) -> bool:
    kind = type(site.module).__name__.lower()
    last = site.name.rpartition(".")[2].lower()
    return "pool" in kind or "pool" in site.name or "cross" in kind or "cross" in last


def _select(sites: Sequence[Site], layers: int | str | Sequence[int | str] | None) -> list[Site]:
    if layers is None:
        return list(sites)
    names = [site.name for site in sites]
    patterns = [layers] if isinstance(layers, int | str) else list(layers)
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, int):
            if not -len(names) <= pattern < len(names):
                raise ShapeError(
                    f"There is no attention layer {pattern}: the model has {len(names)}."
                )
            chosen.add(names[pattern])
            continue
        matched = [n for n in names if fnmatchcase(n, pattern)]
        if not matched:
            near = get_close_matches(pattern, names, 3, 0.3) or names[:3]
            raise ShapeError(f"No attention layer is {pattern!r}; there are {', '.join(near)}, ...")
        chosen.update(matched)
    return [site for site in sites if site.name in chosen]


def _unfit(site: Site, attention: Attention, images_only: bool) -> str:
    """Why `attention` cannot replace this layer, or an empty string."""
    if site.cross and not attention.cross:
        return "its queries and keys are different tokens"
    if attention.grid and site.grid is None and (images_only or not attention.line):
        return "its tokens are no image"
    return ""
