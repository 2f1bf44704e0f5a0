"""Frozen dataclasses to TOML: the resolved config that a run keeps beside its results."""

from typing import Any

import tomli_w

from tuner.plugins import write


def to_toml(config: Any) -> str:
    """`config`, with every default written out, as TOML that `tuner.config.loader.load` reads to an equal value.

    Fields that are None are left out, which is why a field that may be None has to have None as its default.
    """
    return tomli_w.dumps(write(config))
