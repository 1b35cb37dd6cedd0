"""The models that can be asked for, read from the manifests of the model repository. Opens no model file."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashbulb_distill.bundle import Bundle, BundleError, Manifest, hash_file, list_models, open_bundle
from flashbulb_service.errors import BundleRejected, InvalidRequest, ModelUnloaded, UnknownModel
from flashbulb_service.scheduler import count_tokens
from flashbulb_service.tasks import Task

# Names that clients have built in, and what they ask for with them.
OPENAI_VIDEO_NAMES = ("sora-2", "sora-2-pro")
OPENAI_IMAGE_NAMES = (
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


# task -> where it is asked for, in a sentence
ROUTES: Mapping[str, str] = {
    "text-to-image": "draws pictures: POST /v1/images/generations",
    "text-to-video": "makes videos: POST /v1/videos",
}


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
        return tuple(dict.fromkeys((shape.width, shape.height) for shape in self.bundle.manifest.shapes))


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
        for target in self._aliases.values():
            self._resolve(target)
        # Known from the start: an unloaded or removed default is no reason to refuse the other medium.
        self._default_task = self._resolve(default).bundle.manifest.task if default else None

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
        """Follow the repository: drop what is gone, and take what is new or replaced once it is served.

        A bundle that cannot be read is left out; the workers, which verify it, say why in their log. One that is gone
        stays while it is served and the repository holds others of its name, none of which is served yet.

        Args:
            is_served: (name@version, sha256 of its manifest) -> whether a worker draws with it, or would be started.
        """
        known = {model.id: model for model in self.models}
        models = []
        listed = list_models(models_dir)
        for name, version, path in listed:
            model = known.get(f"{name}@{version}")
            with contextlib.suppress(BundleRejected, OSError):
                if model is None or hash_file(path / "manifest.json") != model.bundle.sha256:
                    found = open_model(path, name, version, verify=False)
                    model = found if is_served(found.id, found.bundle.sha256) else model
            if model is not None:
                models.append(model)
        replaced = {name for name, _, _ in listed} - {model.name for model in models}
        models += [
            model
            for model in self.models
            if model.name in replaced and is_served(model.id, model.bundle.sha256)
        ]
        self.models = tuple(sorted(models, key=lambda model: (model.name, model.version)))

    def follow(self, aliases: Mapping[str, str], unloaded: frozenset[str]) -> None:
        """Take what operators say: their aliases before those of the settings, and what is not served now."""
        self._aliases = {**self._given_aliases, **aliases}
        self.unloaded = unloaded

    @property
    def names(self) -> tuple[str, ...]:
        """Return what may be written as 'model': names, and names with a version."""
        return tuple(dict.fromkeys([m.name for m in self.models] + [m.id for m in self.models]))

    def find(self, wanted: str | None, *, task: Task | None = None, unloaded_too: bool = False) -> Model:
        """Find a model by "name" (its newest version), "name@version" or alias; None is the default.

        Args:
            task: what it is for; the default of a task is the default model if that does it, else the first that does.

        Raises:
            UnknownModel: there is none of that name.
            ModelUnloaded: an operator has unloaded it, and `unloaded_too` is not set.
            InvalidRequest: it does not do the task.
        """
        built_in = self._built_in()
        if wanted is None or wanted in built_in:
            model = self._default_of(task if wanted is None else built_in[wanted])
        else:
            model = self._resolve(self._aliases.get(wanted, wanted), unloaded_too=unloaded_too)
        offered = model.bundle.manifest.task
        if task not in (None, offered):
            raise InvalidRequest(
                f"model: {model.id} {ROUTES[offered]}", param="model", code="unsupported_task"
            )
        return model

    def _default_of(self, task: Task | None) -> Model:
        """Return what is meant where no model is named."""
        if self._default and task in (None, self._default_task):
            return self._resolve(self._aliases.get(self._default, self._default))
        served = [model for model in self.newest() if task in (None, model.bundle.manifest.task)]
        if served:
            return served[0]
        shelved = [model for model in self.models if task in (None, model.bundle.manifest.task)]
        if shelved:
            raise ModelUnloaded(shelved[0].id)
        if task is None or not self.models:
            raise UnknownModel("default")
        raise InvalidRequest(
            f"model: expected a model for {task} on this server, which has none: it has {', '.join(self.names)}",
            param="model",
            code="unsupported_task",
        )

    def newest(self) -> list[Model]:
        """Return the newest version of every name that is not unloaded."""
        return list({model.name: model for model in self.models if model.id not in self.unloaded}.values())

    def aliases_of(self, model: Model) -> tuple[str, ...]:
        """Return the other names that lead to a model."""
        names = (*self._aliases, *self._built_in())
        return tuple(sorted(name for name in names if self._leads_to(name, model)))

    def _leads_to(self, name: str, model: Model) -> bool:
        try:
            return self.find(name).id == model.id
        except UnknownModel:  # its target has left the repository
            return False

    def _built_in(self) -> dict[str, Task]:
        """Return the names of OpenAI's that mean a default here, and of which task; only tasks that some model does."""
        if not self._openai_aliases:
            return {}
        taken = {model.name for model in self.models} | set(self._aliases)
        tasks = {model.bundle.manifest.task for model in self.models}
        names: dict[str, Task] = {
            **dict.fromkeys(OPENAI_IMAGE_NAMES, "text-to-image"),
            **dict.fromkeys(OPENAI_VIDEO_NAMES, "text-to-video"),
        }
        return {name: task for name, task in names.items() if name not in taken and task in tasks}

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


def row_tokens(manifest: Manifest) -> list[int]:
    """Return the tokens of a row of every shape and number of steps that the student offers."""
    return [
        count_tokens(shape.width, shape.height, shape.frames, num_steps)
        for shape in manifest.shapes
        for num_steps in manifest.offered_steps
    ]


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
