"""The guided score: its gradient, its limits, what it leaves alone and what it refuses."""

import copy
import math
import re
from pathlib import Path

import diffusers
import pytest
import tiny_pipeline as tiny
import torch

from brainalign.errors import BrainalignError, ConfigError
from brainalign.synthesis import Guidance, ImageEncoder, Target, guided
from brainalign.synthesis import guidance as module
from brainalign.synthesis.guidance import alphabar, schedule_weight, self_attention_degraded

SCHEDULERS = {
    "dpm": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm-karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "pndm-prk": (diffusers.PNDMScheduler, {"skip_prk_steps": False}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}


def with_scheduler(pipe, name, prediction_type):
    kind, options = SCHEDULERS[name]
    pipe.scheduler = kind(**tiny.SPACED, prediction_type=prediction_type, **options)
    return pipe


@pytest.fixture(scope="module")
def objective(encoder):
    weights = Target("A").weights([encoder])
    # A module of its own: float64 would otherwise reach the model that other tests share.
    return copy.deepcopy(ImageEncoder(encoder, weights, device="cpu")).double()


def record(pipe):
    """Keep what the scheduler is asked to step with: (answer, timestep, latents)."""
    seen, step = [], pipe.scheduler.step

    def keep(answer, t, latents, *args, **kwargs):
        seen.append((answer.clone(), t, latents.clone()))
        return step(answer, t, latents, *args, **kwargs)

    pipe.scheduler.step = keep
    return seen


def run(pipe, *, steps=3, n=2, seed=3, **options):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    return pipe(
        [options.pop("prompt", "")] * n, num_inference_steps=steps, output_type="pt",
        guidance_scale=options.pop("guidance_scale", 1.0), generator=generators, **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_score_is_that_of_finite_differences(name, prediction_type, objective):
    """eps' = eps - sqrt(beta) s dJ/dz, with J written out anew from the latents of each step."""
    pipe = with_scheduler(tiny.pipeline(prediction_type).to(torch.float64), name, prediction_type)
    seen = record(pipe)
    scale = 7.0
    with guided(pipe, objective.objective, Guidance(scale=scale, sag_scale=0)) as steps:
        run(pipe, steps=4, n=1)
    text, _ = pipe.encode_prompt([""], "cpu", 1, False)
    train = pipe.scheduler.alphas_cumprod.double()

    def pieces(x, t, share):
        z = x
        if name == "euler":
            # Its latents are z / sqrt(alphabar), which it scales in float32: to the bit what the
            # UNet saw, or the difference of two predictions below is not the gradient alone.
            sigma = torch.tensor(math.sqrt(1 / share - 1), dtype=torch.float32)
            z = x / (sigma**2 + 1) ** 0.5
        out = pipe.unet(z, t, text, return_dict=False)[0]
        eps = out
        if prediction_type == "v_prediction":
            eps = math.sqrt(share) * out + math.sqrt(1 - share) * z
        return z, out, eps

    def height(x, t, share):
        z, _, eps = pieces(x, t, share)
        b = math.sqrt(1 - share)
        x0 = (z - b * eps) / math.sqrt(share)
        zz = b * x0 + (1 - b) * z
        image = pipe.vae.decode(zz / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return objective.objective((image / 2 + 0.5).clamp(0, 1)).sum().item()

    rng = torch.Generator().manual_seed(0)
    assert len(steps) == len(seen) >= 4
    for (answer, t, x), step in list(zip(seen, steps, strict=True))[1::2]:
        share = step.alphabar
        if name not in ("euler", "dpm-karras"):
            assert share == pytest.approx(train[int(t)].item(), rel=1e-5)
        with torch.no_grad():
            z, out, eps = pieces(x, t, share)
            moved = answer
            if prediction_type == "v_prediction":
                moved = math.sqrt(share) * answer + math.sqrt(1 - share) * z
            slope = (eps - moved) / math.sqrt(1 - share)  # s dJ/dz
            assert not torch.equal(answer, out)
            for _ in range(2):
                # A step h along z is one of h / sqrt(alphabar) along Euler's latents.
                along = torch.randn(x.shape, generator=rng, dtype=x.dtype)
                h = 1e-8  # Activations of ReLU change sign within longer steps.
                by = h / math.sqrt(share) if name == "euler" else h
                numeric = scale * (
                    height(x + by * along, t, share) - height(x - by * along, t, share)
                ) / (2 * h)  # fmt: skip
                size = slope.norm().item() * along.norm().item()
                assert (slope * along).sum().item() == pytest.approx(numeric, abs=1e-6 * size)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n not in ("dpm-karras", "pndm-prk")])
@pytest.mark.parametrize("text_scale", [1.0, 3.0])
def test_scale_0_gives_the_images_of_the_plain_pipeline(name, text_scale, objective):
    pipe = with_scheduler(tiny.pipeline(), name, "epsilon")
    plain = run(pipe, prompt="a face", guidance_scale=text_scale)
    forward = pipe.unet.forward
    with guided(pipe, objective.objective, Guidance(scale=0, sag_scale=0)) as steps:
        same = run(pipe, prompt="a face", guidance_scale=text_scale)
    assert torch.equal(plain, same) and not steps
    assert pipe.unet.forward == forward
    with guided(pipe, objective.objective, Guidance(scale=0, sag_scale=0.75)):
        assert not torch.equal(plain, run(pipe, prompt="a face", guidance_scale=text_scale))
    with guided(pipe, objective.objective, Guidance(scale=5, sag_scale=0)):
        assert not torch.equal(plain, run(pipe, prompt="a face", guidance_scale=text_scale))


def test_the_predicted_response_rises_with_the_scale(objective):
    pipe = with_scheduler(tiny.pipeline(), "dpm", "epsilon")
    means = []
    for scale in (0, 2, 8, 30):
        with guided(pipe, objective.objective, Guidance(scale=scale, sag_scale=0)):
            images = run(pipe, steps=4, n=3)
        means.append(objective.objective(images).mean().item())
    assert means == sorted(means) and means[-1] > means[0] + 0.05, means


def test_images_of_a_batch_do_not_act_on_one_another(objective):
    pipe = with_scheduler(tiny.pipeline(), "unipc", "epsilon")
    with guided(pipe, objective.objective, Guidance(scale=50, sag_scale=0.75)):
        one = run(pipe, n=2, seed=3)[1]
        other = run(pipe, n=2, seed=4)[0]
    assert torch.equal(one, other)


def test_checkpointing_slicing_and_classifier_free_guidance_keep_the_gradient(objective):
    pipe = with_scheduler(tiny.pipeline().to(torch.float64), "ddim", "epsilon")
    images = {}
    for checkpointing in (False, True):
        guidance = Guidance(
            scale=20, gradient_checkpointing=checkpointing, vae_slicing=checkpointing
        )
        with guided(pipe, objective.objective, guidance):
            images[checkpointing] = run(pipe, prompt="a face", guidance_scale=2.0)
    assert torch.allclose(images[True], images[False], rtol=0, atol=1e-10)
    assert not pipe.unet.is_gradient_checkpointing and not pipe.vae.use_slicing


def test_classifier_free_guidance_is_part_of_the_score(objective):
    """The gradient of the image of the combined prediction, by finite differences."""
    pipe = with_scheduler(tiny.pipeline().to(torch.float64), "ddim", "epsilon")
    seen = record(pipe)
    with guided(pipe, objective.objective, Guidance(scale=3.0, sag_scale=0)) as steps:
        run(pipe, n=1, prompt="a face", guidance_scale=2.5)
    text, without = pipe.encode_prompt(["a face"], "cpu", 1, True)
    answer, t, z = seen[2]
    share = steps[2].alphabar
    b = math.sqrt(1 - share)

    def eps(z):
        u, c = (pipe.unet(z, t, e, return_dict=False)[0] for e in (without, text))
        return u + 2.5 * (c - u)

    def height(z):
        zz = b * (z - b * eps(z)) / math.sqrt(share) + (1 - b) * z
        image = pipe.vae.decode(zz / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return 3.0 * objective.objective((image / 2 + 0.5).clamp(0, 1)).sum().item()

    along = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    with torch.no_grad():
        slope = (eps(z) - answer) / b
        numeric = (height(z + 1e-8 * along) - height(z - 1e-8 * along)) / 2e-8
    size = (slope.norm() * along.norm()).item()
    assert (slope * along).sum().item() == pytest.approx(numeric, abs=1e-6 * size)


def test_cutting_the_unet_out_of_the_gradient_changes_it(objective):
    pipe = with_scheduler(tiny.pipeline().to(torch.float64), "ddim", "epsilon")
    seen = record(pipe)
    for through in (True, False):
        with guided(pipe, objective.objective, Guidance(5, 0, through_unet=through)):
            run(pipe, n=1, steps=2)
    text, _ = pipe.encode_prompt([""], "cpu", 1, False)
    (whole, t, z), (cut, _, same) = seen[0], seen[2]
    assert torch.equal(z, same)
    with torch.no_grad():
        eps = pipe.unet(z, t, text, return_dict=False)[0]
    whole, cut = (eps - whole).flatten(), (eps - cut).flatten()
    # The UNet's own Jacobian is what is missing; both climb.
    cosine = torch.nn.functional.cosine_similarity(whole, cut, dim=0).item()
    assert 0.2 < cosine < 0.999, cosine


def test_half_precision_gives_the_gradient_of_full_precision(objective):
    """Slopes far below the smallest half-precision number survive."""
    full = copy.deepcopy(objective).float()
    tiny_slopes = lambda images: 1e-7 * full.objective(images)  # noqa: E731
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipe = with_scheduler(tiny.pipeline().to(dtype), "ddim", "epsilon")
        seen = record(pipe)
        with guided(pipe, tiny_slopes, Guidance(scale=1e9, sag_scale=0)) as steps:
            run(pipe, n=2, steps=1)
        assert seen[0][0].dtype == dtype
        found[dtype] = steps[0].gradient_norm
    assert torch.allclose(found[torch.float16], found[torch.float32], rtol=0.02)
    assert torch.allclose(found[torch.bfloat16], found[torch.float32], rtol=0.15)


def test_a_gradient_that_overflows_is_scaled_down():
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g * 60000

    z = torch.ones(2, 1, 1, 1, requires_grad=True)
    image = Steep.apply(z.half()).float() / 4
    slope = torch.tensor([3.0, 0.0])
    _, gradient = module._gradient(lambda x: slope * x.flatten(), image, z, half=True)
    assert gradient.flatten().tolist() == pytest.approx([45000, 0], rel=1e-3)
    image = Steep.apply(z.half()).float() * math.nan
    with pytest.raises(BrainalignError, match="not finite"):
        module._gradient(lambda x: x.flatten(), image, z, half=True)


def test_self_attention_guidance_blurs_where_attention_is_high():
    x0 = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    attention = torch.ones(2, 4, 4)
    attention[0, :2] = 1.5
    out = self_attention_degraded(x0, attention)
    assert torch.equal(out[1], x0[1]) and torch.equal(out[0, :, 4:], x0[0, :, 4:])
    from scipy.ndimage import gaussian_filter

    expected = gaussian_filter(x0[0, 0].numpy(), 1.0, mode="mirror", radius=4)
    assert torch.allclose(out[0, 0, :4], torch.from_numpy(expected)[:4], atol=1e-6)


def test_self_attention_guidance_by_its_definition(objective):
    pipe = with_scheduler(tiny.pipeline().to(torch.float64), "ddim", "epsilon")
    seen = record(pipe)
    with guided(pipe, objective.objective, Guidance(scale=0, sag_scale=0.6)):
        run(pipe, n=1)
    answer, t, z = seen[1]
    text, _ = pipe.encode_prompt([""], "cpu", 1, False)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    maps = []

    class Keep:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            q, k, v = (
                attn.head_to_batch_dim(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v)
            )
            p = attn.get_attention_scores(q, k)
            maps.append(p)
            return attn.to_out[0](attn.batch_to_head_dim(p @ v))

    layer.set_processor(Keep())
    with torch.no_grad():
        eps = pipe.unet(z, t, text, return_dict=False)[0]
        a = alphabar(pipe.scheduler, t)
        received = maps[0].mean(0).sum(0).reshape(1, 8, 8)
        assert received.mean().item() == pytest.approx(1) and (received > 1).any()
        x0 = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
        worse = math.sqrt(a) * self_attention_degraded(x0, received) + math.sqrt(1 - a) * eps
        again = pipe.unet(worse, t, text, return_dict=False)[0]
    assert torch.allclose(answer, eps + 0.6 * (eps - again), rtol=0, atol=1e-9)


def test_schedules():
    assert [schedule_weight("linear", u) for u in (0, 0.5, 1)] == [0, 0.5, 1]
    assert [schedule_weight("cosine", u) for u in (0, 0.5, 1)] == pytest.approx([0, 0.5, 1])
    assert [schedule_weight("window:0.2,0.8", u) for u in (0, 0.2, 0.5, 0.9)] == [0, 1, 1, 0]
    for wrong in ("cosin", "window:0.8,0.2", "window:a", "linear:1"):
        with pytest.raises(ConfigError, match="schedule"):
            Guidance(schedule=wrong)
    with pytest.raises(ConfigError, match="scale"):
        Guidance(scale=-1)


def test_a_window_leaves_other_steps_alone(objective):
    pipe = with_scheduler(tiny.pipeline(), "ddim", "epsilon")
    seen = record(pipe)
    run(pipe, steps=5)
    with guided(pipe, objective.objective, Guidance(20, 0, schedule="window:0.5,1")) as steps:
        run(pipe, steps=5)
    assert [torch.equal(seen[i][0], seen[5 + i][0]) for i in range(5)] == [True] * 2 + [False] * 3
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("scheduler", "options", "what"),
    [
        (diffusers.EulerAncestralDiscreteScheduler, {}, "EulerAncestralDiscreteScheduler"),
        (diffusers.LCMScheduler, {}, "LCMScheduler"),
        (diffusers.DDIMScheduler, {"prediction_type": "sample"}, "sample"),
        (diffusers.DDIMScheduler, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "sde"),
        (diffusers.UniPCMultistepScheduler,
         {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "flow"),
    ],
)  # fmt: skip
def test_other_schedulers_are_refused(scheduler, options, what, objective):
    pipe = tiny.pipeline()
    pipe.scheduler = scheduler(**{**tiny.SPACED, **options})
    with pytest.raises(ConfigError, match=what), guided(pipe, objective.objective):
        raise AssertionError


def test_other_pipelines_and_releases_are_refused(objective, monkeypatch):
    pipe = tiny.pipeline(attention=False)
    with pytest.raises(ConfigError, match="sag_scale"), guided(pipe, objective.objective):
        raise AssertionError
    with pytest.raises(ConfigError, match="StableDiffusionPipeline"):
        module.check_pipeline(diffusers.DDPMPipeline)
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ConfigError, match="9 channels"):
        module.check_pipeline(pipe)
    monkeypatch.setattr(module, "version", lambda name: "0.99.0")
    with pytest.raises(ConfigError, match=re.escape("0.99.0")):
        module.check_pipeline(pipe)


def test_the_tested_range_is_the_one_required():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    low, high = module.DIFFUSERS
    assert f'"diffusers>={low},<{high}"' in text


def test_a_failure_leaves_the_pipeline_as_it_was():
    pipe = with_scheduler(tiny.pipeline(), "ddim", "epsilon")
    plain = run(pipe)
    with (
        pytest.raises(ConfigError, match="one number an image"),
        guided(pipe, lambda x: x, Guidance(1, gradient_checkpointing=True)),
    ):
        run(pipe)
    assert torch.equal(plain, run(pipe)) and "forward" not in vars(pipe.unet)
    assert not pipe.vae.is_gradient_checkpointing
