"""Sampling from a diffusion model whose score climbs what an encoder predicts (BrainDiVE).

Nothing of the pipeline is rewritten: for as long as `guided` lasts, its UNet answers with the
guided prediction, and loop, scheduler, text encoder and decoder are those of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainalign.errors import BrainalignError, ConfigError, MissingDependencyError, near
from brainalign.synthesis.jitter import Jitter, jittered

__all__ = [
    "DIFFUSERS",
    "PREDICTIONS",
    "SCHEDULERS",
    "Guidance",
    "Step",
    "alphabar",
    "check_diffusers",
    "check_pipeline",
    "guided",
    "schedule_weight",
    "self_attention_degraded",
]

#: The releases of diffusers that the tests pass with: from the first, below the second.
DIFFUSERS = ("0.42", "0.43")
#: Schedulers whose noise level at a step is known here.
SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
)
#: What the UNet may predict.
PREDICTIONS = ("epsilon", "v_prediction")

_BY_TIMESTEP = ("DDIMScheduler", "PNDMScheduler")
_BLUR_RADIUS = 4
_HALVINGS = 6


@dataclass(frozen=True)
class Guidance:
    """How a sampler is guided.

    Parameters
    ----------
    scale : float
        s, in units of the latents over those of the encoder's prediction. 130 in the authors'
        released code; about 100 for OpenCLIP ViT-B.
    sag_scale : float
        Strength of self-attention guidance; 0 leaves it out.
    schedule : str
        Weight of `scale` along the run, see `schedule_weight`.
    through_unet : bool
        Whether the gradient passes the UNet; otherwise its prediction counts as a constant.
    jitter : Jitter, optional
        Have the objective see altered copies of each image, instead of the image itself.
    gradient_checkpointing : bool
        Whether UNet and VAE compute activations again in the backward pass instead of keeping them.
    vae_slicing : bool
        Whether the VAE decodes one image at a time.
    vae_tiling : bool
        Whether the VAE decodes in overlapping tiles, for images larger than it was trained on.

    Raises
    ------
    ConfigError
        If a scale is negative or not finite, or the schedule is unknown.
    """

    scale: float = 130.0
    sag_scale: float = 0.75
    schedule: str = "constant"
    through_unet: bool = True
    jitter: Jitter | None = None
    gradient_checkpointing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        for name in ("scale", "sag_scale"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name} is a number from 0 up; it is {value!r}.")
        schedule_weight(self.schedule, 0.0)


@dataclass(frozen=True)
class Step:
    """What guidance did at one call of the UNet.

    Parameters
    ----------
    timestep : float
        As the UNet was given it.
    alphabar : float
        Share of signal in the latents.
    value : tensor, shape (image,)
        What the objective predicts for the image of that step.
    gradient_norm : tensor, shape (image,)
        Norm of s times the gradient, over a latent.
    """

    timestep: float
    alphabar: float
    value: Tensor
    gradient_norm: Tensor


def check_diffusers() -> None:
    """Raise unless the installed diffusers is within `DIFFUSERS`.

    Raises
    ------
    MissingDependencyError
        If there is none.
    ConfigError
        If it is another release.
    """
    low, high = DIFFUSERS
    wanted = f"diffusers>={low},<{high}"
    try:
        found = version("diffusers")
    except PackageNotFoundError as error:
        raise MissingDependencyError(
            f"Synthesis needs {wanted}.", 'Install it: pip install "brainalign[generation]".'
        ) from error

    def release(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(".")[:2])

    if not release(low) <= release(found) < release(high):
        raise ConfigError(
            f"Synthesis is tested with {wanted}; this is diffusers {found}.",
            f'Install one of these: pip install "{wanted}".',
        )


def check_pipeline(pipe: Any) -> None:
    """Raise unless a pipeline is one that can be guided.

    Parameters
    ----------
    pipe : diffusers.StableDiffusionPipeline
        Of Stable Diffusion 1.x or 2.x.

    Raises
    ------
    ConfigError
        For another pipeline, scheduler or kind of prediction, for options of the scheduler that
        leave the variance-preserving form, and for a pipeline whose parts are moved to and from
        the device while it runs.
    """
    check_diffusers()
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    known = isinstance(pipe, StableDiffusionPipeline)
    if not known:
        raise ConfigError(
            f"Guidance extends diffusers.StableDiffusionPipeline (1.x, 2.x); got "
            f"{type(pipe).__name__}."
        )
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        if not isinstance(getattr(pipe, part), kind):
            raise ConfigError(
                f"The pipeline's {part} is {type(getattr(pipe, part)).__name__}; expected "
                f"{kind.__name__}."
            )
    latent = pipe.vae.config.latent_channels
    if pipe.unet.config.in_channels != latent or pipe.unet.config.out_channels != latent:
        raise ConfigError(
            f"The UNet takes {pipe.unet.config.in_channels} channels and gives "
            f"{pipe.unet.config.out_channels}; the VAE has {latent}.",
            "Pipelines of inpainting or with a learned variance cannot be guided.",
        )
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise ConfigError("The UNet takes the guidance scale as an input (it is distilled).")
    if getattr(pipe, "_all_hooks", None):
        raise ConfigError(
            "The pipeline moves its parts to and from the device (CPU offload), which a gradient "
            "through all of them cannot follow.",
            "Move it as a whole: pipe.to(device), with gradient_checkpointing and vae_slicing.",
        )
    _check_scheduler(pipe.scheduler)


def _check_scheduler(scheduler: Any) -> None:
    name, config = type(scheduler).__name__, scheduler.config
    if name not in SCHEDULERS:
        raise ConfigError(
            f"The scheduler {name} cannot be guided.{near(name, SCHEDULERS)}",
            f"Supported: {', '.join(SCHEDULERS)}. Another one is set by pipe.scheduler = "
            "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config).",
        )
    if config.prediction_type not in PREDICTIONS:
        raise ConfigError(
            f"The scheduler's prediction_type is {config.prediction_type!r}; guidance knows "
            f"{' and '.join(PREDICTIONS)}."
        )
    wrong = {
        "algorithm_type": lambda v: v != "dpmsolver++",
        "use_flow_sigmas": bool,
        "rescale_betas_zero_snr": bool,
        "timestep_type": lambda v: v != "discrete",
        "trained_betas": lambda v: False,
    }
    for option, refused in wrong.items():
        value = config.get(option)
        if value is not None and refused(value):
            raise ConfigError(
                f"The scheduler {name} has {option}={value!r}, for which guidance is not defined.",
                "Use algorithm_type='dpmsolver++', timestep_type='discrete' and neither flow "
                "sigmas nor zero terminal SNR.",
            )


def alphabar(scheduler: Any, timestep: Tensor | float) -> float:
    r"""Return the share of signal at a timestep, of a scheduler whose timesteps are set.

    .. math:: z_t = \sqrt{\bar\alpha_t} \, z_0 + \sqrt{1 - \bar\alpha_t} \, \epsilon, \qquad
              \bar\alpha_t = 1 / (1 + \sigma_t^2)

    the second for schedulers that count in :math:`\sigma`. What Euler hands the UNet is scaled to
    this form by its ``scale_model_input``.
    """
    if type(scheduler).__name__ in _BY_TIMESTEP:
        return float(scheduler.alphas_cumprod[int(timestep)])
    index = scheduler.step_index
    if index is None:
        index = scheduler.index_for_timestep(timestep)
    return 1 / (1 + float(scheduler.sigmas[index]) ** 2)


def schedule_weight(schedule: str, progress: float) -> float:
    r"""Return the weight of the guidance scale at a point of the run.

    Parameters
    ----------
    schedule : str
        ``"constant"`` (1), ``"linear"`` (u), ``"cosine"`` (:math:`(1 - \cos \pi u) / 2`), or
        ``"window:A,B"``: 1 from u = A to u = B, else 0.
    progress : float
        u, from 0 at the first step (noise) to 1 at the last (image).

    Raises
    ------
    ConfigError
        If there is no such schedule.
    """
    kind, _, bounds = schedule.partition(":")
    if kind == "window":
        try:
            low, high = (float(b) for b in bounds.split(","))
        except ValueError:
            low, high = 1.0, 0.0
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"The schedule {schedule!r} is not window:A,B with 0 <= A <= B <= 1.")
        return float(low <= progress <= high)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return progress
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * progress))
    known = ("constant", "linear", "cosine", "window:A,B")
    raise ConfigError(
        f"There is no guidance schedule {schedule!r}.{near(schedule, known)}",
        f"Known: {', '.join(known)}.",
    )


def self_attention_degraded(x0: Tensor, attention: Tensor, *, sigma: float = 1.0) -> Tensor:
    r"""Blur what the model attends to.

    .. math:: \tilde x_0 = M \odot (G_\sigma * x_0) + (1 - M) \odot x_0, \qquad
              M = \left[ \sum_q \tfrac1H \sum_h A_{hq \cdot} > 1 \right]

    Parameters
    ----------
    x0 : tensor, shape (image, channel, row, column)
        Predicted clean latents.
    attention : tensor, shape (image, map row, map column)
        Attention that each position receives, summed over queries and averaged over heads: 1 on
        average.
    sigma : float
        Standard deviation of the blur, in pixels of the latents; its kernel reaches 4 of them.

    Returns
    -------
    tensor, shape (image, channel, row, column)

    References
    ----------
    Hong et al. (2023), Improving sample quality of diffusion models using self-attention guidance,
    ICCV, equations 15-17.
    """
    rows, columns = x0.shape[-2:]
    mask = (attention > 1).to(x0.dtype)[:, None]
    mask = functional.interpolate(mask, (rows, columns), mode="nearest")
    radius = min(_BLUR_RADIUS, rows - 1, columns - 1)
    at = torch.arange(-radius, radius + 1, dtype=x0.dtype, device=x0.device)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(x0.shape[1], 1, 1, 1)
    groups = x0.shape[1]
    padded = functional.pad(x0, (radius,) * 4, mode="reflect")
    blurred = functional.conv2d(padded, kernel, groups=groups)
    blurred = functional.conv2d(blurred, kernel.mT, groups=groups)
    return mask * blurred + (1 - mask) * x0


class _Attention:
    """Attention received by each position of the UNet's middle block, without changing the UNet."""

    def __init__(self, unet: Any) -> None:
        middle = getattr(unet, "mid_block", None)
        if middle is None or not len(getattr(middle, "attentions", ())):
            raise ConfigError(
                "Self-attention guidance reads the attention of the UNet's middle block, and this "
                "UNet has none there.",
                "Set sag_scale=0.",
            )
        layer = middle.attentions[0].transformer_blocks[0].attn1
        self.layer, self.listening, self.found, self.size = layer, False, None, (0, 0)
        self.handles = [
            middle.register_forward_pre_hook(self._see_size, with_kwargs=True),
            layer.register_forward_pre_hook(self._see_tokens, with_kwargs=True),
        ]

    def _see_size(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.size = tuple((args[0] if args else kwargs["hidden_states"]).shape[-2:])

    def _see_tokens(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        # Checkpointing calls the block once more in the backward pass.
        if not self.listening:
            return
        with torch.no_grad():
            tokens = (args[0] if args else kwargs["hidden_states"]).detach()
            q, k = (
                to(tokens).unflatten(-1, (self.layer.heads, -1)).movedim(2, 1)
                for to in (self.layer.to_q, self.layer.to_k)
            )
            wide = torch.promote_types(q.dtype, torch.float32)
            weights = (q.to(wide) @ k.to(wide).mT * self.layer.scale).softmax(-1)
            self.found = weights.mean(1).sum(1).unflatten(-1, self.size)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def guided(
    pipe: Any, objective: Callable[[Tensor], Tensor], guidance: Guidance | None = None
) -> Iterator[list[Step]]:
    r"""Let a pipeline sample images that an objective is high for.

    With :math:`\beta = 1 - \bar\alpha_t` and :math:`\epsilon` what the UNet predicts,

    .. math::

        x_0 &= (z_t - \sqrt\beta \, \epsilon) / \sqrt{\bar\alpha_t} \\
        \bar z &= \sqrt\beta \, x_0 + (1 - \sqrt\beta) \, z_t \\
        I &= \mathrm{clamp}(D(\bar z / f) / 2 + 1/2, \, 0, \, 1) \\
        g &= s \, w_t \, \partial J(I) / \partial z_t \\
        \epsilon' &= \epsilon + s_{SAG} \, (\epsilon - \tilde\epsilon) - \sqrt\beta \, g

    where D decodes, f is the VAE's scaling factor, :math:`w_t` the schedule's weight and
    :math:`\tilde\epsilon` the UNet's prediction for :math:`\sqrt{\bar\alpha_t} \tilde x_0 +
    \sqrt\beta \epsilon`, see `self_attention_degraded`. A UNet that predicts v has
    :math:`\epsilon = \sqrt{\bar\alpha_t} v + \sqrt\beta z_t`, and its answer is converted back.
    With classifier-free guidance :math:`\epsilon` is the combined prediction, and self-attention
    guidance follows the unconditional one. Images of a batch do not act on one another.

    Parameters
    ----------
    pipe : diffusers.StableDiffusionPipeline
        See `check_pipeline`. While the context lasts, ``pipe(...)`` is guided; afterwards it is as
        before.
    objective : callable
        J: takes images (image, 3, row, column) in [0, 1], in the pipeline's precision or float32
        if that is half, and returns one number an image. With ``guidance.jitter`` it is averaged
        over altered copies, see `brainalign.synthesis.jittered`.
    guidance : Guidance, optional
        Scales and options.

    Yields
    ------
    list of Step
        Filled as the run goes, one entry a call of the UNet that was guided by the objective.

    Raises
    ------
    ConfigError
        As `check_pipeline`.
    BrainalignError
        While sampling, if the image or the gradient is not finite in the pipeline's precision.

    Notes
    -----
    At scale 0 (and where the schedule's weight is 0) with sag_scale 0 the UNet's own answer is
    returned, so images are those of the plain pipeline, bit by bit.

    In half precision the gradient at the image, which the objective computes in float32, is scaled
    by a power of two of each image's own before it goes back through VAE and UNet, and by smaller
    ones if that overflows; nothing is carried over from step to step.

    References
    ----------
    Luo et al. (2023), Brain Diffusion for Visual Exploration (BrainDiVE), NeurIPS.
    """
    guidance = guidance or Guidance()
    check_pipeline(pipe)
    unet, vae = pipe.unet, pipe.vae
    attention = _Attention(unet) if guidance.sag_scale else None
    frozen = [p for part in (unet, vae) for p in part.parameters() if p.requires_grad]
    own = vars(unet).get("forward")
    denoiser = _Denoiser(pipe, unet.forward, objective, guidance, attention)
    kept = (unet.is_gradient_checkpointing, vae.is_gradient_checkpointing)
    tiles = (vae.use_slicing, vae.use_tiling)
    try:
        for p in frozen:
            p.requires_grad_(False)
        if guidance.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            vae.enable_gradient_checkpointing()
        vae.use_slicing = tiles[0] or guidance.vae_slicing
        vae.use_tiling = tiles[1] or guidance.vae_tiling
        unet.forward = denoiser
        yield denoiser.steps
    finally:
        if own is None:
            del unet.forward
        else:
            unet.forward = own
        vae.use_slicing, vae.use_tiling = tiles
        for part, was in zip((unet, vae), kept, strict=True):
            if guidance.gradient_checkpointing and not was:
                part.disable_gradient_checkpointing()
        for p in frozen:
            p.requires_grad_(True)
        if attention is not None:
            attention.remove()


class _Denoiser:
    """What stands in for the UNet's forward pass."""

    def __init__(
        self,
        pipe: Any,
        plain: Callable[..., Any],
        objective: Callable[[Tensor], Tensor],
        guidance: Guidance,
        attention: _Attention | None,
    ) -> None:
        self.pipe, self.plain = pipe, plain
        self.objective = jittered(objective, guidance.jitter) if guidance.jitter else objective
        self.guidance, self.attention = guidance, attention
        self.steps: list[Step] = []

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        scale = self.guidance.scale * schedule_weight(self.guidance.schedule, self._u(timestep))
        if not scale and self.attention is None:
            return self.plain(
                sample, timestep, encoder_hidden_states, *args, return_dict=return_dict, **kwargs
            )
        if self.pipe.guidance_rescale:
            raise ConfigError("guidance_rescale and guidance by an encoder do not go together.")
        pair = self.pipe.do_classifier_free_guidance
        n = len(sample) // 2 if pair else len(sample)
        dtype = sample.dtype
        work = torch.promote_types(dtype, torch.float32)
        share = alphabar(self.pipe.scheduler, timestep)
        a, b = math.sqrt(share), math.sqrt(1 - share)
        v_prediction = self.pipe.scheduler.config.prediction_type == "v_prediction"

        def unet(z: Tensor, text: Tensor) -> Tensor:
            z = z.to(dtype)
            return self.plain(z, timestep, text, *args, return_dict=False, **kwargs)[0].to(work)

        def both(z: Tensor) -> tuple[Tensor, Tensor]:
            """Return the combined prediction, and the one without text."""
            if not pair:
                out = unet(z, encoder_hidden_states)
                return out, out
            without, with_text = unet(torch.cat([z, z]), encoder_hidden_states).chunk(2)
            return without + self.pipe.guidance_scale * (with_text - without), without

        def noise_of(out: Tensor, z: Tensor) -> Tensor:
            return a * out + b * z if v_prediction else out

        def clean_of(out: Tensor, z: Tensor) -> Tensor:
            return a * z - b * out if v_prediction else (z - b * out) / a

        z = sample[:n].detach().to(work).requires_grad_(bool(scale))
        if self.attention is not None:
            self.attention.listening = True
        with torch.set_grad_enabled(bool(scale) and self.guidance.through_unet):
            out, without = both(z)
        if self.attention is not None:
            self.attention.listening = False
        change = torch.zeros_like(z, requires_grad=False)
        if scale:
            with torch.enable_grad():
                mixed = b * clean_of(out, z) + (1 - b) * z
                decoded = self.pipe.vae.decode(
                    (mixed / self.pipe.vae.config.scaling_factor).to(self.pipe.vae.dtype),
                    return_dict=False,
                )[0]
                image = (decoded.to(work) / 2 + 0.5).clamp(0, 1)
            value, gradient = _gradient(
                self.objective, image, z, half=min(dtype.itemsize, self.pipe.vae.dtype.itemsize) < 4
            )
            gradient = scale * gradient
            norm = gradient.flatten(1).norm(dim=1)
            self.steps.append(Step(float(timestep), share, value.cpu(), norm.cpu()))
            change = change - b * gradient
        out, without, z = out.detach(), without.detach(), z.detach()
        if self.attention is not None:
            found = self.attention.found
            assert found is not None
            x0 = self_attention_degraded(clean_of(without, z), found[:n])
            degraded = a * x0 + b * noise_of(without, z)
            again = unet(degraded, encoder_hidden_states[:n])
            weight = self.guidance.sag_scale
            change = change + weight * (noise_of(without, z) - noise_of(again, degraded))
        # At a given z, eps = a v + b z.
        answer = (out + (change / a if v_prediction else change)).to(dtype)
        if pair:
            # u + s (c - u) of two that are the same is the same.
            answer = torch.cat([answer, answer])
        return (answer,) if not return_dict else _output(answer)

    def _u(self, timestep: Tensor) -> float:
        times = self.pipe.scheduler.timesteps
        at = (times == timestep).nonzero()
        return float(at[0, 0]) / max(len(times) - 1, 1) if len(at) else 0.0


def _output(sample: Tensor) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    return UNet2DConditionOutput(sample=sample)


def _gradient(
    objective: Callable[[Tensor], Tensor], image: Tensor, z: Tensor, *, half: bool
) -> tuple[Tensor, Tensor]:
    """Return J and its gradient with respect to z, through the graph from z to the image."""
    with torch.enable_grad():
        seen = image.detach().requires_grad_()
        if not bool(seen.isfinite().all()):
            raise BrainalignError(
                f"The decoded image is not finite in {z.dtype}.",
                "Load the pipeline in bfloat16 or float32.",
            )
        value = objective(seen)
        if value.shape != (len(seen),):
            raise ConfigError(
                f"The objective returned shape {tuple(value.shape)} for {len(seen)} images; "
                "expected one number an image."
            )
        (slope,) = torch.autograd.grad(value.sum(), seen)
    exponent = torch.zeros(len(z), device=z.device)
    if half:
        largest = slope.flatten(1).abs().amax(1).float()
        known = (largest > 0) & largest.isfinite()
        exponent = torch.where(known, -largest.clamp_min(1e-38).log2().floor(), 0.0)
    for attempt in range(_HALVINGS if half else 1):
        unit = torch.exp2(exponent).to(slope.dtype)[:, None, None, None]
        (gradient,) = torch.autograd.grad(
            image, z, slope * unit, retain_graph=half and attempt < _HALVINGS - 1
        )
        gradient = gradient / unit
        good = gradient.flatten(1).isfinite().all(1)
        if bool(good.all()):
            return value.detach(), gradient
        exponent = torch.where(good, exponent, exponent - 4)
    raise BrainalignError(
        f"The gradient of {int((~good).sum())} of {len(z)} images is not finite.",
        "Load the pipeline in float32, or check the encoder.",
    )
