"""The base model's tokenizer: one token a word, any text, the same every time."""

import pytest

pytest.importorskip("transformers")

from tuner.base import pictures, tokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_merges_do_not_depend_on_the_order_of_equal_pairs():
    assert tokenizer.merges_for(["cat", "car"])[:2] == [("c", "a"), ("ca", "r</w>")]
    assert tokenizer.merges_for(["car", "cat"]) == tokenizer.merges_for(["cat", "car"])


def test_each_word_of_each_caption_is_one_token(clip):
    for icons in pictures.objects().values():
        for icon in icons:
            text = pictures.caption(icon, "purple")
            ids = clip(text).input_ids
            assert len(ids) == len(text.replace("-", " ").split()) + 2
            assert clip.decode(ids, skip_special_tokens=True).strip() == text


def test_any_text_round_trips(clip):
    for text in ("a photo of sks robot, 3d!", "青い背景のロボット", "été 🍎"):
        ids = clip(text).input_ids
        assert clip.unk_token_id not in ids[1:-1]
        assert clip.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_sizes_and_special_tokens(clip):
    assert 800 <= len(clip) <= 1600
    assert (clip.bos_token_id, clip.eos_token_id) == (len(clip) - 2, len(clip) - 1)
    assert clip.pad_token_id == clip.unk_token_id == clip.eos_token_id
    padded = clip("cat", padding="max_length", truncation=True, max_length=clip.model_max_length).input_ids
    assert len(padded) == clip.model_max_length == tokenizer.LENGTH


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        tokenizer.write(tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()
