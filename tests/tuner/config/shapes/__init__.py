"""A folder of plugins for the tests of the config."""
