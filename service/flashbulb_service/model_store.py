"""Bundles from a store: a bucket, a web server or a mounted folder is followed into a folder of this machine.

The store holds `<name>/<version>/` as a model repository does. A bundle's manifest comes first and says how long every
file is and what it hashes to; files come in pieces, each a request of its own, beside the repository. Only when every
hash is right does the folder get its name: what can be seen is whole. A fetch that was broken off goes on where it was.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlparse

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import ObjectStore, from_url

from flashbulb_distill.bundle import Bundle, BundleError, File, hash_file, list_models, open_bundle
from flashbulb_service.errors import BundleRejected, InvalidRequest, ModelStoreUnavailable
from flashbulb_service.settings import Settings

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STAGING = ".fetch"  # in the repository: bundles on their way, and the lock
MAX_MANIFEST_BYTES = 4 << 20
MAX_LISTED = 1_000
PIECE_BYTES = 16 << 20
SAY_EVERY_S = 10.0
SPARE_BYTES = 256 << 20  # of the disk, that a fetch leaves free
REQUEST_TIMEOUT = "120s"
RETRIES = 5

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_LISTABLE = ("s3", "s3a", "gs", "az", "file", "memory")


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A version of a model, as a store names it."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def path(self) -> str:
        """Return its folder in a store or repository."""
        return f"{self.name}/{self.number}"


class ModelStore:
    """A store of bundles behind a URL; its address is told without anything that could be a secret."""

    def __init__(self, url: str, wanted: frozenset[str] = frozenset()) -> None:
        """Open a store; nothing is asked of it yet.

        Args:
            wanted: "name" or "name@version" of what to take; empty: all that it lists.

        Raises:
            InvalidRequest: the URL names no store, or holds a user, a password or a query.
        """
        parts = urlparse(url)
        self.address = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        self.wanted = wanted
        self._can_list = parts.scheme in _LISTABLE
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InvalidRequest(
                f"models_url: expected an address alone, got more than {self.address}: "
                "give credentials as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                param="models_url",
            )
        try:
            self._store: ObjectStore = from_url(
                url,
                client_options={"timeout": REQUEST_TIMEOUT, "allow_http": True},
                retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=60)},
            )
        except (BaseError, ValueError):  # obstore's own text is a dump of its structures
            raise InvalidRequest(
                "models_url: expected s3://bucket/prefix, https://host/path or file:///folder, "
                f"got {self.address}: correct it",
                param="models_url",
            ) from None

    def versions(self) -> list[Version]:
        """Return what the store has of what is wanted, sorted.

        Raises:
            ModelStoreUnavailable: it does not answer.
            InvalidRequest: it cannot list (http), and what is wanted is not named with versions.
        """
        if not self._can_list:
            named = [_parse_version(text) for text in sorted(self.wanted)]
            if not named or None in named:
                raise InvalidRequest(
                    f'models_wanted: expected names with versions such as ["emoji@1"], since {self.address} cannot be '
                    f"listed, got {sorted(self.wanted)}",
                    param="models_wanted",
                )
            return sorted(version for version in named if version is not None)
        found = set()
        for name in self._folders(None):
            if self._is_wanted(name):
                for number in self._folders(name):
                    version = _parse_version(f"{name}@{number}")
                    if version is not None and self._is_wanted(name, version):
                        found.add(version)
        return sorted(found)

    def manifest(self, version: Version) -> bytes | None:
        """Return a version's manifest; None when there is none, as while a bundle is being uploaded.

        Raises:
            ModelStoreUnavailable: the store does not answer.
            BundleRejected: it is larger than a manifest may be.
        """
        path = f"{version.path}/{MANIFEST}"
        with self._answering(path):
            try:
                size = obstore.head(self._store, path)["size"]
                if size > MAX_MANIFEST_BYTES:
                    raise BundleRejected(
                        f"{self.address}/{path}: expected at most {MAX_MANIFEST_BYTES} bytes, got {size}"
                    )
                return bytes(obstore.get_range(self._store, path, start=0, end=size)) if size else b""
            except (NotFoundError, FileNotFoundError):
                return None

    def piece(self, path: str, start: int, end: int) -> bytes:
        """Return bytes of a file.

        Raises:
            ModelStoreUnavailable: the store does not answer.
            BundleRejected: there is no such file, or it ends before.
        """
        with self._answering(path):
            try:
                data = bytes(obstore.get_range(self._store, path, start=start, end=end))
            except (NotFoundError, FileNotFoundError):
                raise BundleRejected(
                    f"{self.address}/{path}: expected by the manifest, not found: upload it"
                ) from None
        if len(data) != end - start:
            raise BundleRejected(
                f"{self.address}/{path}: expected {end - start} bytes at {start}, got {len(data)}"
            )
        return data

    def _folders(self, below: str | None) -> list[str]:
        with self._answering(below or ""):
            found = obstore.list_with_delimiter(self._store, f"{below}/" if below else None)
        names = [str(prefix).rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]]
        return [name for name in names if _NAME.fullmatch(name)][:MAX_LISTED]

    def _is_wanted(self, name: str, version: Version | None = None) -> bool:
        if not self.wanted or name in self.wanted:
            return True
        if version is not None:
            return str(version) in self.wanted
        return any(text.startswith(f"{name}@") for text in self.wanted)

    @contextlib.contextmanager
    def _answering(self, path: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            # The text of an error of obstore may hold headers and signed addresses: its kind is enough.
            raise ModelStoreUnavailable(
                f"{self.address}/{path}: expected an answer of the store of models, got {type(error).__name__}: "
                "check the address, the credentials and the network"
            ) from None


class Follower:
    """Makes a repository on this machine hold what a store has."""

    def __init__(
        self, store: ModelStore, repository: Path, *, max_bytes: int, manifests_only: bool = False
    ) -> None:
        """Keep the parts; `manifests_only` for those who only tell what there is."""
        self._store = store
        self._repository = repository
        self._staging = repository / STAGING
        self._max_bytes = max_bytes
        self._manifests_only = manifests_only
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End a look that runs in another thread, at its next piece; what it has is kept."""
        self._stopping.set()

    def look(self) -> list[str]:
        """Fetch what is new, remove what has left the store; blocks. Other processes on this folder wait for it.

        Returns:
            what was fetched, as name@version. A bundle that is damaged or not there yet is left out, with one line
            in the log, and tried again at the next look.

        Raises:
            ModelStoreUnavailable: the store does not answer.
            InvalidRequest: what it has is larger than may be fetched, or than the disk.
        """
        self._staging.mkdir(parents=True, exist_ok=True)
        with (self._staging / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            offered = self._store.versions()
            bundles = {version: bundle for version in offered if (bundle := self._begin(version)) is not None}
            self._check_room(bundles)
            fetched = []
            for version, bundle in bundles.items():
                try:
                    if self._fetch(version, bundle):
                        fetched.append(str(version))
                except BundleRejected as error:
                    log.error("model %s was not fetched, the others go on: %s", version, error)
            if offered:  # an empty answer is rather a mistake than a wish
                self._remove_others({version.path for version in offered})
            self._forget_drafts({bundle.path for bundle in bundles.values()})
            return fetched

    def _begin(self, version: Version) -> Bundle | None:
        """Return the bundle as its manifest says, in the folder where its files are collected."""
        try:
            data = self._store.manifest(version)
            if data is None:
                log.warning("model %s has no manifest yet: tried again at the next look", version)
                return None
            folder = self._staging / f"{version}-{hashlib.sha256(data).hexdigest()[:16]}"
            folder.mkdir(exist_ok=True)
            (folder / MANIFEST).write_bytes(data)
            bundle = open_bundle(folder, verify=False)
            found = (bundle.manifest.name, bundle.manifest.version)
            if found != (version.name, version.number):
                raise BundleRejected(f"expected the manifest of {version}, got {found[0]}@{found[1]}")
        except (BundleRejected, BundleError) as error:
            log.error("model %s was not fetched, the others go on: %s", version, error)
            return None
        return bundle

    def _check_room(self, bundles: Mapping[Version, Bundle]) -> None:
        if self._manifests_only:
            return
        sizes = {version: _bytes_of(bundle) for version, bundle in bundles.items()}
        if sum(sizes.values()) > self._max_bytes:
            largest = max(sizes, key=lambda version: sizes[version])
            raise InvalidRequest(
                f"models_max_bytes: expected bundles of at most {self._max_bytes} bytes together, got "
                f"{sum(sizes.values())} ({largest} has {sizes[largest]}): allow more, or name those that are wanted",
                param="models_max_bytes",
            )
        missing = sum(
            sizes[version] - sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
            for version, bundle in bundles.items()
            if not self._is_there(version, bundle)
        )
        free = shutil.disk_usage(self._repository).free
        if missing > 0 and missing + SPARE_BYTES > free:
            raise InvalidRequest(
                f"expected {(missing + SPARE_BYTES) >> 20} MB free at {self._repository} for models, got "
                f"{free >> 20}: make room, or choose another folder with --data",
                param="data",
            )

    def _is_there(self, version: Version, bundle: Bundle) -> bool:
        known = self._repository / version.path / MANIFEST
        return known.is_file() and hash_file(known) == bundle.sha256

    def _fetch(self, version: Version, bundle: Bundle) -> bool:
        """Collect a bundle's files and give it its name; tell whether that was needed."""
        if self._is_there(version, bundle):
            shutil.rmtree(bundle.path, ignore_errors=True)
            return False
        if not self._manifests_only:
            progress = _Progress(str(version), _bytes_of(bundle))
            for name, file in bundle.manifest.files.items():
                self._fetch_file(f"{version.path}/{name}", bundle.path / name, file, progress)
        target = self._repository / version.path
        target.parent.mkdir(exist_ok=True)
        if target.exists():  # exported again under its version
            replaced = self._staging / f"{version}-replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
            bundle.path.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            bundle.path.rename(target)
        log.info("model %s was fetched from %s", version, self._store.address)
        return True

    def _fetch_file(self, source: str, target: Path, file: File, progress: "_Progress") -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as handle:
            have = handle.tell()
            if have > file.bytes:
                have = handle.truncate(0)
            progress.add(have)
            while have < file.bytes:
                if self._stopping.is_set():
                    raise ModelStoreUnavailable("this process stops and asks for no more")
                end = min(have + PIECE_BYTES, file.bytes)
                handle.write(self._store.piece(source, have, end))
                progress.add(end - have)
                have = end
        digest = hash_file(target)
        if digest != file.sha256:
            target.unlink()  # from its beginning, the next time
            raise BundleRejected(
                f"{self._store.address}/{source}: expected sha256 {file.sha256}, got {digest}: upload it again"
            )

    def _forget_drafts(self, kept: set[Path]) -> None:
        for folder in self._staging.iterdir():
            if folder.is_dir() and folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_others(self, kept: set[str]) -> None:
        for name, number, path in list_models(self._repository):
            if f"{name}/{number}" not in kept:
                log.info("model %s@%d has left %s and is removed here", name, number, self._store.address)
                gone = self._staging / f"{name}@{number}-gone"
                shutil.rmtree(gone, ignore_errors=True)
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


class _Progress:
    """Says how far a bundle is, now and then."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._have = what, total, 0
        self._said_at = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._have += num_bytes
        now = time.monotonic()
        if now - self._said_at >= SAY_EVERY_S:
            self._said_at = now
            log.info("fetching %s: %d of %d MB", self._what, self._have >> 20, self._total >> 20)


def follower_of(settings: Settings, *, manifests_only: bool = False) -> Follower | None:
    """Return what follows the store that the settings name; None when they name none.

    Raises:
        InvalidRequest: the address cannot be used.
    """
    if settings.models_url is None:
        return None
    store = ModelStore(settings.models_url, settings.models_wanted)
    return Follower(
        store, settings.models, max_bytes=settings.models_max_bytes, manifests_only=manifests_only
    )


def for_manifests(settings: Settings) -> Settings:
    """Return the settings of who only tells what models there are: manifests have a folder of their own."""
    if settings.models_url is None:
        return settings
    return settings.model_copy(update={"models": settings.data.expanduser() / "manifests"})


def fetch_first(settings: Settings, *, manifests_only: bool = False) -> list[str]:
    """Fetch what the store has before anything is served; without the store, what is here already will do.

    Raises:
        ModelStoreUnavailable: the store does not answer, and nothing is here.
        InvalidRequest: the store cannot be used as it is named.
    """
    follower = follower_of(settings, manifests_only=manifests_only)
    if follower is None:
        return []
    try:
        return follower.look()
    except ModelStoreUnavailable as error:
        known = list_models(settings.models)
        if not known:
            raise
        log.warning("%s; serving the %d versions that were fetched before", error.message, len(known))
        return []


async def keep_following(settings: Settings, *, manifests_only: bool = False) -> None:
    """Look again every `models_poll_s`, until the task is cancelled; whoever scans the repository sees what comes."""
    follower = follower_of(settings, manifests_only=manifests_only)
    if follower is None or not settings.models_poll_s:
        return
    try:
        while True:
            await asyncio.sleep(settings.models_poll_s)
            try:
                await asyncio.to_thread(follower.look)
            except (ModelStoreUnavailable, InvalidRequest, OSError) as error:
                log.warning("the store of models was not followed: %s", error)
    finally:
        follower.stop()


def _bytes_of(bundle: Bundle) -> int:
    return sum(file.bytes for file in bundle.manifest.files.values())


def _parse_version(text: str) -> Version | None:
    name, _, number = text.rpartition("@")
    if _NAME.fullmatch(name) and _VERSION.fullmatch(number):
        return Version(name, int(number))
    return None
