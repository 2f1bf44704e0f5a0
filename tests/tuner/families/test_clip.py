"""Text through CLIP encoders: skipped layers, chunks, empty captions, weights and new words."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from tuner.diffusion.batch import Conditioning
from tuner.errors import ConfigError
from tuner.families._clip import weighted
from tuner.families.base import Sampling
from tuner.families.source import BaseModel

CPU = torch.device("cpu")
SHORT, LONG = "the red cat sat on 9 hats", " ".join(f"the red cat {i}" for i in range(30))
MAKERS = {"sd1": tiny.sd1, "sd2": tiny.sd2, "sdxl": tiny.sdxl}
LAYERS = {"num_hidden_layers": 4}
every_base = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """Stock pipelines and their folders; not to be changed."""
    made: dict[str, tuple[Any, Path]] = {}
    with pytest.MonkeyPatch.context() as patch:
        real = tiny.text_config
        patch.setattr(tiny, "text_config", lambda words, **more: real(words, **{**more, **LAYERS}))
        for name, make in MAKERS.items():
            pipeline, folder = make(), tmp_path_factory.mktemp("clip") / name
            pipeline.save_pretrained(folder)
            made[name] = pipeline, folder
    return made


@pytest.fixture
def opened(pipelines):
    return lambda name, **options: BaseModel(base=str(pipelines[name][1]), **options).open(CPU)


def stock_prompt(pipeline: Any, prompt: str, **options: Any) -> tuple[Tensor, ...]:
    how = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    told = pipeline.encode_prompt(prompt, **how, **options)
    return tuple(part for part in told if part is not None)


def parts(told: dict[str, Any]) -> tuple[Tensor, ...]:
    """In the order of diffusers' `encode_prompt`."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return tuple(told[name] for name in names if name in told)


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@every_base
@pytest.mark.parametrize("negative", ["", "blue 7"])
@torch.no_grad()
def test_a_prompt_is_encoded_as_the_stock_pipeline_does(name: str, negative: str, opened):
    model = opened(name)
    told = model.guided(SHORT, Sampling(negative_prompt=negative))
    assert same(parts(told), stock_prompt(model.pipeline(), SHORT, negative_prompt=negative or None))


@torch.no_grad()
def test_skipped_layers_are_those_of_diffusers_for_xl(opened, pipelines):
    seen = []
    for skip in (0, 1, 2):
        tokens = opened("sdxl", clip_skip=skip).encode_text([SHORT]).tokens
        assert torch.equal(tokens, stock_prompt(pipelines["sdxl"][0], SHORT, clip_skip=skip or None)[0])
        seen.append(tokens)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@torch.no_grad()
def test_skipped_layers_are_as_if_the_encoder_had_fewer(name: str, opened):
    """With the last norm; diffusers has a word for it and fails."""
    shorter = opened(name)
    del shorter.raw("text_encoder").encoder.layers[-1]
    model = opened(name, clip_skip=1)
    assert torch.equal(model.encode_text([SHORT]).tokens, shorter.encode_text([SHORT]).tokens)
    assert not torch.equal(model.encode_text([SHORT]).tokens, opened(name).encode_text([SHORT]).tokens)


@every_base
def test_what_is_skipped_is_said_to_decide_nothing(name: str, opened):
    for skip in (0, 1):
        model = opened(name, clip_skip=skip)
        told = model.encode_text([SHORT])
        (told.tokens.sum() + (0 if told.pooled is None else told.pooled.sum())).backward()
        for component in model.text_encoders:
            for own, p in model.raw(component).named_parameters():
                unused = re.search(model.unused.get(component, "(?!)"), model.prefixes[component] + own)
                assert (p.grad is None) == bool(unused), own


def test_more_layers_than_there_are_cannot_be_skipped(opened):
    opened("sd1", clip_skip=3)
    opened("sdxl", clip_skip=2)
    with pytest.raises(ConfigError, match=r"model\.clip_skip: .* has 4 layers, so at most 2 can be left out"):
        opened("sdxl", clip_skip=3)
    with pytest.raises(ConfigError, match="clip_skip must not be negative"):
        opened("sd1", clip_skip=-1)


@every_base
@torch.no_grad()
def test_chunks_leave_short_captions_as_they_are_and_cut_long_ones_by_hand(name: str, opened):
    plain, model = opened(name), opened(name, chunks=3)
    assert plain.max_tokens == 75 and model.max_tokens == 225
    short, alone = model.encode_text([SHORT]), plain.encode_text([SHORT])
    assert torch.equal(short.tokens, alone.tokens) and short.mask is None
    long = model.encode_text([LONG])
    count = model.count_tokens(LONG)
    assert 75 < count <= 150 and long.tokens.shape[1] == 2 * 77
    halves = []
    for component in plain.text_encoders:
        tokenizer, network = plain.tokenizers[component], plain.raw(component)
        ids = tokenizer(LONG, add_special_tokens=False).input_ids
        start, end, fill = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        rows = [[start, *ids[:75], end], [start, *ids[75:], end, *[fill] * (150 - count)]]
        outputs = [network(torch.tensor([row]), output_hidden_states=True) for row in rows]
        layers = [out[0] if name != "sdxl" else out.hidden_states[-2] for out in outputs]
        halves.append(torch.cat(layers, 1))
        if component == "text_encoder_2":
            assert long.pooled is not None
            torch.testing.assert_close(long.pooled, outputs[0].text_embeds)  # of the first
    torch.testing.assert_close(long.tokens, torch.cat(halves, -1))
    assert torch.equal(plain.encode_text([LONG]).tokens, plain.encode_text([tokens_cut(plain, LONG)]).tokens)


def tokens_cut(model: Any, text: str) -> str:
    """The text without what is beyond the first chunk."""
    words = text.split()
    while model.count_tokens(" ".join(words)) > 75:
        words.pop()
    rest = text.split()[len(words) :]
    assert model.count_tokens(" ".join(words)) == 75 or rest
    return " ".join([*words, *rest[:1]]) if model.count_tokens(" ".join(words)) < 75 else " ".join(words)


@every_base
@torch.no_grad()
def test_captions_of_unlike_lengths_do_not_see_what_fills_them_up(name: str, opened):
    model = opened(name, chunks=2)
    both = model.encode_text([SHORT, LONG])
    alone = [model.encode_text([caption]) for caption in (SHORT, LONG)]
    assert both.mask is not None and both.mask.sum(1).tolist() == [77, 154]
    stacked = Conditioning.stack([{key: part[0] for key, part in one.text().items()} for one in alone])
    assert stacked.mask is not None and torch.equal(stacked.mask, both.mask)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])

    def predicted(told: Conditioning, rows: slice) -> Tensor:
        frame = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(len(told.tokens), -1)
        return model.denoise(x[rows], t[rows], replace(told, frame=frame))

    apart = torch.cat([predicted(alone[0], slice(0, 1)), predicted(alone[1], slice(1, 2))])
    torch.testing.assert_close(predicted(both, slice(0, 2)), apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predicted(stacked, slice(0, 2)), apart, rtol=1e-4, atol=1e-5)


def test_an_encoder_that_learns_gives_all_captions_as_many_rows_as_there_may_be(opened):
    model = opened("sd1", chunks=2)
    model.raw("text_encoder").train()
    told = model.encode_text([SHORT])
    assert told.tokens.shape[1] == 154 and told.mask is not None and told.mask.sum().item() == 77


@every_base
@torch.no_grad()
def test_an_empty_caption_is_what_is_stated(name: str, opened):
    for empty in ("zeros", "encode"):
        model = opened(name, empty_caption=empty)
        told, away = model.encode_text(["", SHORT]), model.guided(SHORT, Sampling())
        assert bool((told.tokens[0] == 0).all()) == (empty == "zeros") and (told.tokens[1] != 0).any()
        assert bool((away["negative_prompt_embeds"] == 0).all()) == (empty == "zeros")
        assert told.pooled is None or bool((told.pooled[0] == 0).all()) == (empty == "zeros")
    assert bool((opened(name).encode_text([""]).tokens == 0).all()) == (name == "sdxl")


@every_base
def test_options_of_text_are_in_its_fingerprint(name: str, opened):
    default = {"sdxl": "zeros"}.get(name, "encode")
    other = {"zeros": "encode", "encode": "zeros"}[default]
    options = [{}, {"clip_skip": 1}, {"clip_skip": 2}, {"chunks": 2}, {"chunks": 3}, {"empty_caption": other}]
    models = [opened(name, **given) for given in options]
    for component in models[0].text_encoders:
        assert len({model.fingerprint(component) for model in models}) == len(options)
    assert len({model.fingerprint("vae") for model in models}) == 1
    same = opened(name, clip_skip=0, chunks=1, empty_caption=default)
    assert same.fingerprint("text_encoder") == models[0].fingerprint("text_encoder")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (cat) sat", [("a ", 1.0), ("cat", 1.1), (" sat", 1.0)]),
        ("a (red cat:1.3)", [("a ", 1.0), ("red cat", 1.3)]),
        ("((a) b)", [("a", 1.1 * 1.1), (" b", 1.1)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("([a]:2)", [("a", 2 / 1.1)]),
        (r"\(a\) \[b\] \\ c:2", [(r"(a) [b] \ c:2", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a: 0.5 )", [("a", 0.5)]),
        ("(cat:1.0)s", [("cats", 1.0)]),
        ("", []),
    ],
)
def test_weights_are_read_as_a1111_writes_them(prompt, expected):
    read = weighted(prompt)
    assert [text for text, _ in read] == [text for text, _ in expected]
    assert [weight for _, weight in read] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("prompt", ["(a", "a)", "[a", "a]", "(a]", ":)"])
def test_a_bracket_without_its_other_is_refused(prompt):
    with pytest.raises(ConfigError, match=r"write '\\.' for the character"):
        weighted(prompt)


@every_base
@torch.no_grad()
def test_weights_move_their_own_tokens_from_an_empty_text_on(name: str, opened):
    model = opened(name, empty_caption="encode")
    plain, once, heavy = (
        model.guided(f"the {cat} sat", Sampling()) for cat in ("red cat", "(red cat:1.0)", "(red cat:1.5)")
    )
    assert same(parts(plain), parts(once))
    empty = plain["negative_prompt_embeds"]
    expected = plain["prompt_embeds"].clone()
    before = model.count_tokens("the")
    own = slice(1 + before, 1 + before + model.count_tokens("red cat"))
    expected[:, own] = empty[:, own] + 1.5 * (expected[:, own] - empty[:, own])
    torch.testing.assert_close(heavy["prompt_embeds"], expected)
    outside = [i for i in range(77) if i not in range(own.start, own.stop)]
    assert torch.equal(heavy["prompt_embeds"][:, outside], plain["prompt_embeds"][:, outside])
    assert "pooled_prompt_embeds" not in plain or same(parts(heavy)[1:], parts(plain)[1:])


@every_base
def test_pictures_are_made_of_long_and_weighed_prompts(name: str, opened):
    model = opened(name)
    sampling = Sampling(width=64, height=64, steps=2, guidance=3.0, negative_prompt="blue")
    tail = LONG + " dog"
    made = [np.asarray(p) for p in model.sample([LONG, tail, f"({LONG}:1.5)"], [0, 0, 0], sampling)]
    assert not np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


@torch.no_grad()
def test_the_text_as_one_vector_is_of_its_end_though_words_were_added(pipelines, tmp_path: Path):
    """Old configs say that texts end with token 2, and transformers then takes the highest number for the end."""
    pipeline, _ = pipelines["sdxl"]
    folder = tmp_path / "old"
    pipeline.save_pretrained(folder)
    for component in ("text_encoder", "text_encoder_2"):
        config = folder / component / "config.json"
        end = pipeline.tokenizer.eos_token_id
        text = config.read_text()
        assert f'"eos_token_id": {end}' in text
        config.write_text(text.replace(f'"eos_token_id": {end}', '"eos_token_id": 2'))
    model: Any = BaseModel(base=str(folder)).open(CPU)
    right: Any = BaseModel(base=str(pipelines["sdxl"][1])).open(CPU)
    for each in (model, right):
        each.add_words({"<new>": 2})
        for component, table in each.word_tables.items():
            network = each.raw(component)
            old = network.get_submodule(table)
            wider = torch.nn.Embedding(old.num_embeddings + 9, old.embedding_dim)
            wider.weight.data = torch.cat([old.weight.data, old.weight.data[:9]])
            network.set_submodule(table, wider)
    assert model.raw("text_encoder_2").config.eos_token_id == 2  # what is saved says what it said
    told, expected = (each.encode_text(["the <new> cat"]) for each in (model, right))
    assert torch.equal(told.pooled, expected.pooled) and torch.equal(told.tokens, expected.tokens)


@every_base
def test_words_are_added_as_diffusers_does(name: str, opened, pipelines):
    model = opened(name)
    before = {component: len(model.tokenizers[component]) for component in model.text_encoders}
    added = model.add_words({"<new>": 3, "<other>": 1})
    for component in model.text_encoders:
        first = before[component]
        assert added[component] == {"<new>": [first, first + 1, first + 2], "<other>": [first + 3]}
        the = model.word_ids(component, "the")
        assert model.word_ids(component, "the <NEW> <other>the") == [*the, *range(first, first + 4), *the]
    assert model.count_tokens("the <new>") == 4
    with pytest.raises(ConfigError, match=r"'<new>' is a word of the base already"):
        model.add_words({"<new>": 1})
    with pytest.raises(ConfigError, match="'the' is a word of the base already"):
        model.add_words({"the": 1})
