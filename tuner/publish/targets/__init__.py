"""Where a release goes: one module each, chosen by `type`."""
