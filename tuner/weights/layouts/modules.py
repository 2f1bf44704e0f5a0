"""What files of adapters call the modules of a network: three dialects, and every spelling of them that is in use.

| dialect   | `unet.down_blocks.0.….to_q`             | `text_encoder.text_model.….q_proj`              |
|-----------|-----------------------------------------|-------------------------------------------------|
| diffusers | the same, or without `unet.`            | the same, or without `text_model.`              |
| kohya     | `lora_unet_down_blocks_0_…_to_q`        | `lora_te_text_model_…_q_proj`; `lora_te1_…` and |
|           |                                         | `lora_te2_…` where there are two encoders       |
| comfy     | `diffusion_model.input_blocks.1.….to_q` | `text_encoders.clip_l.transformer.text_model.…` |

kohya's have `_` for `.`, so that a name alone does not say which module it is. Nothing is guessed: a spelling is looked
up among those of the modules that the network has. For Stable Diffusion XL kohya and comfy spell a UNet's names as they
are in single files; kohya's readers know both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from tuner.errors import DataError
from tuner.weights.layouts.diffusers import canonical

Dialect = Literal["kohya", "diffusers", "comfy"]

KOHYA = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_", "lora_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
"""What kohya's names of a component's modules start with."""
COMFY = {
    "unet": "diffusion_model.",
    "transformer": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
SINGLE_FILE = "model.diffusion_model."
PEFT = "base_model.model."
"""What peft's own files put before every name."""


@dataclass(frozen=True)
class Modules:
    """The modules of one network, changed or not, by canonical name."""

    names: Iterable[str]
    """Such as `unet.conv_in`."""
    single_file: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the denoiser's modules are called in a single file, without `model.diffusion_model.`, by canonical name."""

    @staticmethod
    def of_tensors(tensors: Iterable[str], single_file: Mapping[str, str] | None = None) -> "Modules":
        """The modules that have tensors of these canonical names."""
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        return Modules(tuple(names), single_file or {})

    @cached_property
    def _by_spelling(self) -> Mapping[str, str | None]:
        """The module of every spelling; None where it could be several."""
        index: dict[str, str | None] = {}
        for module in self.names:
            for spelling in self._spellings(module):
                index[spelling] = module if index.setdefault(spelling, module) == module else None
        return index | {module: module for module in self.names}

    @cached_property
    def two_encoders(self) -> bool:
        """Whether the network has more than one text encoder."""
        return any(name.startswith("text_encoder_2.") for name in self.names)

    def _spellings(self, module: str) -> list[str]:
        component, _, path = module.partition(".")
        if component not in KOHYA:  # a network by itself
            return [module, f"lycoris_{module.replace('.', '_')}"]
        paths = [path, path.removeprefix("text_model.")]
        if module in self.single_file:
            paths.append(self.single_file[module])
        prefixes = KOHYA[component]
        found: list[str] = []
        for each in dict.fromkeys(paths):
            underscored = each.replace(".", "_")
            found += [f"{component}.{each}", each, f"lycoris_{underscored}", COMFY.get(component, "") + each]
            found += [prefix + underscored for prefix in (*prefixes, *(p.replace("lora_", "oft_") for p in prefixes))]
        if module in self.single_file:
            found.append(SINGLE_FILE + self.single_file[module])
        return found

    def find(self, spelling: str) -> str | None:
        """The module that `spelling` means; None when there is none.

        Raises:
            DataError: it could be several.
        """
        spelling = spelling.removeprefix(PEFT)
        found = self._by_spelling.get(spelling, "")
        if found is None:
            raise DataError(f"{spelling!r}: could be several modules of this network")
        return found or None

    def spell(self, module: str, dialect: Dialect) -> str:
        """What `module` is called in `dialect`.

        Raises:
            DataError: the dialect has no word for it.
        """
        component, _, path = module.partition(".")
        single = self.single_file.get(module)
        match dialect:
            case "diffusers":
                return module
            case "kohya" if component in KOHYA:
                prefix = KOHYA[component][-1 if self.two_encoders else 0]
                if component in ("unet", "transformer"):
                    prefix = KOHYA[component][0]
                    path = single if single is not None and self.two_encoders else path
                name = prefix + path.replace(".", "_")
                if self.find(name) != module:
                    raise DataError(f"{module!r} and another module are both {name!r} in kohya's names")
                return name
            case "comfy" if component in COMFY:
                if component in ("unet", "transformer") and single is None:
                    raise DataError(
                        f"{module!r}: what it is called in a single file is not known; choose kohya's names"
                    )
                return COMFY[component] + (path if single is None else single)
            case _:
                raise DataError(f"{module!r}: the {dialect} dialect has no word for it")


def unresolved(spelling: str) -> str:
    """A module's name while its network is not known: its spelling, with the older ways put right."""
    spelling = spelling.removeprefix(PEFT)
    component, dot, path = spelling.partition(".")
    return canonical(component, path) if dot and component.startswith("text_encoder") else spelling
