"""Every method with its defaults, and adapters with what changes their arithmetic; the laws are about all of them."""

from dataclasses import fields
from typing import Any

from tuner.methods.boft import BOFT
from tuner.methods.ia3 import IA3
from tuner.methods.loha import LoHa
from tuner.methods.lokr import LoKr
from tuner.methods.lora import Lora
from tuner.methods.oft import OFT
from tuner.methods.textual_inversion import TextualInversion, Word
from tuner.plugins import Folder

METHODS = Folder("tuner.methods")
WORDS = {"thing": Word(init="thing", vectors=5), "picture": Word(init="picture", vectors=7)}
"""Of the toy's captions, letter by letter as before."""
NEEDED: dict[str, dict[str, Any]] = {"textual_inversion": {"tokens": WORDS}}
"""What has no default."""
ADAPTERS: dict[str, Any] = {
    "locon": Lora(rank=4, alpha=2.0, conv_rank=2, conv_alpha=3.0),
    "rslora": Lora(rank=4, conv_rank=2, rslora=True),
    "dora": Lora(rank=4, conv_rank=2, dora=True),
    "pissa": Lora(rank=4, alpha=2.0, conv_rank=2, init="pissa"),
    "lora with dropout": Lora(rank=4, conv_rank=2, dropout=0.3, text_encoder=True),
    "dora with dropout": Lora(rank=4, dora=True, dropout=0.3, targets=(r"\.to_",)),
    "lora+": Lora(rank=4, lora_plus=4.0, learning_rates={"to_q": 2e-3}),
    "loha of convolutions": LoHa(rank=3, alpha=2.0, conv_rank=2, text_encoder=True),
    "loha with cores": LoHa(rank=3, conv_rank=2, tucker=True),
    "lokr of low rank": LoKr(rank=1, alpha=2.0, conv_rank=1, factor=2),
    "lokr with cores": LoKr(rank=1, conv_rank=1, factor=2, tucker=True, decompose_both=True),
    "lokr, whole": LoKr(full_matrix=True, factor=4, text_encoder=True),
    "oft of convolutions": OFT(block_size=4, conv=True, rescale=True, text_encoder=True),
    "boft of convolutions": BOFT(block_size=2, conv=True, rescale=True, text_encoder=True),
    "ia3 of convolutions": IA3(conv=True, text_encoder=True),
    "words and a lora": TextualInversion(tokens=WORDS, embeddings_lr=3e-3, adapter=Lora(rank=4)),
    "words and a lora of all": TextualInversion(tokens=WORDS, adapter=Lora(rank=4, dropout=0.3, text_encoder=True)),
}


def every_method() -> dict[str, Any]:
    """All of them by what they are called."""
    made: dict[str, Any] = {}
    for name in METHODS.names():
        kind = METHODS.find(name)
        made[name] = kind(**NEEDED.get(name, {}))
        if "text_encoder" in {field.name for field in fields(kind)}:
            made[f"{name} with text encoder"] = kind(text_encoder=True)
    return made | ADAPTERS
