"""The models that can be asked for, read from the manifests of the model repository. Opens no model file."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashbulb_distill.bundle import Bundle, BundleError, Manifest, hash_file, list_models, open_bundle
from flashbulb_service.errors import BundleRejected, InvalidRequest, ModelUnloaded, UnknownModel

# Names that clients have built in.
OPENAI_NAMES = (
    "chatgpt-image-latest",
    "dall-e-2",
    "dall-e-3",
    "gpt-image-1",
    "gpt-image-1-mini",
    "gpt-image-1.5",
    "gpt-image-2",
    "gpt-image-2.5-flare",
    "gpt-image-2.5-sunburst",
)


@dataclass(frozen=True)
class Model:
    """A student that can be asked for."""

    name: str
    version: int
    bundle: Bundle

    @property
    def id(self) -> str:
        """Return name@version, the name that never changes its meaning."""
        return f"{self.name}@{self.version}"

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the offered (width, height) pairs; the first is the default."""
        return tuple((shape.width, shape.height) for shape in self.bundle.manifest.shapes)


def open_model(path: Path, name: str, version: int, *, verify: bool) -> Model:
    """Open one bundle.

    Raises:
        BundleRejected: it is missing, damaged, of another schema, or not the model its folder claims.
    """
    try:
        bundle = open_bundle(path, verify=verify)
    except BundleError as error:
        raise BundleRejected(str(error)) from error
    manifest = bundle.manifest
    if (manifest.name, manifest.version) != (name, version):
        raise BundleRejected(
            f"{path}: expected the manifest of {name}@{version} in this folder, "
            f"got {manifest.name}@{manifest.version}: move the bundle to <name>/<version>/"
        )
    return Model(name, version, bundle)


class Catalog:
    """The models of one repository, with their aliases and the default."""

    def __init__(
        self,
        models: Sequence[Model],
        *,
        default: str | None = None,
        aliases: Mapping[str, str] | None = None,
        openai_aliases: bool = False,
    ) -> None:
        """Keep the models; with `openai_aliases`, OpenAI's names mean the default where nothing has them.

        Raises:
            UnknownModel: the default or the target of an alias is not among them.
        """
        self.models = tuple(sorted(models, key=lambda model: (model.name, model.version)))
        self._given_aliases = self._aliases = dict(aliases or {})
        self.unloaded: frozenset[str] = frozenset()  # name@version, by an operator's word
        self._default = default
        self._openai_aliases = openai_aliases
        for target in (*self._aliases.values(), *([default] if default else [])):
            self._resolve(target)

    @classmethod
    def load(
        cls,
        models_dir: Path,
        *,
        verify: bool,
        default: str | None = None,
        aliases: Mapping[str, str] | None = None,
        openai_aliases: bool = False,
    ) -> "Catalog":
        """Read every bundle of a model repository.

        Raises:
            BundleRejected: there is no such folder, it holds no bundle, or one of them cannot be used.
        """
        try:
            found = list(list_models(models_dir))
        except BundleError as error:
            raise BundleRejected(str(error)) from error
        if not found:
            raise BundleRejected(
                f"expected bundles as {models_dir}/<name>/<version>/manifest.json, found none: "
                "pass the model repository with --models"
            )
        models = [open_model(path, name, version, verify=verify) for name, version, path in found]
        return cls(models, default=default, aliases=aliases, openai_aliases=openai_aliases)

    def refresh(self, models_dir: Path, is_served: Callable[[str, str], bool]) -> None:
        """Follow the repository: drop what is gone, and take what is new or replaced once a worker has it ready.

        A bundle that cannot be read is left out; the workers, which verify it, say why in their log.

        Args:
            is_served: (name@version, sha256 of its manifest) -> whether a worker draws with it.
        """
        known = {model.id: model for model in self.models}
        models = []
        for name, version, path in list_models(models_dir):
            model = known.get(f"{name}@{version}")
            with contextlib.suppress(BundleRejected, OSError):
                if model is None or hash_file(path / "manifest.json") != model.bundle.sha256:
                    found = open_model(path, name, version, verify=False)
                    model = found if is_served(found.id, found.bundle.sha256) else model
            if model is not None:
                models.append(model)
        self.models = tuple(sorted(models, key=lambda model: (model.name, model.version)))

    def follow(self, aliases: Mapping[str, str], unloaded: frozenset[str]) -> None:
        """Take what operators say: their aliases before those of the settings, and what is not served now."""
        self._aliases = {**self._given_aliases, **aliases}
        self.unloaded = unloaded

    @property
    def names(self) -> tuple[str, ...]:
        """Return what may be written as 'model': names, and names with a version."""
        return tuple(dict.fromkeys([m.name for m in self.models] + [m.id for m in self.models]))

    def find(self, wanted: str | None, *, unloaded_too: bool = False) -> Model:
        """Find a model by "name" (its newest version), "name@version" or alias; None is the default.

        Raises:
            UnknownModel: there is none of that name.
            ModelUnloaded: an operator has unloaded it, and `unloaded_too` is not set.
        """
        if wanted is None or wanted in self._openai_names():
            if self._default is None and not self.models:
                raise UnknownModel("default")
            if self._default is None:
                served = self.newest()
                if not served:
                    raise ModelUnloaded(self.models[0].id)
                return served[0]
            wanted = self._default
        return self._resolve(self._aliases.get(wanted, wanted), unloaded_too=unloaded_too)

    def newest(self) -> list[Model]:
        """Return the newest version of every name that is not unloaded."""
        return list({model.name: model for model in self.models if model.id not in self.unloaded}.values())

    def aliases_of(self, model: Model) -> tuple[str, ...]:
        """Return the other names that lead to a model."""
        names = (*self._aliases, *self._openai_names())
        return tuple(sorted(name for name in names if self._leads_to(name, model)))

    def _leads_to(self, name: str, model: Model) -> bool:
        try:
            return self.find(name).id == model.id
        except UnknownModel:  # its target has left the repository
            return False

    def _openai_names(self) -> frozenset[str]:
        taken = {model.name for model in self.models} | set(self._aliases)
        return frozenset(OPENAI_NAMES if self._openai_aliases else ()) - taken

    def _resolve(self, wanted: str, *, unloaded_too: bool = False) -> Model:
        matching = [model for model in self.models if wanted in (model.name, model.id)]
        if not matching:
            known = {model.name for model in self.models}
            leading = {alias for alias, target in self._aliases.items() if target in self.names}
            raise UnknownModel(wanted, sorted(known | leading))
        served = [model for model in matching if unloaded_too or model.id not in self.unloaded]
        if not served:
            raise ModelUnloaded(matching[-1].id)
        return served[-1]


def exporter_times(manifest: Manifest, backend: str) -> Mapping[int, float]:
    """Return batch size -> milliseconds as its exporter measured them on a backend; "auto": on any; {} if nowhere."""
    if backend == "auto":
        return next(iter(manifest.calibration.values()), {})
    return manifest.calibration.get(backend, {})


def choose_size(model: Model, wanted: str) -> tuple[int, int]:
    """Turn "auto" or "WxH" into an offered (width, height).

    Raises:
        InvalidRequest: the size is not offered by the model.
    """
    if wanted == "auto":
        return model.sizes[0]
    offered = {f"{width}x{height}": (width, height) for width, height in model.sizes}
    if wanted not in offered:
        raise InvalidRequest(
            f"expected a size that {model.id} offers ({', '.join(['auto', *offered])}), got {wanted!r}",
            param="size",
            code="invalid_size",
        )
    return offered[wanted]
