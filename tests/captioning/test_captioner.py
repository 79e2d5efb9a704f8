"""Captioners: beam search against brute force, checkpoints, folders, vision-language models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers
import xarray as xr

from brainalign.captioning import (
    ClipCap,
    VisionLanguageCaptioner,
    beam_search,
    caption_encoder,
    captions_section,
    embedding_weights,
    load_captioner,
    predict_texts,
    project,
)
from brainalign.data.simulate import simulate
from brainalign.encoding import fit_encoder
from brainalign.errors import ConfigError, SchemaError, UnavailableError, UnknownNameError

WORDS = "a red blue man dog house . on in the of".split()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<start>", "<end>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )


def random_clipcap(tokenizer, n_features=6, seed=0, width=64, layers=2, heads=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_positions=96, n_embd=width, n_layer=layers, n_head=heads,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        made = ClipCap(transformers.GPT2LMHeadModel(config), tokenizer, n_features, prefix_length=3)
        for p in made.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return made.eval()


class Markov:
    """Logits that depend on the whole sequence so far, by a table of hashes."""

    def __init__(self, n, vocabulary, seed):
        self.n, self.v, self.seed, self.known = n, vocabulary, seed, None

    def logits(self, search, sequence):
        rng = np.random.default_rng([self.seed, search, *(t + 1 for t in sequence)])
        return torch.tensor(2 * rng.standard_normal(self.v))

    def __call__(self, tokens, rows):
        if tokens is None:
            self.known = [(i, ()) for i in range(self.n)]
        else:
            self.known = [
                (self.known[r][0], (*self.known[r][1], t))
                for t, r in zip(tokens.tolist(), rows.tolist(), strict=True)
            ]
        return torch.stack([self.logits(*k) for k in self.known])


def every_sequence(model, search, vocabulary, longest, stop):
    for length in range(1, longest + 1):
        for sequence in itertools.product(range(vocabulary), repeat=length):
            if any(t in stop for t in sequence[:-1]):
                continue
            if sequence[-1] not in stop and length < longest:
                continue
            total = sum(
                float(model.logits(search, sequence[:i]).log_softmax(-1)[t])
                for i, t in enumerate(sequence)
            )
            yield total / length, sequence


def test_a_beam_that_holds_all_finds_the_best_of_all_sequences():
    vocabulary, longest, stop, n = 3, 4, [2], 4
    model = Markov(n, vocabulary, seed=0)
    tokens, lengths, scores = beam_search(
        model, n, beams=vocabulary**longest, max_tokens=longest, stop=stop
    )
    for i in range(n):
        ranked = sorted(every_sequence(model, i, vocabulary, longest, stop), reverse=True)
        for k in range(3):
            found = tuple(tokens[i, k, : lengths[i, k]].tolist())
            assert found == ranked[k][1]
            assert float(scores[i, k]) == pytest.approx(ranked[k][0], abs=1e-5)


def plain_beam(model, search, beams, longest, stop):
    """The rule again with lists: the best `beams` means of all continuations."""
    kept = [(0.0, ())]
    for _ in range(longest):
        grown = []
        for total, sequence in kept:
            if sequence and sequence[-1] in stop:
                grown.append((total, sequence))
                continue
            p = model.logits(search, sequence).log_softmax(-1).tolist()
            grown += [(total + x, (*sequence, t)) for t, x in enumerate(p)]
        kept = sorted(grown, key=lambda g: g[0] / len(g[1]), reverse=True)[:beams]
    return [s for _, s in kept]


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_few_beams_follow_the_rule(beams):
    n, longest, stop = 6, 7, [0, 3]
    model = Markov(n, 7, seed=1)
    tokens, lengths, _ = beam_search(model, n, beams=beams, max_tokens=longest, stop=stop)
    for i in range(n):
        found = [tuple(tokens[i, k, : lengths[i, k]].tolist()) for k in range(beams)]
        assert found == plain_beam(model, i, beams, longest, stop)


def test_the_cache_changes_no_caption(tokenizer):
    model = random_clipcap(tokenizer)
    x = np.random.default_rng(0).standard_normal((2, 6))
    with torch.no_grad():
        prefix = model.prefix(torch.tensor(x, dtype=torch.float32))

    class Whole(Markov):
        @torch.no_grad()
        def logits(self, search, sequence):
            ids = torch.tensor(sequence, dtype=torch.long)
            embedded = torch.cat([prefix[search], model.gpt.transformer.wte(ids)])
            return model.gpt(inputs_embeds=embedded[None]).logits[0, -1]

    whole = Whole(2, len(tokenizer), 0)
    tokens, lengths, _ = beam_search(whole, 2, beams=3, max_tokens=4, stop=model.ends)
    expected = [
        tokenizer.decode(t[:n], skip_special_tokens=True)
        for t, n in zip(tokens[:, 0].tolist(), lengths[:, 0].tolist(), strict=True)
    ]
    assert model.caption(x, beams=3, max_tokens=4) == expected
    assert model.caption(x, beams=3, max_tokens=4, batch_size=1) == expected
    assert len(set(expected)) > 1


def test_captions_stop_at_the_full_stop(tokenizer):
    model = random_clipcap(tokenizer)
    assert model.ends == sorted(tokenizer.convert_tokens_to_ids([".", "<end>"]))


def test_a_folder_and_a_published_checkpoint_load(tokenizer, tmp_path):
    model = random_clipcap(tokenizer).half().float()
    x = np.random.default_rng(2).standard_normal((4, 6))
    said = model.caption(x)
    folder = model.save(tmp_path / "own")
    loaded = load_captioner(folder, device="cpu")
    assert loaded.caption(x) == said and loaded.clip is None
    assert load_captioner(folder, clip="small-clip", device="cpu").clip == "small-clip"
    # The layout of coco_weights.pt: both ends of GPT-2, and masks that transformers no longer has.
    state = dict(model.state_dict())
    for i in range(2):
        state[f"gpt.transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 96, 96, dtype=torch.uint8)
        state[f"gpt.transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    assert "gpt.lm_head.weight" in state and "clip_project.model.2.bias" in state
    torch.save(state, tmp_path / "coco_weights.pt")
    tokenizer.save_pretrained(tmp_path / "words")
    name, clip = f"clipcap:{tmp_path / 'coco_weights.pt'}", "open_clip:ViT-B-32-quickgelu/openai"
    with pytest.raises(ConfigError, match="does not say which model's embeddings"):
        load_captioner(name, tokenizer=tmp_path / "words", device="cpu")
    loaded = load_captioner(name, tokenizer=tmp_path / "words", clip=clip, device="cpu")
    assert loaded.prefix_length == 3 and loaded.n_features == 6
    assert loaded.caption(x) == said
    # Saved as a folder, it goes on naming the model whose embeddings it reads.
    kept = loaded.save(tmp_path / "kept")
    assert load_captioner(kept, device="cpu").clip == clip
    with pytest.raises(ConfigError, match=f"reads embeddings of '{clip}'; clip is 'small-clip'"):
        load_captioner(kept, clip="small-clip", device="cpu")


def test_the_published_shapes():
    # 512 -> 3840 -> 7680 of ten tokens of 768, without making GPT-2 itself.
    with torch.device("meta"):
        gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config())

        class Words:
            eos_token_id = 50256

            def encode(self, text, **_):
                return [64, 13]

            def decode(self, ids):
                return "."

        model = ClipCap(gpt, Words(), 512)
    first, _, second = model.clip_project.model
    assert first.weight.shape == (3840, 512) and second.weight.shape == (7680, 3840)


def tiny_git(tokenizer):
    return transformers.GitForCausalLM(
        transformers.GitConfig(
            vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def tiny_blip2(tokenizer):
    return transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
            qformer_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                            "intermediate_size": 16, "encoder_hidden_size": 16, "vocab_size": 20},
            text_config={"model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 16,
                         "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16,
                         "word_embed_proj_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
                         "pad_token_id": 0},
            num_query_tokens=4, image_token_index=0,
        )
    )  # fmt: skip


TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
PICTURE = 3  # a word of the vocabulary that no caption needs stands where the picture is


def tiny_llava(tokenizer):
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "hidden_size": 12,
                           "intermediate_size": 16, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
            text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
            image_token_index=PICTURE,
        )
    )  # fmt: skip


def tiny_paligemma(tokenizer):
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", "hidden_size": 12,
                           "intermediate_size": 16, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
                           "vision_use_head": False},
            text_config={"model_type": "gemma", "vocab_size": len(tokenizer), "head_dim": 8,
                         **TEXT},
            image_token_index=PICTURE, projection_dim=16, hidden_size=16,
        )
    )  # fmt: skip


def tiny_qwen(tokenizer):
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            vision_config={"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2,
                           "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2,
                           "temporal_patch_size": 1},
            text_config={"vocab_size": len(tokenizer), **TEXT,
                         "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
            image_token_id=PICTURE, vision_start_token_id=4, vision_end_token_id=5,
            video_token_id=6,
        )
    )  # fmt: skip


def of_llava(model, pictures):
    chosen = model.config.vision_feature_layer
    tower = model.model.vision_tower
    states = tower(pictures, output_hidden_states=True).hidden_states[chosen]
    return states, {"pixel_values": pictures}, states.shape[1] - 1  # without the class token


def of_paligemma(model, pictures):
    states = model.model.vision_tower(pictures).last_hidden_state
    kinds = torch.zeros(len(pictures), states.shape[1] + 2, dtype=torch.long)
    return states, {"pixel_values": pictures, "token_type_ids": kinds}, states.shape[1]


def of_qwen(model, pictures):
    # A picture of 16 patches, of which 4 are merged into a token.
    n, pixels = len(pictures), 3 * 4 * 4
    patches = torch.rand(n * 16, pixels, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 4, 4]] * n)
    states = model.model.visual(patches, grid_thw=grid).pooler_output.view(n, 4, -1)
    given = {"pixel_values": patches, "image_grid_thw": grid}
    return states, given, 4


@pytest.mark.parametrize(
    ("make", "of", "around", "seed"),  # seeds whose pictures differ in their captions
    [
        (tiny_llava, of_llava, ([1], [7]), 0),
        (tiny_paligemma, of_paligemma, ([1], [7]), 7),
        (tiny_qwen, of_qwen, ([1, 4], [5, 7]), 0),
    ],
)
def test_a_model_that_reads_pictures_in_its_prompt_takes_states_in_their_place(
    make, of, around, seed, tokenizer
):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(tokenizer).eval()
        for p in model.parameters():
            p.data += 0.5 * torch.randn_like(p)
        pictures = torch.rand(4, 3, 8, 8)
    captioner = VisionLanguageCaptioner(
        model, tokenizer, prompt=f"<start><image>{tokenizer.decode([7])}"
    )
    with torch.no_grad():
        states, given, length = of(model, pictures)
        assert captioner.n_features == states.shape[-1]
        ids = torch.tensor([[*around[0], *[PICTURE] * length, *around[1]]] * 4)
        if "image_grid_thw" in given:
            given["mm_token_type_ids"] = (ids == PICTURE).int()
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **given, num_beams=3,
            do_sample=False, max_new_tokens=6, eos_token_id=captioner.ends,
        )[:, ids.shape[1] :]  # fmt: skip
    expected = [" ".join(t.split()) for t in tokenizer.batch_decode(made, skip_special_tokens=True)]
    assert len(set(expected)) > 1
    # Its own states give what its own pictures give.
    assert captioner.caption(states, beams=3, max_tokens=6) == expected
    assert captioner.caption(states, beams=3, max_tokens=6, batch_size=3) == expected
    pooled = captioner.caption(states.mean(1), beams=3, max_tokens=6)
    assert len(pooled) == 4 and len(set(pooled)) > 1
    # The picture alone is a prompt.
    assert len(VisionLanguageCaptioner(model, tokenizer).caption(states, max_tokens=3)) == 4
    with pytest.raises(ConfigError, match="must have <image> in one place"):
        VisionLanguageCaptioner(model, tokenizer, prompt="a man")


def test_voxels_fitted_to_a_vision_tower_are_captioned_and_checked_elsewhere(tokenizer, caplog):
    """From states of GIT's tower to a section, without and with an encoder that knows texts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        git = tiny_git(tokenizer).eval()
        for p in git.parameters():
            p.data += 0.5 * torch.randn_like(p)
        pictures = torch.rand(40, 3, 8, 8)
        clip_like = torch.randn(40, 128).numpy()
    captioner = VisionLanguageCaptioner(git, tokenizer, clip="transformers:git")
    with torch.no_grad():
        states = captioner.tower(pictures).last_hidden_state.mean(1).numpy()

    def features(values, model, layer):
        return xr.Dataset(
            {"features": (("stimulus", "feature"), values)},
            coords={"stimulus_id": ("stimulus", [f"s{i}" for i in range(len(values))]),
                    "model": model, "layer": layer},
        )  # fmt: skip

    seen = features(states, "transformers:git", "git.image_encoder")
    responses = simulate(seen, neuroids=6, ncsnr=2.0, seed=0).responses
    encoder, texts = (
        fit_encoder(x, responses, alphas=[1.0], device="cpu")
        for x in (seen, features(clip_like, "small-clip", "output"))
    )
    options = {"n_draws": 2, "beams": 2, "max_tokens": 6, "device": "cpu"}
    plain = caption_encoder(encoder, seen, captioner, **options)
    assert "its captions are not checked" in caplog.text
    assert np.isnan(plain["prediction"]).all() and np.isnan(plain["percentile"]).all()
    assert "checked_with" not in plain.attrs
    # Its words are the captioner's for the projected states.
    projected = project(embedding_weights(encoder), states, n_draws=2, device="cpu")
    for k in range(2):
        expected = captioner.caption(projected[k], beams=2, max_tokens=6)
        assert plain["caption"].values[:, k].tolist() == expected
    assert len(set(plain["caption"].values.ravel().tolist())) > 1
    section = captions_section({"s": plain}, tagger=lambda said: [t.split() for t in said])
    assert section.facts["Faithfulness not checked"] == "s"
    assert "not checked" in section.methods
    assert not section.summary and "faithfulness" not in {f.id for f in section.figures}
    [table] = [f for f in section.figures if f.id == "voxels-s"]
    assert not {"predicted", "percentile"} & set(table.data) and "not checked" in table.caption
    assert table.data["caption"].values.tolist() == plain["caption"].values[:, 0].tolist()

    last = str(encoder["neuroid_id"].values[5])
    # Another encoder of these voxels, in whatever order, checks the same words.
    checked = caption_encoder(
        encoder, seen, captioner, check_with=texts.isel(neuroid=slice(None, None, -1)), **options
    )
    assert np.array_equal(checked["caption"].values, plain["caption"].values)
    assert checked.attrs["checked_with"] == "small-clip"
    y = predict_texts(texts, checked["caption"].values[:, 1].tolist())
    assert np.allclose(checked["prediction"].values[:, 1], np.diag(y), atol=1e-5)
    section = captions_section({"s": checked}, tagger=lambda said: [t.split() for t in said])
    assert "encoding model on small-clip" in section.methods and section.summary
    with pytest.raises(SchemaError, match=f"check_with lacks 1 of the 6 .* is '{last}'"):
        caption_encoder(
            encoder, seen, captioner, check_with=texts.isel(neuroid=slice(5)), **options
        )
    with pytest.raises(SchemaError, match="where no texts lie"):
        caption_encoder(encoder, seen, captioner, check_with=encoder, **options)


def test_models_whose_states_cannot_take_the_place_of_a_tower_are_refused(tokenizer):
    llava = tiny_llava(tokenizer)
    llava.config.vision_feature_layer = [-2, -1]
    with pytest.raises(ConfigError, match="several layers of its vision tower"):
        VisionLanguageCaptioner(llava, tokenizer)
    with pytest.raises(ConfigError, match="no vision tower named vision_model"):
        VisionLanguageCaptioner(random_clipcap(tokenizer).gpt, tokenizer)
    with pytest.raises(ConfigError, match="reads a picture without a prompt"):
        VisionLanguageCaptioner(tiny_git(tokenizer), tokenizer, prompt="<image>")


@pytest.mark.parametrize("make", [tiny_git, tiny_blip2])
def test_a_vision_language_model_takes_states_in_place_of_its_tower(make, tokenizer, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(tokenizer).eval()
        for p in model.parameters():
            p.data += 0.5 * torch.randn_like(p)
        pictures = torch.rand(6, 3, 8, 8)
    captioner = VisionLanguageCaptioner(model, tokenizer)
    assert captioner.n_features == 16
    with torch.no_grad():
        states = captioner.tower(pictures).last_hidden_state
        ids = model.generate(
            pixel_values=pictures, num_beams=5, do_sample=False, max_new_tokens=8,
            eos_token_id=captioner.ends,
        )  # fmt: skip
    expected = [" ".join(t.split()) for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    # Its own states give what its own pictures give.
    assert captioner.caption(states, max_tokens=8) == expected
    pooled = captioner.caption(states.mean(1), max_tokens=8, batch_size=4)
    assert len(pooled) == 6 and len(set(pooled)) > 1
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded = load_captioner(f"transformers:{tmp_path / 'm'}", device="cpu")
    assert loaded.caption(states, max_tokens=8) == expected


def test_errors(tokenizer, tmp_path):
    model = random_clipcap(tokenizer)
    with pytest.raises(SchemaError, match="takes embeddings of 6 features"):
        model.caption(np.ones((2, 5)))
    with pytest.raises(SchemaError, match="1 embeddings are not finite, the first is 1"):
        model.caption(np.array([[1.0] * 6, [np.nan] * 6]))
    with pytest.raises(ConfigError, match="room for 93"):
        model.caption(np.ones((2, 6)), max_tokens=94)
    with pytest.raises(ConfigError, match="is not one token"):
        ClipCap(model.gpt, tokenizer, 6, stop="a red")
    with pytest.raises(UnknownNameError, match="Did you mean 'small-captioner'"):
        load_captioner("small-captoiner")
    with pytest.raises(ConfigError, match="reads no prompt"):
        load_captioner("small-captioner", prompt="<image>")
    with pytest.raises(UnavailableError, match="holds no captioner"):
        load_captioner(tmp_path)
    with pytest.raises(UnavailableError, match="There is no checkpoint"):
        load_captioner("clipcap:/nowhere.pt", clip="small-clip")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(SchemaError, match="no ClipCap checkpoint"):
        load_captioner(f"clipcap:{tmp_path / 'other.pt'}", clip="small-clip")
