"""What can go wrong in an evaluation.

EvaluationError (a ValueError)
├── ReferenceDataError     also a UsageError: the folder of real pictures is missing, incomplete or inconsistent
└── GeneratedImagesError   the generator under test returned something else than the pictures asked for
"""

from flashbulb_distill.errors import UsageError


class EvaluationError(ValueError):
    """An evaluation cannot be carried out on what was given."""


class ReferenceDataError(EvaluationError, UsageError):
    """The folder of real pictures is missing, incomplete or inconsistent."""


class GeneratedImagesError(EvaluationError):
    """The generator under test returned something else than the pictures asked for."""
