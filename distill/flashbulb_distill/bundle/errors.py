"""Errors of student bundles.

BundleError (UsageError)    a bundle that must not be used: missing, damaged, or of another schema
"""

from ..errors import UsageError


class BundleError(UsageError):
    """Say in one line which bundle was refused, what was expected, what was found and what to do."""
