"""Student bundles: what the distiller writes and the service runs. Needs pydantic and the standard library only."""

from .bundle import (
    Bundle,
    Fingerprint,
    check_unchanged,
    describe_files,
    find_model,
    fingerprint,
    hash_file,
    list_models,
    open_bundle,
    write_manifest,
)
from .errors import BundleError
from .graphs import DISABLED_OPTIMIZERS
from .manifest import Betas, Components, File, Guidance, Latent, Manifest, Shape, Text, check_times

__all__ = [
    "DISABLED_OPTIMIZERS",
    "Betas",
    "Bundle",
    "BundleError",
    "Components",
    "File",
    "Fingerprint",
    "Guidance",
    "Latent",
    "Manifest",
    "Shape",
    "Text",
    "check_times",
    "check_unchanged",
    "describe_files",
    "find_model",
    "fingerprint",
    "hash_file",
    "list_models",
    "open_bundle",
    "write_manifest",
]
