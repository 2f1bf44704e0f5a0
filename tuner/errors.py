"""Errors that a user can act on, shown as one line. Everything else is a bug and keeps its traceback.

A message names the place, the field, what was wrong, what was expected and what to do:
`my.toml:12: method.rnak: unknown key; did you mean 'rank'?`
"""


class UserError(Exception):
    """Something outside the program is not as it has to be; its class is the exit code."""

    exit_code = 2


class ConfigError(UserError):
    """A config file or an argument cannot be used; each line of the message starts with the value's place and path."""

    exit_code = 2


class DataError(UserError):
    """A picture, a caption or a model file is missing, damaged or not what it says it is."""

    exit_code = 3


class UnsafeError(UserError):
    """An input could execute code or reach outside its folder, and is refused."""

    exit_code = 4


class ResourceError(UserError):
    """The machine has too little disk, memory, file handles or rights."""

    exit_code = 5


class DivergedError(UserError):
    """The training produced a value that is not finite; nothing of it was saved."""

    exit_code = 6


class LockedError(UserError):
    """Another run is using the output folder."""

    exit_code = 7


class CheckpointError(UserError):
    """A checkpoint cannot be resumed from."""

    exit_code = 8


class PeerError(UserError):
    """Another process of the same run has failed."""

    exit_code = 9


def did_you_mean(name: str, known: list[str]) -> str:
    """`; did you mean 'rank'?` when one of `known` is close to `name`, else nothing."""
    import difflib  # here, so that importing the errors stays free

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
