"""Errors of student bundles.

BundleError (ValueError)    a bundle that must not be used: missing, damaged, or of another schema
"""


class BundleError(ValueError):
    """Say in one line which bundle was refused, what was expected, what was found and what to do."""
