"""What files of adapters call the modules of a network: three dialects, and every spelling of them that is in use.

| dialect   | `unet.down_blocks.0.….to_q`             | `text_encoder.text_model.….q_proj`              |
|-----------|-----------------------------------------|-------------------------------------------------|
| diffusers | the same, or without `unet.`            | the same, or without `text_model.`              |
| kohya     | `lora_unet_down_blocks_0_…_to_q`        | `lora_te_text_model_…_q_proj`; `lora_te1_…` and |
|           |                                         | `lora_te2_…` where there are more encoders      |
| comfy     | `diffusion_model.input_blocks.1.….to_q` | `text_encoders.clip_l.transformer.text_model.…` |

kohya's have `_` for `.`, so that a name alone does not say which module it is. Nothing is guessed: a spelling is looked
up among those of the modules that the network has. For Stable Diffusion XL, Stable Diffusion 3 and Flux kohya and comfy
spell a denoiser's names as they are in single files; kohya's readers know both for XL. T5, the encoder that is no CLIP,
is `lora_te3_…` and `text_encoders.t5xxl.transformer.…`, whichever encoder it is in diffusers.

A single file of Stable Diffusion 3 or Flux has one layer where diffusers has three or four: `…img_attn.qkv` holds the
rows of `to_q`, `to_k` and `to_v`. Such a layer is `whole`, and says whose rows it has.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Literal

from tuner.errors import DataError
from tuner.weights.architecture import identify
from tuner.weights.layouts import flux, ldm, sd3
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.layouts.peft import T5
from tuner.weights.store import TensorMeta

Dialect = Literal["kohya", "diffusers", "comfy"]

KOHYA = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_", "lora_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
    "bert": ("lora_te_",),
}
"""What kohya's names of a component's modules start with."""
COMFY = {
    "unet": "diffusion_model.",
    "transformer": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
    "bert": "text_encoders.bert.transformer.",
}
DENOISERS = ("unet", "transformer")
SINGLE_FILE = "model.diffusion_model."
PEFT = "base_model.model."
"""What peft's own files put before every name."""


@dataclass(frozen=True)
class Rows:
    """Rows of a module's weight, and of its bias."""

    module: str
    start: int
    stop: int


@dataclass(frozen=True)
class Modules:
    """The modules of one network, changed or not, by canonical name."""

    names: Iterable[str]
    """Such as `unet.conv_in`."""
    single_file: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the denoiser's modules are called in a single file, without `model.diffusion_model.`, by canonical name."""
    whole: Mapping[str, tuple[Rows, ...]] = field(default_factory=dict[str, tuple[Rows, ...]])
    """What the rows of a single file's modules are, in their order, where those are no module's as they are."""

    tensors: frozenset[str] = frozenset()
    """The network's, where they are known: not every layer has a bias."""

    @cached_property
    def parts(self) -> Mapping[str, tuple[Rows, ...]]:
        """What is less than a single file's layer and yet several modules: attention in Flux' blocks of one stream."""
        return {
            original.removesuffix("linear1") + "qkv": rows[:3]
            for original, rows in self.whole.items()
            if original.endswith(".linear1") and len(rows) == 4
        }

    def rows(self, name: str) -> tuple[Rows, ...] | None:
        """Whose rows a layer of `whole` or `parts` has; None of a module."""
        return self.whole.get(name) or self.parts.get(name)

    @staticmethod
    def of_tensors(tensors: Iterable[str], single_file: Mapping[str, str] | None = None) -> "Modules":
        """The modules that have tensors of these canonical names."""
        known = dict.fromkeys(tensors)
        names = dict.fromkeys(name.rpartition(".")[0] for name in known)
        return Modules(tuple(names), single_file or {}, tensors=frozenset(known))

    @staticmethod
    def of_network(metas: Mapping[str, TensorMeta]) -> "Modules":
        """The modules of the network whose tensors have these canonical names and shapes.

        Raises:
            DataError: a name that its family does not have.
        """
        modules = Modules.of_tensors(metas)
        family = identify(metas).family
        if family in ldm.FAMILIES and any(name.startswith("unet.") for name in metas):
            return replace(modules, single_file=ldm.single_file_modules(metas))
        if family not in ("sd3", "flux"):
            return modules
        single, whole = _transformer(flux if family == "flux" else sd3, metas)
        return replace(modules, single_file=single, whole=whole)

    @cached_property
    def _by_spelling(self) -> Mapping[str, str | None]:
        """The module of every spelling, or the whole layer; None where it could be several."""
        index: dict[str, str | None] = {}
        for name, spellings in (
            *((module, self._spellings(module)) for module in self.names),
            *((original, self._whole_spellings(original)) for original in self.whole),
            *((part, [part]) for part in self.parts),
        ):
            for spelling in spellings:
                index[spelling] = name if index.setdefault(spelling, name) == name else None
        return index | {module: module for module in self.names}

    @cached_property
    def numbered_encoders(self) -> bool:
        """Whether kohya's names number the text encoders, as they do where the network can have several."""
        several = ("text_encoder_2.", "transformer.", "unet.add_embedding.")
        return any(name.startswith(several) for name in self.names)

    def _spellings(self, module: str) -> list[str]:
        component, _, path = module.partition(".")
        if component not in KOHYA:  # a network by itself
            return [module, f"lycoris_{module.replace('.', '_')}"]
        paths = [path, path.removeprefix("text_model.")]
        if module in self.single_file:
            paths.append(self.single_file[module])
        prefixes = {*KOHYA[component], *KOHYA[_encoder(component, path)]}
        comfy = COMFY[_encoder(component, path)]
        found: list[str] = []
        for each in dict.fromkeys(paths):
            underscored = each.replace(".", "_")
            found += [f"{component}.{each}", each, f"lycoris_{underscored}", comfy + each]
            found += [prefix + underscored for prefix in (*prefixes, *(p.replace("lora_", "oft_") for p in prefixes))]
        if module in self.single_file:
            single = self.single_file[module]
            found.append(SINGLE_FILE + single)
            if flux.SCALE.fullmatch(single):
                found += [f"{single}.scale", f"{COMFY[component]}{single}.scale"]
        return found

    def _whole_spellings(self, original: str) -> list[str]:
        underscored = original.replace(".", "_")
        kohya = [prefix + underscored for prefix in ("lora_unet_", "oft_unet_", "lora_transformer_", "lycoris_")]
        return [original, *kohya, COMFY["transformer"] + original, SINGLE_FILE + original]

    def find(self, spelling: str) -> str | None:
        """The module that `spelling` means, or the layer of `whole`; None when there is none.

        Raises:
            DataError: it could be several.
        """
        spelling = spelling.removeprefix(PEFT)
        found = self._by_spelling.get(spelling, "")
        if found is None:
            raise DataError(f"{spelling!r}: could be several modules of this network")
        return found or None

    @cached_property
    def _wholes(self) -> Mapping[str, str]:
        """The layer of `whole` that has a module's rows."""
        return {rows.module: original for original, parts in self.whole.items() for rows in parts}

    def whole_of(self, module: str, dialect: Dialect) -> str | None:
        """The layer of `whole` that `dialect` says instead of `module`; None when it says the module itself."""
        return None if dialect == "diffusers" else self._wholes.get(module)

    def spell(self, module: str, dialect: Dialect) -> str:
        """What `module`, or a layer of `whole`, is called in `dialect`; a module's may be that of the layer it is in.

        Raises:
            DataError: the dialect has no word for it.
        """
        module = self.whole_of(module, dialect) or module
        component, _, path = module.partition(".")
        single = self.single_file.get(module)
        if module in self.whole:
            component, path, single = "transformer", module, module
        match dialect:
            case "diffusers":
                return module
            case "kohya" if component in KOHYA:
                prefix = KOHYA[_encoder(component, path)][-1 if self.numbered_encoders else 0]
                if component == "transformer" and single is None:
                    raise DataError(
                        f"{module!r}: what it is called in a single file is not known; give the LoRA's base"
                    )
                if component in DENOISERS:
                    prefix = KOHYA[component][0]
                    path = single if single is not None and self.numbered_encoders else path
                name = prefix + path.replace(".", "_")
                if self.find(name) != module:
                    raise DataError(f"{module!r} and another module are both {name!r} in kohya's names")
                return name
            case "comfy" if component in COMFY:
                if component in DENOISERS and single is None:
                    raise DataError(
                        f"{module!r}: what it is called in a single file is not known; give the LoRA's base"
                    )
                ending = ".scale" if component == "transformer" and flux.SCALE.fullmatch(single or "") else ""
                return COMFY[_encoder(component, path)] + (path if single is None else single) + ending
            case _:
                raise DataError(f"{module!r}: the {dialect} dialect has no word for it")


def unresolved(spelling: str) -> str:
    """A module's name while its network is not known: its spelling, with the older ways put right."""
    spelling = spelling.removeprefix(PEFT)
    component, dot, path = spelling.partition(".")
    return canonical(component, path) if dot and component.startswith("text_encoder") else spelling


def _encoder(component: str, path: str) -> str:
    """The component as kohya and comfy count them: T5 is the third encoder."""
    return "text_encoder_3" if component.startswith("text_encoder") and path.startswith(T5) else component


def _transformer(
    layout: ModuleType, metas: Mapping[str, TensorMeta]
) -> tuple[dict[str, str], dict[str, tuple[Rows, ...]]]:
    """What a transformer's modules are called in a single file: those that are there as they are, and the others."""
    prefix = "transformer."
    own = [name.removeprefix(prefix) for name in metas if name.startswith(prefix)]
    swapped = layout.swapped(own)
    single: dict[str, str] = {}
    whole: dict[str, tuple[Rows, ...]] = {}
    for original, parts in layout.modules(own).items():
        there = [part for part in parts if f"{prefix}{part}.weight" in metas]
        if not there:
            continue
        if len(there) < len(parts):
            lost = next(part for part in parts if part not in there)
            raise DataError(f"{prefix}{lost}: missing; in single files it is in one layer with {prefix}{there[0]}")
        rows = [metas[f"{prefix}{part}.weight"].shape[0] for part in parts]
        if parts[0] in swapped:
            name, half = prefix + parts[0], rows[0] // 2
            whole[original] = (Rows(name, half, 2 * half), Rows(name, 0, half))
        elif len(parts) > 1:
            whole[original] = tuple(Rows(prefix + part, 0, size) for part, size in zip(parts, rows, strict=True))
        else:
            single[prefix + parts[0]] = original
    return single, whole
