"""Configs: TOML files to frozen dataclasses and back, and the command line around them."""
