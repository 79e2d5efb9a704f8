"""Probes against the attention that models themselves report, and against cases known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from real_models import (
    CASES,
    case_gpt2_eager,
    case_hf_vit_eager,
    case_open_clip,
    case_timm,
    case_timm_registers,
    case_torch,
    case_unet,
    images,
    seeded,
    tokens,
)

from brainalign_kernels import ShapeError, UnsupportedError
from brainalign_kernels.adapters import attention_layers
from brainalign_kernels.probes import (
    accuracy,
    attention_distance,
    attention_maps,
    attention_patterns,
    attention_rollout,
    attention_sinks,
    head_divergence,
    head_importance,
    observe,
    ring_profile,
    true_class_probability,
)


@pytest.mark.parametrize("case", [case_hf_vit_eager, case_gpt2_eager])
def test_maps_are_those_of_the_model(case):
    model, run = case()
    maps = attention_maps(model, run)
    if case is case_hf_vit_eager:
        expected = model(pixel_values=images(), output_attentions=True).attentions
    else:
        expected = model(input_ids=tokens(), output_attentions=True).attentions
    assert len(maps) == len(expected) == 2
    for got, want in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_maps_explain_the_outputs_in_every_library(name):
    model, run = CASES[name]()
    errors = observe(model, run, lambda c: float((c.weights() @ values(c) - c.out).abs().max()))
    assert set(errors) == set(attention_layers(model))
    assert max(max(e) for e in errors.values()) < 1e-4


def values(captured):
    return captured.v.repeat_interleave(captured.q.shape[1] // captured.v.shape[1], dim=1)


def test_blocks_of_queries_change_nothing(monkeypatch):
    for case in (case_timm_registers, case_gpt2_eager, case_open_clip, case_torch):
        model, run = case()
        whole = attention_maps(model, run)
        monkeypatch.setattr("brainalign_kernels.probes.capture.BLOCK", 5)
        parts = attention_maps(model, run)
        monkeypatch.undo()
        for layer, expected in whole.items():
            torch.testing.assert_close(parts[layer], expected, rtol=1e-5, atol=1e-6)


def test_a_part_of_the_maps():
    model, run = case_timm_registers()
    whole = attention_maps(model, run)
    layer = "blocks.1.attn"
    part = attention_maps(model, run, layers=1, queries=slice(0, 1), average_heads=True)
    assert list(part) == [layer] and part[layer].shape == (2, 1, 68)
    torch.testing.assert_close(part[layer], whole[layer][:, :, :1].mean(1))


def test_maps_of_a_swapped_mechanism():
    model, run = case_timm()
    maps = attention_maps(model, run, attention="neighborhood:k=3")
    softmax = attention_maps(model, run)
    patch = maps["blocks.0.attn"][0, 0, 1 + 8 * 3 + 4]
    seen = {0, *(1 + 8 * y + x for y in (2, 3, 4) for x in (3, 4, 5))}
    assert set(patch.nonzero().flatten().tolist()) == seen
    expected = softmax["blocks.0.attn"][0, 0, 1 + 8 * 3 + 4, sorted(seen)]
    torch.testing.assert_close(patch[sorted(seen)], expected / expected.sum(), rtol=1e-3, atol=1e-5)


def test_rollout():
    model, run = case_timm_registers()
    first, second = (m.mean(1) for m in attention_maps(model, run).values())
    eye = torch.eye(68)
    expected = (0.5 * second + 0.5 * eye) @ (0.5 * first + 0.5 * eye)
    got = attention_rollout(model, run)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 68))
    torch.testing.assert_close(attention_rollout(model, run, residual=0.0), second @ first)
    model, run = case_open_clip()
    with pytest.raises(UnsupportedError, match="one stack"):
        attention_rollout(model, run)
    assert attention_rollout(model, run, layers="visual.*").shape == (2, 17, 17)
    with pytest.raises(ShapeError, match="expected 0 to 1"):
        attention_rollout(model, run, residual=2)


def test_distance_and_rings_from_the_maps():
    model, run = case_timm_registers()
    maps = attention_maps(model, run)
    distance, rings = attention_distance(model, run), ring_profile(model, run)
    manhattan = ring_profile(model, run, metric="manhattan")
    places = [(i // 8, i % 8) for i in range(64)]
    for layer, a in maps.items():
        a = a[:, :, 4:, 4:].double()
        euclid = torch.tensor([[math.dist(x, y) for y in places] for x in places]).double()
        expected = ((a * euclid).sum(-1) / a.sum(-1)).mean((0, 2)).float()
        torch.testing.assert_close(distance[layer], expected, rtol=1e-5, atol=1e-6)
        for got, hops in [(rings, max), (manhattan, sum)]:
            hop = torch.tensor(
                [[hops((abs(x[0] - y[0]), abs(x[1] - y[1]))) for y in places] for x in places]
            )
            expected = torch.stack([(a * (hop == k)).sum(-1).mean((0, 2)) for k in hop.unique()], 1)
            torch.testing.assert_close(got[layer], expected.float(), rtol=1e-5, atol=1e-6)


def test_rings_of_a_window():
    model, run = case_timm()
    rings = ring_profile(model, run, attention="neighborhood:k=3")["blocks.0.attn"]
    full = ring_profile(model, run)["blocks.0.attn"]
    assert rings.shape == full.shape == (3, 8)
    # Windows shift at borders: rings 0 to 2, never further.
    assert (rings[:, 3:] == 0).all() and (rings[:, :2] > 0).all() and (full[:, 3:] > 0).all()


def test_probes_of_space_need_a_grid():
    model, run = case_gpt2_eager()
    with pytest.raises(UnsupportedError, match="no grid of image tokens"):
        attention_distance(model, run)
    model, run = case_unet()
    distances = attention_distance(model, run, layers="*attn1")
    assert len(distances) == 4 and all((d > 0).all() for d in distances.values())


def test_sinks_of_a_causal_model():
    from brainalign_kernels.sinks import sink_metric, sink_share

    model, run = case_gpt2_eager()
    maps = attention_maps(model, run)
    profile = attention_sinks(model, run, threshold=0.2)
    for layer, a in maps.items():
        torch.testing.assert_close(profile.received[layer], sink_metric(a).mean(0))
    stacked = torch.stack(list(maps.values()))
    torch.testing.assert_close(profile.share, sink_share(stacked, threshold=0.2))
    assert 0 < float(profile.share.max()) < 1
    model, run = CASES["gpt2_padded"]()
    with pytest.raises(UnsupportedError, match="without padding"):
        attention_sinks(model, run)


def test_sinks_of_an_image_model():
    model, run = case_timm_registers()
    maps = torch.stack(list(attention_maps(model, run).values()))
    profile = attention_sinks(model, run, threshold=0.05)
    metric = maps.mean(-2)
    torch.testing.assert_close(profile.share, (metric > 0.05).float().mean((0, 1, 2)))
    torch.testing.assert_close(torch.stack(list(profile.received.values())), metric.mean(1))


def test_head_importance_is_what_the_projection_loses():
    model, run = case_timm()
    labels = torch.tensor([1, 4])
    found = head_importance(
        model, run, {"p": true_class_probability(labels), "accuracy": accuracy(labels)}
    )
    logits = run()
    chance = logits.softmax(-1)[torch.arange(2), labels].mean()
    assert found.baseline["p"] == pytest.approx(float(chance), rel=1e-4)
    assert found.baseline["accuracy"] == float((logits.argmax(-1) == labels).float().mean())
    assert [tuple(x.shape) for x in found.loss["p"].values()] == [(3,), (3,)]
    projection = model.blocks[1].attn.proj
    for head in range(3):
        weight = projection.weight.data.clone()
        projection.weight.data[:, 16 * head : 16 * head + 16] = 0
        without = run().softmax(-1)[torch.arange(2), labels].mean()
        projection.weight.data = weight
        expected = float(chance - without)
        assert found.loss["p"]["blocks.1.attn"][head] == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-5
    assert torch.equal(run(), logits)


def test_head_that_is_its_mean_loses_nothing():
    model, run = case_timm()

    def score(logits):
        return logits[:, 2]

    model.blocks[1].attn.qkv.weight.data[: 2 * 48] = 0
    model.blocks[1].attn.qkv.bias.data[: 2 * 48] = 0
    mean = head_importance(model, run, score, ablation="mean").loss["score"]
    zero = head_importance(model, run, score).loss["score"]
    assert float(mean["blocks.1.attn"].abs().max()) < 1e-4
    assert float(zero["blocks.1.attn"].abs().min()) > 1e-3
    assert float(mean["blocks.0.attn"].abs().min()) > 1e-3
    with pytest.raises(ShapeError, match="'zero' or 'mean'"):
        head_importance(model, run, score, ablation="noise")
    with pytest.raises(ShapeError, match="no logits"):
        head_importance(model, run, lambda out: accuracy(torch.zeros(2))(out[0]))


def llava():
    transformers = pytest.importorskip("transformers")
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vision = transformers.CLIPVisionConfig(**size, hidden_size=32, image_size=32, patch_size=16)
    text = transformers.LlamaConfig(
        **size, num_key_value_heads=1, hidden_size=32, vocab_size=60, eos_token_id=None
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=55,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return seeded(lambda: transformers.LlavaForConditionalGeneration(config))


def test_heads_that_look_at_the_image():
    model = llava()
    text = tokens(5, words=50)
    joint = torch.cat([torch.full((2, 4), 55), text], 1)
    pixels = images(32)
    options = {"do_sample": False, "max_new_tokens": 2, "pad_token_id": 0}
    found = head_divergence(
        model,
        lambda: model.generate(input_ids=joint, pixel_values=pixels, **options),
        lambda: model.generate(input_ids=text, **options),
    )
    assert [tuple(x.shape) for x in found.values()] == [(2, 2), (2, 2)]
    assert all("language_model" in layer for layer in found)
    inputs = {}

    def keep(layer):
        projection = model.get_submodule(layer).o_proj
        return projection.register_forward_pre_hook(
            lambda m, args: inputs.setdefault(layer, []).append(
                args[0][:, -1].unflatten(-1, (2, 16))
            )
        )

    hooks = [keep(layer) for layer in found]
    model(input_ids=joint, pixel_values=pixels)
    model(input_ids=text)
    for hook in hooks:
        hook.remove()
    for layer, got in found.items():
        image, plain = inputs[layer]
        torch.testing.assert_close(got, (image - plain).norm(dim=-1), rtol=1e-4, atol=1e-5)
        assert (got > 1e-3).all()
    same = head_divergence(model, lambda: model(input_ids=text), lambda: model(input_ids=text))
    assert all((x == 0).all() for x in same.values())


def test_only_reductions_are_kept():
    model, run = case_timm()
    with pytest.raises(UnsupportedError, match="none of the attention layers"):
        observe(model, lambda: None, lambda c: None)
    before = run()
    with pytest.raises(RuntimeError, match="stop"):
        observe(model, run, lambda c: (_ for _ in ()).throw(RuntimeError("stop")))
    assert torch.equal(run(), before)
    counts = observe(model, lambda: [run() for _ in range(3)], lambda c: c.shape)
    assert counts == {layer: [(8, 8)] * 3 for layer in attention_layers(model)}


def planted_maps(n, heads, noise, seed):
    """Maps of three families (to oneself, to the token before, to the first token), shuffled."""
    make = torch.Generator().manual_seed(seed)
    families = torch.stack([torch.eye(n), torch.eye(n).roll(-1, 1), torch.eye(n)[:1].expand(n, n)])
    labels = torch.arange(3).repeat(heads // 3)[torch.randperm(heads, generator=make)]
    logits = 4 * families[labels] + noise * torch.randn(heads, n, n, generator=make)
    return logits.softmax(-1)[None], labels


def test_patterns_recover_planted_families():
    (first, a), (second, b) = planted_maps(24, 12, 0.7, 0), planted_maps(30, 9, 0.7, 1)
    made = attention_patterns({"first": first, "second": second}, size=12, code_dim=3)
    assert made.codes["first"].shape == (1, 12, 3)
    assert made.reconstructions["second"].shape == made.maps["second"].shape == (1, 9, 12, 12)
    assert made.explained > 0.9
    codes = torch.cat([x.flatten(0, 1) for x in made.codes.values()])
    labels = torch.cat([a, b])
    centres = torch.stack([codes[labels == family].mean(0) for family in range(3)])
    assert (torch.cdist(codes, centres).argmin(1) == labels).all()
    nearest = torch.cdist(codes, codes).fill_diagonal_(torch.inf).argmin(1)
    assert (labels[nearest] == labels).all()
    # Maps without structure cannot be kept by three numbers each.
    plain = torch.rand(1, 21, 12, 12, generator=torch.Generator().manual_seed(2))
    assert attention_patterns({"x": plain}, size=12, code_dim=1, steps=100).explained < 0.6


def test_patterns_depend_on_the_seed_alone():
    maps = {"x": planted_maps(9, 6, 0.1, 0)[0]}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        one, two = (attention_patterns(maps, size=4, steps=20, seed=3) for _ in range(2))
    assert torch.equal(one.codes["x"], two.codes["x"])
    assert not torch.equal(one.codes["x"], attention_patterns(maps, size=4, steps=20).codes["x"])
    assert torch.equal(before, torch.random.get_rng_state())
    same = attention_patterns({"x": maps["x"][:, :1]}, size=4, steps=5)
    assert same.explained == 1.0
    torch.testing.assert_close(same.maps["x"], same.reconstructions["x"])


@pytest.mark.parametrize(
    "maps",
    [
        {},
        {"x": torch.rand(3, 4, 4)},
        {"x": torch.rand(1, 0, 4, 4)},
        {"x": torch.full((1, 2, 4, 4), torch.nan)},
    ],
)
def test_patterns_refuse(maps):
    with pytest.raises(ShapeError):
        attention_patterns(maps)
    with pytest.raises(ShapeError, match="at least 1"):
        attention_patterns({"x": torch.rand(1, 2, 4, 4)}, code_dim=0)
