"""The model card: a README.md that the Hub shows, and that any Markdown viewer does.

Prompts and titles are anybody's text. In the front matter they are YAML, written and quoted by a YAML library; in the
body every character that Markdown or HTML could take for markup stands as a numeric entity, or the text is a literal in
a block of code. So no text is ever anything but itself.
"""

import json
import string
from collections.abc import Mapping

import yaml

from tuner.errors import ConfigError, did_you_mean
from tuner.publish.provenance import LOCAL, Provenance
from tuner.weights.embeddings import keys

LICENSES = (
    *("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "unlicense"),
    *("cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0"),
    *("cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    *("cc-by-nc-sa-4.0", "agpl-3.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "bsd-2-clause", "bsd-3-clause", "mpl-2.0"),
    *("ofl-1.1", "other", "unknown"),
)
"""The Hub's names of licences."""

ADAPTERS = {"lora": "A LoRA", "loha": "A LoHa", "lokr": "A LoKr", "oft": "An OFT", "boft": "A BOFT", "ia3": "An (IA)³"}
"""What methods that leave the base's weights as they are make."""
OLDER = ("ddpm", "latent-diffusion")
"""How architectures begin of which no pipeline reads adapters; those of the first word are told no text."""
IN_PEFT = ("loha", "lokr", "ia3")
"""Those of which there are folders for peft."""
PURPOSES = {"mask": "inpainting", "depth": "depth-to-image", "picture": "instruct-pix2pix"}
"""What a model is for that is told a picture besides the prompt."""
RESCALING = (
    *("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    *("StableDiffusionXLInpaintPipeline", "StableDiffusionXLInstructPix2PixPipeline"),
)
"""Those of the families' stock pipelines that can take back guidance's contrast."""
SHOWN = 300
"""Characters of a text that the body shows."""
KEPT = 1000
"""Characters of a text that the front matter keeps."""


def check_license(name: str) -> None:
    """Refuse what is not a licence that the Hub knows.

    Raises:
        ConfigError: it is not; the message says the nearest.
    """
    if name not in LICENSES:
        hint = did_you_mean(name, list(LICENSES))
        raise ConfigError(f"license: no {name!r}{hint}; use one of the Hub's names, such as 'apache-2.0', or 'other'")


def write(provenance: Provenance) -> str:
    """The card of a release, whose pictures lie where `provenance` says."""
    front = yaml.dump(front_matter(provenance), Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=1 << 30)
    return f"---\n{front}---\n\n{body(provenance)}"


def front_matter(provenance: Provenance) -> dict[str, object]:
    """What the Hub reads."""
    older = provenance.architecture.startswith(OLDER)
    lora = ("lora",) if older else ("lora", "template:sd-lora")
    task = "image-to-image" if _told_a_picture(provenance) else "text-to-image"
    task = "unconditional-image-generation" if provenance.architecture.startswith("ddpm") else task
    entries: dict[str, object | None] = {
        "base_model": None if provenance.base == LOCAL else provenance.base,
        "library_name": "diffusers",
        "license": provenance.license,
        "pipeline_tag": task,
        "tags": [
            *(task, "diffusers", "diffusers-training", *(() if older else ("stable-diffusion",))),
            *((PURPOSES[provenance.guide],) if provenance.guide else ()),
            *(lora if provenance.method == "lora" else ()),
            *(("textual_inversion",) if provenance.tokens else ()),
            *(tag[:SHOWN] for tag in provenance.tags),
        ],
        "instance_prompt": provenance.trigger and provenance.trigger[:KEPT],
        "widget": [{"text": picture.prompt[:KEPT], "output": {"url": picture.file}} for picture in provenance.pictures],
    }
    return {key: value for key, value in entries.items() if value}


def body(provenance: Provenance) -> str:
    """The card below its front matter, in Markdown."""
    parts = [f"# {plain(provenance.title or provenance.name)}\n"]
    if provenance.pictures:
        parts.append("<Gallery />\n")
    kind = f"{ADAPTERS[provenance.method]} for" if provenance.method in ADAPTERS else "A fine-tune of"
    if provenance.tokens:
        kind = f"{ADAPTERS[provenance.method]} and new words for" if provenance.method in ADAPTERS else "New words for"
    purpose = f", for {PURPOSES[provenance.guide]}" if provenance.guide else ""
    about = f"`{provenance.architecture}`, {provenance.prediction} prediction{purpose}"
    parts.append(f"{kind} {_base(provenance)} ({about}).\n")
    for text in (provenance.description, provenance.usage_hint, provenance.author and f"By {provenance.author}."):
        if text:
            parts.append(f"{plain(text)}\n")
    if provenance.grid:
        parts.append(f"![samples]({provenance.grid})\n")
    if provenance.trigger:
        parts.append(f"## Trigger\n\nUse **{plain(provenance.trigger)}** in the prompt.\n")
    if provenance.tokens:
        parts.append(_table("Words", {token: f"embeddings/{file}" for token, file in provenance.tokens.items()}))
    parts.append(_usage(provenance))
    parts.append(_table("Training", _facts(provenance)))
    if provenance.settings:
        parts.append(_table("Settings", provenance.settings))
    if provenance.versions:
        parts.append(_table("Made with", provenance.versions))
    licence = f"`{provenance.license}`" if provenance.license else "not stated"
    parts.append(f"## Licence\n\nOf these weights: {licence}. The licence of the base model holds as well.\n")
    return "\n".join(parts)


def plain(text: str) -> str:
    """`text` in one line of Markdown that shows it and nothing else."""
    short = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in short).split())
    return "".join(f"&#{ord(letter)};" if letter in string.punctuation else letter for letter in line)


def literal(text: str) -> str:
    """`text` as a string of Python that can stand in a block of code."""
    short = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
    safe = "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in short)
    return json.dumps(safe, ensure_ascii=False).replace("`", "\\x60").replace("<", "\\x3c")


def _base(provenance: Provenance) -> str:
    if provenance.base == LOCAL:
        return "a model without a public name"
    if "/" in provenance.base:
        return f"[{provenance.base}](https://huggingface.co/{provenance.base})"
    return f"`{provenance.base}`"


def _usage(provenance: Provenance) -> str:
    prompt = next((picture.prompt for picture in provenance.pictures), provenance.trigger or "a picture")
    name = provenance.name
    public = "/" in provenance.base and provenance.base != LOCAL
    base = json.dumps(provenance.base) if public else '"path/to/the/base/model"'
    picture = _told_a_picture(provenance)
    pipeline = provenance.pipeline if picture else "DiffusionPipeline"  # which finds the base's own
    method, imports = provenance.method, f"from diffusers import {pipeline}\n"
    if picture:
        imports += "from diffusers.utils import load_image\n"
    open_base = f"pipeline = {pipeline}.from_pretrained({base})\n"
    if provenance.own_schedule and method != "full":
        imports = imports.replace("import ", "import DDIMScheduler, ", 1)
        open_base += _schedule(provenance)
    if method == "lora":
        load = f'pipeline.load_lora_weights("path/or/repository/of/this", weight_name="{name}-diffusers.safetensors")\n'
        load = open_base + load
    elif method in IN_PEFT:
        imports = f"from pathlib import Path\n\n{imports}from peft import PeftModel\n"
        load = (
            f'{open_base}for part in Path("path/of/this/peft").iterdir():\n'
            "    setattr(pipeline, part.name, PeftModel.from_pretrained(getattr(pipeline, part.name), part))\n"
        )
    elif provenance.tokens:
        load = open_base
    else:
        load = f'pipeline = {pipeline}.from_pretrained("path/or/repository/of/this")\n'
    if provenance.tokens:
        more, words = _words(provenance)
        imports, load = imports + more, load + words
    told = ", ".join([literal(prompt), *_told(provenance)])
    if provenance.architecture.startswith("ddpm"):
        told = ""
    code = f"```python\n{imports}\n{load}image = pipeline({told}).images[0]\n```\n"
    if provenance.architecture == "ddpm-class":
        code = f"```python\n{imports}\n{load}```\n\nIts U-Net is told a class, `class_labels`; pipelines tell none.\n"
    if provenance.architecture.startswith(OLDER) and method in ADAPTERS:
        return (
            "## How to use\n\nNo program reads adapters of this family; bake it into the base's weights first: "
            f"`tuner merge add path/to/the/base {name}.safetensors to=folder`.\n"
        )
    if method in ("oft", "boft"):
        code = f"diffusers: it reads no {method.upper()}; bake it into the base's weights first (`tuner merge`).\n"
    a1111 = f"put `{name}.safetensors` into `models/Lora` and write `<lora:{name}:1>` into the prompt.\n"
    comfy = "put it into `models/loras` and use the node *Load LoRA*.\n"
    if method == "ia3":
        comfy = "it reads no (IA)³; bake it into the base's weights first (`tuner merge`).\n"
    programs = f"\nA1111 and Forge: {a1111}ComfyUI: {comfy}" if method in ADAPTERS else ""
    if provenance.tokens:
        programs += _words_elsewhere(provenance)
    return f"## How to use\n\n{code}{programs}"


def _told_a_picture(provenance: Provenance) -> bool:
    return provenance.guide is not None or "Img2Img" in provenance.pipeline


def _told(provenance: Provenance) -> list[str]:
    """What a pipeline has to be told besides the prompt."""
    told = ['image=load_image("picture.png")'] if _told_a_picture(provenance) else []
    if provenance.guide == "mask":
        told.append('mask_image=load_image("mask.png")')  # white is painted
    if provenance.zero_terminal_snr and provenance.pipeline in RESCALING:
        told.append("guidance_rescale=0.7")
    return told


def _schedule(provenance: Provenance) -> str:
    """The lines that give a base's pipeline the schedule that was trained on."""
    prediction = "v_prediction" if provenance.prediction == "v" else provenance.prediction
    said = [f'prediction_type="{prediction}"']
    if provenance.zero_terminal_snr:
        said += ["rescale_betas_zero_snr=True", 'timestep_spacing="trailing"']
    return f"pipeline.scheduler = DDIMScheduler.from_config(\n    pipeline.scheduler.config, {', '.join(said)}\n)\n"


def _words(provenance: Provenance) -> tuple[str, str]:
    """The imports and the lines that teach a stock pipeline the words."""
    names = keys(provenance.architecture)
    if provenance.architecture.startswith("stable-diffusion-3"):
        return "", "# its pipeline of Stable Diffusion 3 reads no new words\n"
    if [*names] == ["text_encoder"]:
        return "", "".join(
            f"pipeline.load_textual_inversion({json.dumps(f'path/of/this/embeddings/{file}')}, "
            f"token={json.dumps(token)})\n"
            for token, file in provenance.tokens.items()
        )
    lines = ""
    for token, file in provenance.tokens.items():
        lines += f"word = load_file({json.dumps(f'path/of/this/embeddings/{file}')})\n"
        for component, key in names.items():
            tokenizer = component.replace("text_encoder", "tokenizer")
            lines += (
                f'pipeline.load_textual_inversion(\n    word["{key}"], token={json.dumps(token)},\n    '
                f"text_encoder=pipeline.{component}, tokenizer=pipeline.{tokenizer},\n)\n"
            )
    return "from safetensors.torch import load_file\n", lines


def _words_elsewhere(provenance: Provenance) -> str:
    """What other programs do with the words; they call a word by its file's name."""
    called = ", ".join(f"`{file.removesuffix('.safetensors')}`" for file in provenance.tokens.values())
    comfy = ", ".join(f"`embedding:{file.removesuffix('.safetensors')}`" for file in provenance.tokens.values())
    text = (
        f"\nThe words in A1111 and Forge: put the files of `embeddings` into `embeddings`, and write {called} where "
        f"the words stand. In ComfyUI: put them into `models/embeddings`, and write {comfy}.\n"
    )
    if provenance.method in ADAPTERS:
        text += (
            f"\nA1111 and Forge read both from one file, too: put `{provenance.name}-bundle.safetensors` into "
            f"`models/Lora`, write `<lora:{provenance.name}-bundle:1>` into the prompt, and the words as they are.\n"
        )
    return text


def _facts(provenance: Provenance) -> Mapping[str, object]:
    facts = {
        "pictures": provenance.images,
        "samples seen": provenance.samples,
        "updates": provenance.updates,
        "resolution": provenance.resolution,
        "optimizer": provenance.optimizer,
        "learning rate": provenance.learning_rate,
        "seed": provenance.seed,
        "date": provenance.date,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _table(title: str, rows: Mapping[str, object]) -> str:
    lines = "".join(f"| {plain(key)} | {plain(str(value))} |\n" for key, value in rows.items())
    return f"## {title}\n\n| | |\n|---|---|\n{lines}"


class _Dumper(yaml.SafeDumper):
    """Texts of several lines in quotes and on one line, so that none begins with `---`."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = '"' if any(not letter.isprintable() for letter in value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
