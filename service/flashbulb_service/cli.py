"""The command `flashbulb`. Nothing heavy is imported before a command needs it.

Exit code 0 success, 1 failure of the work, 2 wrong usage. An error is one line on stderr; --debug adds the
traceback.
"""

import json
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashbulb_service.admin_cli import keys_app, queue_app
from flashbulb_service.models_cli import models_app

if TYPE_CHECKING:
    from flashbulb_distill.bundle import Bundle
    from flashbulb_service.settings import Settings
    from flashbulb_service.tasks import Task

COMMAND_GROUP = "flashbulb.commands"
# What `flashbulb --help` says of them, since asking them would import them.
PLUGIN_HELP = {
    "bench": "Measure a server of pictures under load.",
    "distill": "Distil a diffusion teacher into a one-step or few-step student.",
    "export": "Export networks to ONNX, and bundles to TensorRT engines.",
    "kernels": "Compile, inspect, verify and measure the Triton kernels.",
}
VERIFIER_GROUP = (
    "flashbulb.verifiers"  # (bundle's folder) -> what was compared, each with component and error
)

Models = Annotated[
    str | None,
    typer.Option("--models", metavar="DIR|URL", help="Model repository, or s3:// of one [./models]"),
]
Data = Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Queue and results of this machine")]
Redis = Annotated[str | None, typer.Option("--redis", metavar="URL", help="redis:// or unix:// of the queue")]
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on [127.0.0.1]")]
Port = Annotated[int | None, typer.Option("--port", help="Port to listen on, 0 for any free one [8000]")]
BackendOption = Annotated[
    str | None,
    typer.Option("--backend", metavar="NAME", help="auto, onnx, tensorrt, torch or synthetic [auto]"),
]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads of one worker [one per core]")]
Public = Annotated[
    bool, typer.Option("--allow-public", help="Listen where others can reach it, key or no key")
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is text: as markup, "[auto]" would be a tag and vanish
    context_settings={"max_content_width": 120},
)
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
app.add_typer(queue_app, name="queue")


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashbulb {distribution_version('flashbulb')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_tell_version, help="Tell the version, and end"),
    ] = False,
) -> None:
    """Make one-step students of diffusion models, and serve them."""


@app.command()
def serve(
    models: Models = None,
    data: Data = None,
    redis: Redis = None,
    host: Host = None,
    port: Port = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Worker processes")] = 1,
    backend: BackendOption = None,
    threads: Threads = None,
    allow_public: Public = False,
) -> None:
    """Serve API, playground and workers, with a queue server of its own unless --redis names one."""
    from flashbulb_service.model_store import fetch_first
    from flashbulb_service.processes import stop_on_signals
    from flashbulb_service.serve import bind, check_host, queue_server, run_all

    settings = _settings(
        models=models, data=data, redis=redis, host=host, port=port, backend=backend, threads=threads
    )
    _configure_logging(settings)
    fetch_first(settings)
    _check_backend(settings)
    with bind(settings.host, settings.port) as listener, queue_server(settings) as complete:

        async def run() -> None:
            checked = await check_host(complete, allow_public=allow_public)
            await run_all(checked, listener, stop_on_signals(), num_workers=workers, on_ready=_announce)

        _run(run())


@app.command()
def api(
    models: Models = None,
    data: Data = None,
    redis: Redis = None,
    host: Host = None,
    port: Port = None,
    allow_public: Public = False,
) -> None:
    """Serve the API alone; workers run elsewhere on the same queue and result store."""
    from flashbulb_service.model_store import fetch_first, for_manifests
    from flashbulb_service.processes import stop_on_signals
    from flashbulb_service.serve import address_of, bind, check_host, run_api

    settings = for_manifests(_settings(models=models, data=data, redis=redis, host=host, port=port))
    _configure_logging(settings)
    fetch_first(settings, manifests_only=True)
    with bind(settings.host, settings.port) as listener:

        async def run() -> None:
            checked = await check_host(settings, allow_public=allow_public)
            typer.echo(f"API on {address_of(listener)}", err=True)
            await run_api(checked, listener, stop_on_signals())

        _run(run())


@app.command()
def worker(
    models: Models = None,
    data: Data = None,
    redis: Redis = None,
    backend: BackendOption = None,
    threads: Threads = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="Serve metrics on this port [off]")
    ] = None,
    parent_pid: Annotated[int | None, typer.Option("--parent-pid", hidden=True)] = None,
    head_start_fd: Annotated[int | None, typer.Option("--head-start-fd", hidden=True)] = None,
) -> None:
    """Run batches from the queue until SIGTERM; then finish the batch in hand."""
    from flashbulb_service.processes import die_with_parent, stop_on_signals

    if parent_pid is not None:
        die_with_parent(parent_pid)
    from flashbulb_service.model_store import fetch_first
    from flashbulb_service.worker import run_worker

    settings = _settings(
        models=models, data=data, redis=redis, backend=backend, threads=threads, metrics_port=metrics_port
    )
    _configure_logging(settings)
    fetch_first(settings)
    _check_backend(settings)

    async def run() -> bool:
        return await run_worker(settings, stop_on_signals(), head_start_fd=head_start_fd)

    if not _run(run()):
        # The batch was handed back, but its thread cannot be interrupted: leave without waiting for it.
        sys.stderr.flush()
        os._exit(1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw")],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help=".png, .jpg or .webp; a video .mp4 or .webp")
    ],
    models: Models = None,
    model: Annotated[
        str | None, typer.Option("--model", help="name, name@version or a bundle's folder")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="[random]")] = None,
    size: Annotated[str, typer.Option("--size", metavar="WxH", help="A size that the model offers")] = "auto",
    count: Annotated[int, typer.Option("-n", min=1, max=1000, help="How many: FILE-0, FILE-1, …")] = 1,
    backend: BackendOption = None,
    threads: Threads = None,
) -> None:
    """Draw pictures or videos into files, with no server. Equal seeds give equal bytes.

    Examples: "red apple" -o a.png, or --model emoji-motion "rocket flying up" -o r.mp4
    """
    import secrets

    from flashbulb_service.calibration import load_student
    from flashbulb_service.catalog import Model, choose_size
    from flashbulb_service.errors import InvalidRequest
    from flashbulb_service.generate import choose_format, resolve_bundle, task_of, write_pictures
    from flashbulb_service.provenance import Marker

    settings = _settings(models=models, backend=backend, threads=threads)
    if not prompt.strip():
        raise InvalidRequest("expected a prompt of at least one word, got an empty one", param="PROMPT")
    task = task_of(choose_format(out))
    bundle = resolve_bundle(settings.models, model or _default_model(settings, task), verify=True)
    chosen = Model(bundle.manifest.name, bundle.manifest.version, bundle)
    width, height = choose_size(chosen, size)
    marker = Marker.from_settings(settings)
    seed = secrets.randbits(63) if seed is None else seed
    student = load_student(bundle, settings).student  # as a worker does: the same bytes for the same seed
    try:
        report = write_pictures(
            student, bundle, prompt, out, seed=seed, size=(width, height), count=count, marker=marker
        )
    finally:
        student.backend.close()
    for file in report.files:
        typer.echo(str(file))
    typer.echo(
        f"{chosen.id}, {width}x{height}, seed {seed}, {report.model_ms / count:.1f} ms per "
        f"{'video' if bundle.manifest.is_video else 'picture'}",
        err=True,
    )


@app.command("plan-capacity")
def plan_capacity(
    rate: Annotated[str, typer.Option("--rate", help="Requests that come, such as 20/s, 900/min or 5000/h")],
    p99: Annotated[str, typer.Option("--p99", help="99 % are to be answered within, such as 300ms or 2s")],
    model: Annotated[
        str | None, typer.Option("--model", help="name, name@version or a bundle's folder")
    ] = None,
    overhead: Annotated[
        str,
        typer.Option("--overhead", help="Time of a request that no device needs: HTTP, encoding, storing"),
    ] = "10ms",
    noise: Annotated[float, typer.Option("--noise", min=0, max=1, help="Spread of batch times")] = 0.1,
    models: Models = None,
    data: Data = None,
    backend: BackendOption = None,
    threads: Threads = None,
) -> None:
    """Tell how many workers a load needs, from measured batch times. Example: --rate 20/s --p99 300ms.

    The server's own scheduling runs in simulated time. Run 'flashbulb models calibrate' first, on a machine like
    those that will serve; without it the times are those of the machine that exported the model.
    """
    from flashbulb_service.calibration import known_times
    from flashbulb_service.capacity import parse_ms, parse_rate, plan_workers
    from flashbulb_service.errors import InvalidRequest
    from flashbulb_service.scheduler import batch_cap
    from flashbulb_service.timing import fit_tau

    settings = _settings(models=models, data=data, backend=backend, threads=threads)
    bundle = _open(settings, model or _default_model(settings), verify=False)
    named = f"{bundle.manifest.name}@{bundle.manifest.version}"
    times, where = known_times(bundle, settings)
    if not times:
        raise InvalidRequest(
            f"expected measured batch times of {named} on {settings.backend}, found none: "
            f"run 'flashbulb models calibrate {named}'"
        )
    cap = batch_cap(bundle.manifest.max_batch, settings.max_batch, times)
    plans = plan_workers(
        fit_tau(times),
        cap,
        rate_per_s=parse_rate(rate),
        p99_ms=parse_ms(p99),
        overhead_ms=parse_ms(overhead),
        noise=noise,
    )
    typer.echo(f"{named} on {settings.backend}, times measured {where}, batches of at most {cap}")
    typer.echo("  workers   busy  batch    p50 ms    p99 ms  on time")
    for plan in plans:
        typer.echo(
            f"  {plan.workers:7d}  {plan.busy:4.0%}  {plan.mean_batch:5.1f}  {plan.p50_ms:8.1f}  {plan.p99_ms:8.1f}"
            f"  {plan.share_on_time:6.1%}"
        )
    needed = plans[-1].workers
    typer.echo(f"{needed} worker{'s' * (needed > 1)} of this kind: 99 % of all requests within {p99}")


@models_app.command("fetch")
def fetch_models(models: Models = None, data: Data = None) -> None:
    """Fetch bundles from a store into <data>/models: flashbulb models fetch --models s3://bucket/students.

    Serving does it by itself; this is for machines that shall start without the store. What was fetched before
    is kept, what was broken off goes on, and nothing is there that is not whole.
    """
    from flashbulb_distill.bundle import list_models
    from flashbulb_service.errors import InvalidRequest
    from flashbulb_service.model_store import fetch_first

    settings = _settings(models=models, data=data)
    if settings.models_url is None:
        raise InvalidRequest(
            "expected the address of a store: --models s3://bucket/prefix, or FLASHBULB_MODELS_URL"
        )
    _configure_logging(settings)
    fetched = fetch_first(settings)
    for name, version, path in list_models(settings.models):
        state = "fetched" if f"{name}@{version}" in fetched else "was here"
        typer.echo(f"{name}@{version}\t{state}\t{path}")


@models_app.command("list")
def list_models_command(models: Models = None) -> None:
    """List every model and version."""
    from flashbulb_service.catalog import Catalog

    for model in Catalog.load(_settings(models=models).models, verify=False).models:
        sizes = " ".join(f"{width}x{height}" for width, height in model.sizes)
        manifest = model.bundle.manifest
        size_mb = sum(file.bytes for file in manifest.files.values()) / 1e6
        steps = " ".join(map(str, manifest.offered_steps))
        typer.echo(
            f"{model.id}\t{sizes}\t{steps} step{'s' * (steps != '1')}\t{size_mb:.1f} MB\t{manifest.licence}"
        )


@models_app.command("inspect")
def inspect_model(
    model: Annotated[str, typer.Argument(help="name, name@version or a bundle's folder")],
    models: Models = None,
) -> None:
    """Print a model's manifest as JSON; its files are not read."""
    bundle = _open(_settings(models=models), model, verify=False)
    shown = {"path": str(bundle.path), "sha256": bundle.sha256, **bundle.manifest.model_dump(mode="json")}
    typer.echo(json.dumps(shown, indent=2, ensure_ascii=False))


@models_app.command(
    "verify",
    epilog="\b\nExamples:\n  flashbulb models verify\n  flashbulb models verify emoji@1 --hashes-only",
)
def verify_models(
    names: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="[all]")] = None,
    models: Models = None,
    hashes_only: Annotated[
        bool, typer.Option("--hashes-only", help="Do not compare with torch, where it is installed")
    ] = False,
) -> None:
    """Check every byte against the manifest and, where torch is installed, graphs and pictures against torch."""
    from flashbulb_service.catalog import Catalog

    settings = _settings(models=models)
    wanted = names or [model.id for model in Catalog.load(settings.models, verify=False).models]
    for name in wanted:
        bundle = _open(settings, name, verify=True)
        told = "hashes only" if hashes_only else _compare(bundle.path)
        typer.echo(
            f"{bundle.manifest.name}@{bundle.manifest.version}\tok\t{len(bundle.manifest.files)} files\t{told}"
        )


def _compare(bundle: Path) -> str:
    """Hold a bundle against torch and say in a few words how near it is, or why this cannot be done here."""
    found = [entry for entry in entry_points(group=VERIFIER_GROUP) if entry.name == "parity"]
    try:
        compare = found[0].load() if found else None
    except ImportError as error:
        return f"hashes only: {error.name or error} is not installed (extra distill)"
    if compare is None:
        return "hashes only: the distiller is not installed (extra distill)"
    parities = compare(bundle)
    if not parities:
        return "hashes only: no weights that torch could load"
    return "as in torch: " + ", ".join(f"{parity.component} {parity.error:.1e}" for parity in parities)


@models_app.command("calibrate")
def calibrate_models(
    names: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="[all]")] = None,
    models: Models = None,
    data: Data = None,
    backend: BackendOption = None,
    threads: Threads = None,
) -> None:
    """Measure time by batch size, and check that batches do not change pixels; workers here then use both."""
    from flashbulb_service.backends import create_backend
    from flashbulb_service.calibration import backend_of, calibrate, place, write_calibration
    from flashbulb_service.catalog import Catalog

    settings = _settings(models=models, data=data, backend=backend, threads=threads)
    for name in names or [model.id for model in Catalog.load(settings.models, verify=False).models]:
        bundle = _open(settings, name, verify=True)
        backend_name = backend_of(bundle, settings)
        engine = create_backend(backend_name, threads=settings.threads, synthetic=settings.synthetic)
        try:
            engine.load(bundle)
            where = place(bundle, backend_name, settings.threads)
            found = calibrate(engine, bundle, where, max_batch=settings.max_batch)
        finally:
            engine.close()
        file = write_calibration(settings.data.expanduser(), found)
        typer.echo(f"{bundle.manifest.name}@{bundle.manifest.version}\n  batch        ms  ms/picture")
        for size, ms in found.times_ms.items():
            typer.echo(f"  {size:5d}  {ms:8.2f}  {ms / size:10.2f}")
        verdict = "yes" if found.batch_invariant else f"no: strict pads every batch to {found.canonical}"
        typer.echo(f"  equal bytes in any batch ({found.num_mixes} random mixes): {verdict}\n  {file}")


def _open(settings: "Settings", reference: str, *, verify: bool) -> "Bundle":
    from flashbulb_service.generate import resolve_bundle

    return resolve_bundle(settings.models, reference, verify=verify)


def _check_backend(settings: "Settings") -> None:
    """Refuse at once a backend that cannot run the models, before anything starts."""
    from flashbulb_service.calibration import backend_of
    from flashbulb_service.parts import load_catalog

    for model in load_catalog(settings, verify=False).models:
        backend_of(model.bundle, settings)


def _default_model(settings: "Settings", task: "Task | None" = None) -> str:
    from flashbulb_service.catalog import Catalog

    catalog = Catalog.load(settings.models, verify=False, default=settings.default_model)
    return catalog.find(None, task=task).id


def _settings(**given: object) -> "Settings":
    """Read the environment, and let options that were given win."""
    from flashbulb_service.settings import read_settings

    return read_settings(**given)


def _configure_logging(settings: "Settings") -> None:
    from flashbulb_service.observability import configure_logging

    configure_logging(settings.log_format)


def _announce(address: str) -> None:
    typer.echo(f"\n  Flashbulb is ready: {address}\n")


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on the fastest event loop that is installed."""
    import asyncio

    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform != "win32":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


def _add_plugin(entry: EntryPoint) -> None:
    """Add a command of another package; the package is imported when the command runs, not before."""

    def forward(context: typer.Context) -> None:
        try:
            command = typer.main.get_command(entry.load())
            code = command.main(context.args, prog_name=f"flashbulb {entry.name}", standalone_mode=False)
        except ModuleNotFoundError as error:
            raise typer.TyperException(
                f"'flashbulb {entry.name}' needs the package {error.name!r}, which is not installed: "
                f"pip install 'flashbulb[{(entry.extras or [entry.name])[0]}]'"
            ) from error
        if isinstance(code, int) and code:
            raise typer.Exit(code)

    forward.__doc__ = PLUGIN_HELP.get(entry.name, f"Run a command of {entry.value.partition('.')[0]}.")
    app.command(
        entry.name,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(forward)


_add_plugin(EntryPoint("bench", "flashbulb_service.bench.cli:app", COMMAND_GROUP))
for _entry in sorted(entry_points(group=COMMAND_GROUP), key=lambda entry: entry.name):
    _add_plugin(_entry)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    debug = "--debug" in arguments
    try:
        code = app(
            args=[a for a in arguments if a != "--debug"], prog_name="flashbulb", standalone_mode=False
        )
    except Exception as error:
        if debug:
            raise
        return _report(error)
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    """Say in one line what went wrong, and return the exit code."""
    if isinstance(error, typer.Abort):
        typer.echo("flashbulb: stopped", err=True)
        return 1
    if isinstance(error, typer.TyperException):
        message, code = error.format_message(), error.exit_code
        if not message:  # a command group without a command has shown its help
            return code
    else:
        message = str(error) or type(error).__name__
        code = getattr(error, "exit_code", 1)  # of wrong usage, other packages' commands included
    typer.echo(f"flashbulb: {' '.join(message.split())}", err=True)
    return code


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
