"""Draw the pictures of the attention pages: ``python docs/attention_pictures.py``.

Every picture is what the package computes for small inputs with fixed seeds.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.nn import functional as F

import brainalign_kernels as bk
from brainalign_kernels import draw_attention, effective_attention

FOLDER = Path(__file__).parent / "images" / "attention"
SIDE = 12
GRID = (SIDE, SIDE)
MIDDLE = SIDE // 2 * SIDE + SIDE // 2
QUERIES = (0, MIDDLE, SIDE * SIDE - 1)
PICTURES: dict[str, Callable[[], Figure]] = {}


def picture(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Register a function that draws the picture of its name."""
    PICTURES[draw.__name__] = draw
    return draw


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(
    heads: int = 1, channels: int = 16, *, size: float = 3.0, seed: int = 0, side: int = SIDE
) -> Tensor:
    """Tokens (1, H, side^2, D) that vary smoothly over a grid, with q.q D^-1/2 = size."""
    coarse = noise(heads, channels, 5, 5, seed=seed)
    fine = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=True).flatten(2).mT
    return (F.normalize(fine, dim=-1) * (size * channels**0.5) ** 0.5)[None]


def text(
    tokens: int = 48, heads: int = 1, channels: int = 16, *, size: float = 4.0, seed: int = 0
) -> Tensor:
    """Tokens (1, H, N, D) that vary smoothly along a line."""
    coarse = noise(heads, channels, tokens // 6, seed=seed)
    fine = F.interpolate(coarse, tokens, mode="linear", align_corners=True).mT
    return (F.normalize(fine, dim=-1) * (size * channels**0.5) ** 0.5)[None]


def matrix(attend: Callable[[Tensor], Tensor], tokens: int, heads: int = 1) -> Tensor:
    """Effective attention (H, N, S) of one sample."""
    return effective_attention(attend, noise(1, heads, tokens, 4, seed=9))[0]


Panel = tuple[Tensor, str, str, str]


def panels(
    *parts: Panel,
    label: str = "weight",
    width: float = 2.2,
    top: float | None = None,
    scales: Sequence[int] = (0,),
) -> Figure:
    """Draw arrays (array, title, x, y) side by side.

    `scales` are the panels with which a new colour scale begins; the first ends at `top` at most.
    """
    figure = Figure(figsize=(width * len(parts) + 0.9 * len(scales), 2.5), layout="constrained")
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for start, stop in pairwise([*scales, len(parts)]):
        values = [p[0].detach().double().numpy() for p in parts[start:stop]]
        signed = any((v < 0).any() for v in values)
        largest = max(abs(v).max() for v in values)
        end = largest if top is None or start else min(top, largest)
        style = {
            "cmap": "RdBu_r" if signed else "Greys",
            "vmin": -end if signed else 0.0,
            "vmax": end,
        }
        group = list(axes[start:stop])
        for axis, value, (_, title, x, y) in zip(group, values, parts[start:stop], strict=True):
            drawn = axis.imshow(value, aspect="auto", interpolation="nearest", **style)
            axis.set(xlabel=x, ylabel=y)
            axis.set_title(title, fontsize="medium")
            axis.locator_params(nbins=5, integer=True)
        extend = "neither" if largest <= end else "both" if signed else "max"
        bar = figure.colorbar(drawn, ax=group, pad=0.02, extend=extend)
        bar.set_label(label if stop == len(parts) else "")
        bar.ax.tick_params(labelsize="small")
    return figure


def on_grid(values: Tensor) -> Tensor:
    return values.reshape(GRID)


@picture
def softmax() -> Figure:
    x = image()
    weights = matrix(lambda v: bk.softmax_attention(x, x, v), SIDE**2)[0]
    return draw_attention(weights, shape=GRID, queries=QUERIES, title="softmax")


@picture
def neighborhood() -> Figure:
    x = image(size=1.5)
    weights = matrix(
        lambda v: bk.neighborhood_attention(x, x, v, shape=GRID, kernel_size=5), SIDE**2
    )[0]
    return draw_attention(weights, shape=GRID, queries=QUERIES, title="5 x 5 window")


@picture
def neighborhood_windows() -> Figure:
    kinds: list[tuple[str, dict]] = [
        ("window of 5", {}),
        ("dilation 2", {"dilation": 2}),
        ("stride 4", {"stride": 4}),
        ("causal", {"is_causal": True}),
    ]
    masks = [bk.neighborhood_mask((24,), kernel_size=5, **options) for _, options in kinds]
    return panels(
        *[
            (mask.double(), title, "key", "query" if i == 0 else "")
            for i, (mask, (title, _)) in enumerate(zip(masks, kinds, strict=True))
        ],
        label="may be attended",
        width=1.8,
    )


@picture
def halo() -> Figure:
    x = image(size=1.5)
    attend = lambda v: bk.halo_attention(x, x, v, shape=GRID, block_size=4, halo_size=2)  # noqa: E731
    weights = matrix(attend, SIDE**2)[0]
    return draw_attention(weights, shape=GRID, queries=QUERIES, title="blocks of 4, halo 2")


@picture
def clear() -> Figure:
    x = torch.cat([noise(1, 1, 6, 16, seed=3), image(size=1.5)], dim=2)
    attend = lambda v: bk.clear_attention(x, x, v, shape=GRID, n_text=6, radius=4)  # noqa: E731
    weights = matrix(attend, 6 + SIDE**2)[0]
    return draw_attention(
        weights,
        shape=GRID,
        queries=(0, 6 + MIDDLE, 5 + SIDE**2),
        title="6 text tokens, r = 4",
        top=0.1,
    )


@picture
def hip() -> Figure:
    # Words of a few kinds, so that what matters lies anywhere in the past.
    kinds = torch.randint(8, (16,), generator=torch.Generator().manual_seed(0)).repeat_interleave(8)
    x = 5.0 * F.normalize(noise(8, 16, seed=1)[kinds] + 0.8 * noise(128, 16), dim=-1)[None, None]
    options = {"top_k": 16, "block_size_q": 8, "block_size_k": 2, "window": 8, "sinks": 2}
    dense = matrix(lambda v: bk.softmax_attention(x, x, v, is_causal=True), 128)[0]
    kept = matrix(lambda v: bk.hip_attention(x, x, v, **options), 128)[0]
    names = ("causal softmax", "HiP, 16 of 128 keys")
    parts = [(w, t, "key", "query") for w, t in zip((dense, kept), names, strict=True)]
    return panels(*parts, top=0.2, width=3.2)


@picture
def agent() -> Figure:
    x = image()
    pooled = F.adaptive_avg_pool2d(x[0].mT.unflatten(2, GRID), 4).flatten(2).mT[None]
    weights = matrix(lambda v: bk.agent_attention(x, x, v, pooled), SIDE**2)[0]
    return draw_attention(weights, shape=GRID, queries=QUERIES, title="16 agents")


@picture
def moh() -> Figure:
    routed, shared = 1.5 * text(24, channels=6)[0], 0.5 * text(24, channels=2, seed=1)[0]
    routing = bk.moh_routing(routed, 2, shared=shared, balance=0.4 * text(24, 1, 2, seed=2)[0])
    return panels(
        (routing.selected[0].mT.double(), "head in use", "token", "head"),
        (routing.gates[0].mT, "gate", "token", "head"),
        label="gate",
        width=3.2,
    )


@picture
def reversed_attention() -> Figure:
    side = 8
    x = image(2, 8, side=side)
    chosen = (2 * image(1, 2, seed=1, side=side)[0]).softmax(-1).mT
    gate = image(1, 1, seed=2, side=side)[0, :, :, 0].sigmoid()
    options = {"head_probabilities": chosen, "gate": gate}
    usual = matrix(lambda v: bk.softmax_attention(x, x, v), side**2, 2).mean(0)
    sent = matrix(lambda v: bk.reversed_attention(x, x, v, **options), side**2, 2).sum(0)
    return panels(
        (usual, "softmax: rows sum to 1", "key", "query"),
        (sent, "reversed", "child (sends)", "parent (receives)"),
        (sent.sum(1).reshape(side, side), "received", "column", "row"),
        top=0.1,
        scales=(0, 2),
    )


@picture
def dual_cross() -> Figure:
    x = torch.cat([image().mean(2, keepdim=True), image()], 2)
    deep = torch.cat([noise(1, 1, 1, 16, seed=4), image(seed=5)], 2)
    row = bk.class_rollout([x, deep], [x, deep])
    indices = bk.select_top(row, 0.1)
    local = matrix(lambda v: bk.global_local_cross_attention(x, x, v, indices), 1 + SIDE**2)[0]
    pair = torch.cat([text(24), text(24).roll(9, 2)])
    # Values that say from which image and token they come: the output is the weights.
    marks = torch.eye(48, dtype=torch.float64).unflatten(0, (2, 1, 24))
    paired = bk.pair_wise_cross_attention(pair, pair, marks, torch.tensor([1, 0]))[0, 0]
    figure = Figure(figsize=(7.6, 2.5), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, value, title in (
        (axes[0], on_grid(row[0, 1:]), "rollout of the class token"),
        (axes[1], local, "GLCA: chosen queries"),
        (axes[2], paired, "PWCA: own | other keys"),
    ):
        axis.imshow(value.numpy(), aspect="auto", cmap="Greys", vmin=0)
        axis.set_title(title, fontsize="medium")
        axis.set(xlabel="key", ylabel="chosen query" if axis is axes[1] else "query")
    places = indices[0, 1:] - 1
    axes[0].plot(places % SIDE, places // SIDE, "o", mfc="none", mec="tab:red", ms=6)
    axes[0].set(xlabel="column", ylabel="row")
    axes[2].axvline(23.5, color="tab:red", lw=0.8)
    return figure


@picture
def sinks() -> Figure:
    place = torch.arange(40)
    marks, shown = (place == 0) | (place == 14), (place >= 8) & (place < 28)
    drawn_to = F.normalize(noise(16, seed=7), dim=-1)
    q, k = text(40, size=1.5) + 2.0 * drawn_to, text(40, size=1.5)
    k[:, :, marks] = 6.0 * drawn_to
    before = matrix(lambda v: bk.softmax_attention(q, k, v, is_causal=True), 40)[0]
    after = matrix(
        lambda v: bk.visual_attention_redistribution(q, k, v, marks, shown, is_causal=True), 40
    )[0]
    return panels(
        (before, "attention", "key", "query"),
        (after, "redistributed", "key", ""),
        (after - before, "difference", "key", ""),
        top=0.25,
        scales=(0, 2),
    )


@picture
def vision_heads() -> Figure:
    layers, heads, scene, words = 6, 8, 16, 6
    outputs: dict[bool, list[Tensor]] = {True: [], False: []}
    for layer in range(layers):
        x = noise(1, heads, scene + words, 8, seed=layer)
        x[:, :, :scene] *= torch.linspace(0.2, 1.6, heads)[:, None, None]
        for seen in (True, False):
            kept = x if seen else x[:, :, scene:]
            outputs[seen].append(bk.softmax_attention(kept[:, :, -1:], kept, kept)[0, :, 0])
    found = bk.vision_aware_head_divergence(*(torch.stack(outputs[s]) for s in (True, False)))
    chosen = bk.select_vision_heads(found, last_layers=3)
    figure = panels((found, "divergence; circles: reinforced", "head", "layer"), width=4.6,
                    label="VHD")  # fmt: skip
    rows, columns = chosen.nonzero(as_tuple=True)
    figure.get_axes()[0].plot(columns, rows, "o", mfc="none", mec="tab:red", ms=9)
    return figure


@picture
def adversarial() -> Figure:
    hidden, size = text(20, channels=8)[0], 8
    pool = bk.AdditiveAttentionPooling(size, 4).double()
    read = noise(size, seed=5)
    with torch.no_grad():
        for i, parameter in enumerate(pool.parameters()):
            parameter.copy_(0.8 * noise(*parameter.shape, seed=10 + i))
    scores = pool.scores(hidden).detach()

    def logits(s: Tensor) -> Tensor:
        return (pool.pool(s, hidden) @ read)[:, None]

    def loss(s: Tensor) -> Tensor:
        return F.softplus(-logits(s)).mean()

    moved = {
        kind: bk.adversarial_attention_loss(loss, scores, kind=kind, xi=3.0).perturbation
        for kind in ("AT", "iAT")
    }
    for kind in ("VAT", "iVAT"):
        generator = torch.Generator().manual_seed(0)
        moved[kind] = bk.virtual_adversarial_attention_loss(
            logits, scores, kind=kind, xi=3.0, generator=generator
        ).perturbation
    rows = [scores, *(scores + r for r in moved.values())]
    weights = torch.cat([s.softmax(-1) for s in rows])
    figure = panels((weights, "attention of 20 tokens", "token", ""), width=5.6)
    figure.get_axes()[0].set_yticks(range(5), ["clean", *moved])
    return figure


class Small(nn.Module):
    """Patch embedding and three attention layers whose heads look ever further."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(3)
        )
        places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
        angles = places[:, :, None] * torch.tensor([0.2, 0.4, 0.8, 1.6])
        self.register_buffer("places", torch.cat([angles.sin(), angles.cos()], -1).flatten(1))
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(0.1 * noise(*parameter.shape, seed=i))
            for i, layer in enumerate(self.layers):
                for head in range(4):
                    keep = noise(8, 32, seed=50 + 4 * i + head)
                    keep[:, 16:] *= 0.1
                    strength = 1.2 - 0.35 * i - 0.1 * head
                    for start in (0, 32):
                        at = start + 8 * head
                        layer.in_proj_weight[at : at + 8] = strength * keep

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, 32, 32) to tokens (B, 64, 32)."""
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.places.expand(len(x), -1, -1), x[..., 16:]], -1)
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


@picture
def heads() -> Figure:
    from brainalign_kernels.probes import attention_distance, attention_rollout, ring_profile

    model = Small().double().eval()
    images = noise(4, 3, 32, 32)

    def run() -> Tensor:
        return model(images)

    distance = attention_distance(model, run)
    rings = ring_profile(model, run)
    rollout = attention_rollout(model, run).mean(0)
    figure = Figure(figsize=(7.6, 2.5), layout="constrained")
    axes = figure.subplots(1, 3)
    for i, (layer, values) in enumerate(distance.items()):
        axes[0].plot([i] * len(values), values, "o", color=f"C{i}")
        for row in rings[layer]:
            axes[1].plot(row, color=f"C{i}", lw=0.9)
    axes[0].set(xlabel="layer", ylabel="distance (patches)", xticks=range(3))
    axes[0].set_title("each head's distance", fontsize="medium")
    axes[1].set(xlabel="hops", ylabel="attention", ylim=(0, None))
    axes[1].set_title("strength by ring", fontsize="medium")
    drawn = axes[2].imshow(rollout[36].reshape(8, 8).numpy(), cmap="Greys", vmin=0)
    axes[2].plot(4, 4, "o", mfc="none", mec="tab:red", ms=7)
    axes[2].set(xlabel="column", ylabel="row")
    axes[2].set_title("rollout of patch 36", fontsize="medium")
    figure.colorbar(drawn, ax=axes[2], label="weight")
    return figure


@picture
def linear() -> Figure:
    x = F.elu(image()) + 1
    weights = matrix(lambda v: bk.linear_attention(x, x, v, eps=1e-6), SIDE**2)[0]
    return draw_attention(weights, shape=GRID, queries=QUERIES, title="linear, elu + 1")


@picture
def lightning() -> Figure:
    x = F.silu(text(48).expand(-1, 4, -1, -1))
    decay = -bk.lightning_slopes(4).double()
    weights = matrix(lambda v: bk.lightning_attention(x, x, v, decay), 48, 4)
    parts = [
        (weights[h], f"slope {-float(decay[h]):.3g}", "key", "query" if h == 0 else "")
        for h in range(4)
    ]
    return panels(*parts, width=1.8)


@picture
def gated_linear() -> Figure:
    x = F.silu(text(48))
    steady = torch.full((1, 1, 48), -0.05, dtype=torch.float64)
    resets = steady.clone()
    resets[..., (16, 32)] = -torch.inf
    chosen = -4.0 * text(48, channels=1, seed=3)[..., 0].sigmoid().square()
    kinds = (("constant decay", steady), ("resets at 16 and 32", resets), ("by token", chosen))
    parts = [
        (matrix(lambda v, g=g: bk.gated_linear_attention(x, x, v, g), 48)[0], name, "key", "query")
        for name, g in kinds
    ]
    return panels(*parts)


@picture
def flow() -> Figure:
    x = image()
    weights = matrix(lambda v: bk.flow_attention(x, x, v), SIDE**2)[0]
    return draw_attention(weights, shape=GRID, queries=QUERIES, title="flow")


@picture
def flow_causal() -> Figure:
    x = text(48)
    flow = matrix(lambda v: bk.flow_attention(x, x, v, is_causal=True), 48)[0]
    soft = matrix(lambda v: bk.softmax_attention(x, x, v, is_causal=True), 48)[0]
    parts = [(w, t, "key", "query") for w, t in ((soft, "causal softmax"), (flow, "causal flow"))]
    return panels(*parts, top=0.2, width=3.0)


@picture
def lightnet() -> Figure:
    x, k = image(), image(seed=1)
    weights = matrix(
        lambda v: bk.lightnet_attention(x, k, v, is_causal=False, activation="silu"), SIDE**2
    )[0]
    return draw_attention(weights, shape=GRID, queries=QUERIES, title="LightNet")


@picture
def lightnet_causal() -> Figure:
    k = text(48, channels=4, size=6.0)
    shares = [
        matrix(
            lambda v, d=d: bk.lightnet_attention(
                F.one_hot(torch.tensor(d), 4).double().expand_as(k), k, v
            ),
            48,
        )[0]
        for d in range(3)
    ]
    parts = [(w, f"channel {d}", "key", "query") for d, w in enumerate(shares)]
    return panels(*parts, top=0.3)


@picture
def linear_position() -> Figure:
    theta = 2.0 ** -torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    ones = torch.full((1, 1, 48, 8), 8**-0.5, dtype=torch.float64)
    line = bk.lrpe(ones, theta)[0, 0]
    patches = torch.full((1, 1, SIDE**2, 8), 8**-0.5, dtype=torch.float64)
    grid = bk.md_lrpe(patches, theta[:, :4], GRID)[0, 0]
    return panels(
        (line @ line.mT, "LRPE on a line", "key", "query"),
        (on_grid(grid @ grid[0]), "MD-LRPE, first patch", "column", "row"),
        (on_grid(grid @ grid[MIDDLE]), "MD-LRPE, middle patch", "column", "row"),
        label="product of codes",
    )


@picture
def toeplitz() -> Figure:
    one = torch.ones(1, 1, dtype=torch.float64)
    rates = torch.tensor([0.5, 0.9])
    parts: list[Panel] = []
    for rate in rates:
        code = bk.tpe(
            torch.eye(32, dtype=torch.float64)[None, None], *[one.expand(1, 32) / 32**0.5] * 2,
            rate.logit().double()[None],
        )  # fmt: skip
        assert isinstance(code, Tensor)
        parts.append((code[0, 0], f"TPE, decay {rate:.1f}", "key", "query"))
    dot = torch.zeros(1, *GRID, 1, 1, dtype=torch.float64)
    dot[0, 4, 3] = 1.0
    log_decay = rates[1].logit().double()[None]
    spread = bk.md_tpe(dot, [one] * 2, [one] * 2, [log_decay] * 2, (1, 2))
    parts.append((spread[0, :, :, 0, 0] / 2, "MD-TPE of one patch", "column", "row"))
    return panels(*parts)


@picture
def gaussian() -> Figure:
    values = noise(1, 48)
    offsets = torch.tensor([[-0.5, 0.0], [0.8, 1.2]], dtype=torch.float64)
    widths = torch.tensor([[0.7, 1.0], [0.8, 0.8]], dtype=torch.float64)
    figure = Figure(figsize=(7.6, 2.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for head in range(2):
        out = bk.gaussian_adaptive_attention(values, offsets[head], widths[head])
        weights = (out / values)[0]
        order = values[0].argsort()
        axes[0].plot(
            values[0, order], weights[order], ".-", ms=4, lw=0.8, label=f"Gaussians {head}"
        )
        axes[1].plot(weights, ".-", ms=4, lw=0.5, label=f"Gaussians {head}")
    axes[0].set(xlabel="value", ylabel="weight")
    axes[0].set_title("weight against value", fontsize="medium")
    axes[0].legend(fontsize="small", frameon=False)
    axes[1].set(xlabel="entry along the axis", ylabel="weight")
    axes[1].set_title("weight along the axis", fontsize="medium")
    return figure


def blob(channels: int = 8) -> Tensor:
    """Feature map (1, C, 12, 12) with an object at row 3, column 8."""
    rows, columns = torch.meshgrid(*[torch.arange(SIDE).double()] * 2, indexing="ij")
    near = (-((rows - 3) ** 2 + (columns - 8) ** 2) / 6).exp()
    return 0.3 * noise(1, channels, *GRID, seed=2) + 2.5 * near


def refill(module: nn.Module, seed: int, size: float) -> nn.Module:
    """Give a module parameters that do not depend on the global generator."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(module.double().named_parameters())):
            if "norm" not in name:
                parameter.copy_(size * noise(*parameter.shape, seed=seed + i))
    return module.eval()


@picture
def efficient_local() -> Figure:
    x = blob()
    module = bk.EfficientLocalAttention(8, 5, norm_groups=2)
    refill(module, 20, 0.0)
    with torch.no_grad():
        module.conv_rows.weight.fill_(0.2)
        gate = module(x) / x
    return panels(
        (x[0, 0], "channel 0", "column", "row"),
        (gate[0, 0], "its gate, rows x columns", "column", "row"),
        (module(x)[0, 0], "gated", "column", "row"),
        label="value",
        scales=(0, 1, 2),
        width=1.9,
    )


@picture
def ulsam() -> Figure:
    x = blob()
    module = refill(bk.ULSAM(8, 2), 30, 0.0)
    with torch.no_grad():
        module.depthwise_weight.fill_(1.0)
        module.pointwise_weight.copy_(torch.tensor([0.2, -0.4]).repeat_interleave(4))
        module.pointwise_bias[1] = 2.0
        _, attention = module.attend(x)
    return panels(
        (x[0, 0], "channel 0", "column", "row"),
        (attention[0, 0], "map of group 0", "column", "row"),
        (attention[0, 1], "map of group 1", "column", "row"),
        scales=(0, 1),
    )


@picture
def ninformer() -> Figure:
    tokens, channels = SIDE**2, 8
    unit = refill(bk.MixerGatingUnit(channels, 24, tokens), 40, 0.3)
    x = image(1, channels)[0]
    jacobian = torch.autograd.functional.jacobian(lambda y: unit(y).sum(0), x)
    reach = jacobian[:, :, 0].square().sum((1, 3)).sqrt()
    reach = reach / reach.sum(-1, keepdim=True)
    return draw_attention(
        reach, shape=GRID, queries=QUERIES, title="size of the Jacobian", top=0.03
    )


@picture
def dynamics() -> Figure:
    x = text(48)
    n = 0.02 * torch.arange(48).double()[None, None]
    made = {
        "softmax": matrix(lambda v: bk.dsf_attention(x, x, v, kind="softmax"), 48)[0],
        "linear": matrix(lambda v: bk.dsf_attention(x, x, v, kind="linear"), 48)[0],
        "norm": matrix(
            lambda v: bk.dsf_attention(x / 2, x / 2, v, kind="norm", log_normaliser=n + 3), 48
        )[0],
    }
    parts = [(w, name, "key", "query" if name == "softmax" else "") for name, w in made.items()]
    return panels(*parts, top=0.2)


def summary(figure: Figure) -> list[list[float]]:
    """Return the sum, the sum of squares and a weighted sum of every array that is drawn."""
    drawn = []
    for axis in figure.get_axes():
        arrays = [image.get_array() for image in axis.get_images()]
        arrays += [line.get_ydata() for line in axis.get_lines()]
        for array in arrays:
            flat = np.asarray(array, dtype=float).ravel()
            ramp = np.linspace(1.0, 2.0, flat.size)
            drawn.append([float(flat.sum()), float(flat @ flat), float(flat @ ramp)])
    return drawn


def png(figure: Figure) -> bytes:
    """Encode the figure as a small PNG that also tells the `summary` of what it shows."""
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, dpi=110, format="png")
    colours = Image.open(raw).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    told = PngInfo()
    told.add_text("arrays", json.dumps([[float(f"{x:.9g}") for x in y] for y in summary(figure)]))
    colours.save(small, "PNG", optimize=True, pnginfo=told)
    return small.getvalue()


def main(names: Sequence[str]) -> None:
    """Write the pictures of these names, by default all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names or PICTURES:
        (FOLDER / f"{name}.png").write_bytes(png(PICTURES[name]()))


if __name__ == "__main__":
    main(sys.argv[1:])
