"""The small diffusion pipeline and the classifier that judges it: training and what is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from brainalign.errors import ConfigError

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")
pytest.importorskip("timm")
torch = pytest.importorskip("torch")
from safetensors import safe_open  # noqa: E402

from brainalign.features import load_model  # noqa: E402
from brainalign.features.models import shipped_folder  # noqa: E402
from brainalign.small_models import classifier, clip, diffusion  # noqa: E402
from brainalign.small_models.clip import WEIGHTS  # noqa: E402
from brainalign.small_models.scenes import CATEGORIES, render_scenes  # noqa: E402

TINY = {
    "n_scenes": 48,
    "autoencoder_steps": 2,
    "decoder_steps": 2,
    "steps": 3,
    "seed": 5,
    "n_measure": 1,
}
JUDGED = {"n_scenes": 48, "steps": 3, "batch_size": 16, "seed": 5, "n_measure": 6}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return classifier.train_classifier(tmp_path_factory.mktemp("judge") / "model", **JUDGED)


def _weights(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _changed(first: Path, second: Path, part: str) -> set[str]:
    """Names of the weights of a pipeline's part that differ."""
    one, other = (
        _weights(f / part / "diffusion_pytorch_model.safetensors") for f in (first, second)
    )
    assert one.keys() == other.keys()
    return {k for k, v in one.items() if not np.array_equal(v, other[k])}


def test_text_encoder_is_the_small_models_text_tower():
    import open_clip

    encoder, tokenizer = diffusion.text_encoder(WEIGHTS)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{WEIGHTS}")
    theirs = open_clip.get_tokenizer(f"local-dir:{WEIGHTS}")
    texts = ["a picture of a red car", "", "two people at night on a beach", "food " * 60]
    ids = diffusion._tokens(tokenizer, texts)
    assert torch.equal(ids, theirs(texts))
    hidden = encoder(ids).last_hidden_state
    read = hidden[torch.arange(len(texts)), ids.argmax(-1)] @ model.text_projection
    torch.testing.assert_close(read, model.eval().encode_text(ids), rtol=0, atol=1e-6)


def test_diffusion_training_goes_on_to_the_same_weights(tmp_path, judge):
    whole = diffusion.train_diffusion(
        tmp_path / "whole", **TINY, scenes=tmp_path / "scenes", judge=judge
    )
    cut = {**TINY, "checkpoint": tmp_path / "state", "scenes": tmp_path / "scenes"}
    stopped = diffusion.train_diffusion(tmp_path / "cut", **cut, save_every=1, stop_at=1)
    assert stopped is None and not (tmp_path / "cut").exists()
    resumed = diffusion.train_diffusion(tmp_path / "cut", **cut, judge=judge)
    assert not _changed(whole, resumed, "vae") and not _changed(whole, resumed, "unet")
    record = json.loads((resumed / "training.json").read_text())
    assert 0 <= record["measured"]["label"]["correct"] < 0.7, "three steps cannot draw"
    assert (resumed / "samples.png").is_file()
    assert str(judge.name) in (resumed / "MODEL_CARD.md").read_text()
    begun = diffusion.train_diffusion(
        tmp_path / "begun", **{**TINY, "autoencoder_steps": 0, "steps": 0},
        scenes=tmp_path / "scenes", start=whole, judge=judge,
    )  # fmt: skip
    assert not _changed(whole, begun, "unet")
    changed = _changed(whole, begun, "vae")
    assert changed and all(k.startswith(("decoder.", "post_quant_conv.")) for k in changed)
    card = " ".join((begun / "MODEL_CARD.md").read_text().split())
    assert "began with the weights" in card and "Its decoder alone" in card
    assert "Autoencoder:" not in card and "Denoiser:" not in card
    denoised = diffusion.train_diffusion(
        tmp_path / "denoised", **{**TINY, "autoencoder_steps": 0, "decoder_steps": 0},
        scenes=tmp_path / "scenes", start=whole, judge=judge,
    )  # fmt: skip
    assert not _changed(whole, denoised, "vae") and _changed(whole, denoised, "unet")
    with pytest.raises(ConfigError, match="other settings"):
        diffusion.train_diffusion(tmp_path / "more", **{**cut, "steps": 4}, judge=judge)
    with pytest.raises(ConfigError, match="exists"):
        diffusion.train_diffusion(tmp_path / "cut", **TINY)


def test_a_decoder_learns_to_draw_what_was_there():
    """From the same latents: closer in pixels and in what the tower sees."""
    from diffusers import AutoencoderKL
    from torch.nn.functional import normalize

    images = np.stack([s.image for s in render_scenes(96, seed=3, size=64)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(**diffusion._VAE)
    diffusion._start_from_averages(vae, images)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    settings = {
        "steps": 40, "batch_size": 8, "learning_rate": 2e-3, "weight_decay": 0.0, "seed": 3,
    }  # fmt: skip
    shown = diffusion._as_tensor(images[:24], "cpu")
    tower = load_model("small-clip", device="cpu").module.visual

    @torch.no_grad()
    def wrong():
        made = vae.decode(vae.encode(shown).latent_dist.mean).sample
        seen = [normalize(tower.layer1(tower.stem(2 * x)), dim=1) for x in (made, shown)]
        return float((made - shown).abs().mean()), float((seen[0] - seen[1]).square().sum(1).mean())

    pixels, perceived = wrong()
    latents = diffusion._latents(vae, images, "cpu")
    diffusion._train_decoder(vae, WEIGHTS, images, latents, settings, "cpu", None, 100)
    assert all(
        torch.equal(before[k], v) for k, v in vae.state_dict().items()
        if not k.startswith(("decoder.", "post_quant_conv."))
    )  # fmt: skip
    fewer, nearer = wrong()
    assert fewer < 0.9 * pixels and nearer < 0.9 * perceived


def test_a_decoder_needs_a_residual_network_to_see_with(tmp_path):
    with pytest.raises(ConfigError, match="residual network"):
        diffusion.train_diffusion(
            tmp_path / "out", **TINY, clip=shipped_folder("small-judge"), scenes=tmp_path / "s",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seed": 10_000}, "kept for held-out"),
        ({"steps": 0}, "steps >= 1"),
        ({"autoencoder_steps": 0}, "autoencoder_steps >= 1"),
        ({"decoder_steps": -1}, "decoder_steps >= 0"),
        ({"n_scenes": 8}, "n_scenes >= 32"),
        ({"stop_at": 1}, "no checkpoint folder"),
    ],
)
def test_diffusion_training_refuses_wrong_settings(tmp_path, wrong, said):
    with pytest.raises(ConfigError, match=said):
        diffusion.train_diffusion(tmp_path / "out", **{**TINY, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_diffusion_training_wants_its_judge_first(tmp_path):
    with pytest.raises(ConfigError, match="no classifier to judge"):
        diffusion.train_diffusion(tmp_path / "out", **TINY, judge=tmp_path / "nobody")
    assert list(tmp_path.iterdir()) == []


def test_classifier_training_goes_on_to_the_same_weights(tmp_path):
    whole = classifier.train_classifier(tmp_path / "whole", **JUDGED, scenes=tmp_path / "scenes")
    cut = {**JUDGED, "checkpoint": tmp_path / "state", "scenes": tmp_path / "scenes"}
    stopped = classifier.train_classifier(tmp_path / "cut", **cut, save_every=1, stop_at=2)
    assert stopped is None and not (tmp_path / "cut").exists()
    resumed = classifier.train_classifier(tmp_path / "cut", **cut)
    first, second = (_weights(f / "model.safetensors") for f in (whole, resumed))
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key], err_msg=key)
    assert json.loads((resumed / "config.json").read_text())["label_names"] == list(CATEGORIES)
    with pytest.raises(ConfigError, match="other settings"):
        classifier.train_classifier(tmp_path / "more", **{**cut, "steps": 4})
    with pytest.raises(ConfigError, match="n_scenes >= batch_size"):
        classifier.train_classifier(tmp_path / "more", **{**JUDGED, "n_scenes": 8})
    with pytest.raises(ConfigError, match="trained on"):
        classifier.measure(resumed, n=6, seed=0)


def test_shipped_judges_know_scenes_that_nobody_learnt_from():
    folder = shipped_folder("small-classifier")
    found = classifier.measure(folder, n=240, seed=40_000)
    assert found["correct"] > 0.97 and found["correct_soft"] > 0.95, found
    assert min(found["by_category"].values()) > 0.9, found["by_category"]
    named = clip.measure(shipped_folder("small-judge"), n=180, seed=40_000)
    assert named["category"]["correct"] > 0.9, named["by_category"]
    judge, guide = load_model("small-judge", device="cpu"), load_model("small-clip", device="cpu")
    assert type(judge.module.visual) is not type(guide.module.visual)
    assert judge.weights_sha256 != guide.weights_sha256


def test_shipped_pipeline_draws_what_its_prompt_asks_for():
    """Prompts decide what the classifier sees; the whole family of models stays small."""
    from brainalign.synthesis import load_pipeline

    pipeline = load_pipeline("small-diffusion", scheduler="dpmsolver++", device="cpu")
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    named = []
    for wanted in ("places", "words", "people"):
        prompt = f"a picture of {clip.PROMPTS[wanted]}"
        drawn = diffusion._draw(pipeline, prompt, range(500, 506), 15, 3.0)
        named += [x == wanted for x in diffusion._labels(shipped_folder("small-classifier"), drawn)]
    assert np.mean(named) > 0.7, named  # chance is 1/6
    files = [f for f in WEIGHTS.parent.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 30e6
