"""New words: what they begin as, what moves and what cannot, when they rest, and what is refused."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests import toy
from tests.tuner.methods.variations import WORDS
from tuner.errors import ConfigError
from tuner.methods.lora import Lora
from tuner.methods.textual_inversion import TextualInversion, Word, WordsTrainable
from tuner.optim.adamw import AdamW
from tuner.plugins import read, write

LETTERS = {letter: ord(letter) for letter in "things"}


def attach(**options: Any) -> tuple[toy.ToyModel, WordsTrainable]:
    model = toy.ToyModel()
    return model, TextualInversion(**{"tokens": WORDS, **options}).attach(model, seed=0)


def table(model: toy.ToyModel) -> torch.Tensor:
    """The base's vectors."""
    network: Any = model.networks["text_encoder"]
    embedding = network.embedding
    return getattr(embedding, "base", embedding).weight.detach()


@pytest.mark.parametrize(
    ("init", "vectors", "pieces"),
    [
        ("thing", 5, ["t", "h", "i", "n", "g"]),
        ("thing", 7, ["t", "h", "i", "n", "g", "t", "h"]),
        ("thing", 1, ["thing"]),
        ("thing", 2, ["thi", "ng"]),
        ("t", 3, ["t", "t", "t"]),
    ],
)
def test_a_word_begins_as_the_words_it_is_said_to(init, vectors, pieces):
    model, trainable = attach(tokens={"<new>": Word(init=init, vectors=vectors)})
    expected = torch.stack([table(model)[[LETTERS[letter] for letter in piece]].mean(0) for piece in pieces])
    assert torch.equal(trainable.words()["<new>"]["text_encoder"], expected)


def test_a_word_without_a_beginning_is_drawn_like_one_of_the_bases():
    model, trainable = attach(tokens={"<new>": Word(vectors=4000), "<other>": Word(vectors=4000)})
    drawn, other = (word["text_encoder"] for word in trainable.words().values())
    assert not torch.equal(drawn, other)
    assert torch.allclose(drawn.mean(0), table(model).mean(0), atol=0.1)
    assert torch.allclose(drawn.std(0), table(model).std(0), rtol=0.1)
    assert not (torch.cdist(drawn[:9], table(model)) == 0).any()


def test_words_begin_as_the_base_has_them_not_as_each_other():
    _, trainable = attach(tokens={"thing": Word(init="g"), "<new>": Word(init="thing", vectors=5)})
    words = trainable.words()
    assert torch.equal(words["thing"]["text_encoder"][0], words["<new>"]["text_encoder"][4])


def test_no_row_of_the_base_moves_and_nothing_decays_but_the_adapter():
    model, trainable = attach(adapter=Lora(rank=2))
    before, fresh = table(model).clone(), trainable.words()
    groups = AdamW(lr=1e-2, weight_decay=0.9).build(trainable.groups).param_groups
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("text_encoder", 0.0), ("unet", 0.9)]
    toy.train(toy.trainer(model, trainable, optimizer=AdamW(lr=1e-2, weight_decay=0.9)), 3)
    assert torch.equal(table(model), before)
    assert all(not torch.equal(fresh[w]["text_encoder"], now["text_encoder"]) for w, now in trainable.words().items())


def test_a_word_that_no_caption_says_stays_as_it_was():
    model, trainable = attach(tokens={**WORDS, "<unsaid>": Word(init="u", vectors=2)})
    fresh = trainable.words()["<unsaid>"]["text_encoder"]
    toy.train(toy.trainer(model, trainable, optimizer=AdamW(lr=1e-2, weight_decay=0.9)), 3)
    assert torch.equal(trainable.words()["<unsaid>"]["text_encoder"], fresh)


def test_a_checkpoint_holds_the_new_rows_alone():
    _, trainable = attach()
    assert {name: tuple(p.shape) for name, p in trainable.state().items()} == {
        "text_encoder.text_model.embedding.vectors": (12, 6)
    }
    assert trainable.rows == {"thing": slice(0, 5), "picture": slice(5, 12)}


def test_words_learn_at_their_own_rate():
    _, trainable = attach(embeddings_lr=3e-3, adapter=Lora(rank=2))
    assert {group.name: group.peak(1e-4) for group in trainable.groups} == {"text_encoder": 3e-3, "unet": 1e-4}
    _, trainable = attach(adapter=Lora(rank=2, text_encoder=True, text_encoder_lr=1e-5))
    assert [group.peak(1e-4) for group in trainable.groups] == [1e-4, 1e-4, 1e-5]


def test_words_rest_after_their_share_of_the_run_and_a_resumed_run_does_alike():
    def begin() -> Any:
        model, trainable = attach(embeddings_until=0.5, adapter=Lora(rank=2))
        return toy.trainer(model, trainable, samples=6 * 8, optimizer=AdamW(lr=1e-2, weight_decay=0.5))

    def words(trainer: Any) -> torch.Tensor:
        return trainer.trainable.tables["text_encoder"].vectors.detach().clone()

    trainer = begin()
    seen, adapters = [words(trainer)], []
    for _ in range(6):
        toy.train(trainer, 1)
        seen.append(words(trainer))
        adapters.append(copy.deepcopy(dict(trainer.trainable.adapter.state())))
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, True, True, False, False, False]
    learned = [a[name] for a in adapters for name in a if name.endswith("0.to_k.lora_B.weight")]
    assert all(not torch.equal(a, b) for a, b in pairwise(learned))

    first, second = begin(), begin()
    toy.train(first, 4)
    second.load_state(first.samples_seen, *copy.deepcopy((dict(first.trainable.state()), first.optimizer.state_dict())))
    toy.train(second, 2)
    for name, tensor in second.trainable.state().items():
        assert torch.equal(tensor, trainer.trainable.state()[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": {}}, "tokens must hold at least one word"),
        ({"tokens": {"a cat": {}}}, "'a cat' must be one word of small letters, digits and"),
        ({"tokens": {"a.cat": {}}}, "must be one word"),
        ({"tokens": {"(cat)": {}}}, "must be one word"),
        ({"tokens": {"<>": {}}}, "must be one word"),
        ({"tokens": {"": {}}}, "must be one word"),
        ({"tokens": {"<cat>": {"vectors": 0}}}, "vectors must be at least 1, got 0"),
        ({"tokens": {"<Cat>": {}}}, "'<Cat>' must be one word of small letters"),
        ({"tokens": {"ohwx": {}, "an-ohwx": {}}}, "'ohwx' is a part of another"),
        ({"tokens": {"<cat>": {"vectors": 2}, "<cat>_1": {}}}, "'<cat>' is a part of another"),
        ({"tokens": {"<cat>": {}, "*cat*": {}}}, "would have the same file"),
        ({"tokens": {"<cat>": {"begin": "cat"}}}, "Unexpected|unknown|not permitted|extra"),
        ({"tokens": {"<cat>": {}}, "embeddings_lr": 0.0}, "embeddings_lr must be positive"),
        ({"tokens": {"<cat>": {}}, "embeddings_until": 0.0}, r"embeddings_until must lie in \(0, 1\]"),
        ({"tokens": {"<cat>": {}}, "embeddings_until": 0.5}, "leaves nothing to learn without an adapter"),
        ({"tokens": {"<cat>": {}}, "adapter": {"type": "full"}}, "no 'full' here"),
        ({"tokens": {"<cat>": {}}, "adapter": {"type": "textual_inversion"}}, "no 'textual_inversion' here"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        read(TextualInversion, options)


def test_it_is_written_as_it_is_read():
    table = {"tokens": {"<cat>": {"init": "cat", "vectors": 2}, "*dog*": {}}, "adapter": {"type": "lora", "rank": 3}}
    method = read(TextualInversion, table)
    assert read(TextualInversion, write(method)) == method
    assert method.tokens == {"<cat>": Word(init="cat", vectors=2), "*dog*": Word()}
    assert method.adapter == Lora(rank=3)
    assert read(TextualInversion, {**table, "adapter": {}}).adapter == Lora()


def test_a_model_that_takes_no_words_is_refused():
    model: Any = toy.ToyModel()
    model.word_tables = {}
    with pytest.raises(ConfigError, match="take no new words"):
        TextualInversion(tokens=WORDS).attach(model, seed=0)


def test_a_beginning_that_holds_nothing_is_refused():
    model: Any = toy.ToyModel()
    model.word_ids = lambda component, text: []
    with pytest.raises(ConfigError, match=r"method.tokens.thing.init: 'thing' holds no word"):
        TextualInversion(tokens=WORDS).attach(model, seed=0)
