"""Captioners: beam search against brute force, checkpoints, folders, vision-language models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers

from brainalign.captioning import ClipCap, VisionLanguageCaptioner, beam_search, load_captioner
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
    with pytest.raises(UnavailableError, match="holds no captioner"):
        load_captioner(tmp_path)
    with pytest.raises(UnavailableError, match="There is no checkpoint"):
        load_captioner("clipcap:/nowhere.pt", clip="small-clip")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(SchemaError, match="no ClipCap checkpoint"):
        load_captioner(f"clipcap:{tmp_path / 'other.pt'}", clip="small-clip")
