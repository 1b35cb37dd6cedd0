"""What the distiller's commands raise for what they were given.

UsageError (ValueError)
└── MissingFileError    also a FileNotFoundError
"""


class UsageError(ValueError):
    """Say in one line what of a command's arguments, files or recipe cannot be used."""

    exit_code = 2  # of wrong usage: what starts a job again need not try this one


class MissingFileError(UsageError, FileNotFoundError):
    """Say in one line which file or folder that was named is not there, or not whole."""
