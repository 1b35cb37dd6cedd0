"""`flashbulb bench serve`: the options of the load generator."""

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flashbulb_service.bench.arrivals import TraceRow, read_trace
from flashbulb_service.bench.plot import draw_plot
from flashbulb_service.bench.report import table
from flashbulb_service.bench.session import BenchFailed, Plan, Rate, run_session
from flashbulb_service.bench.validity import Mode
from flashbulb_service.bench.workload import DEFAULT_PROMPTS, Mix, Target, Tenant
from flashbulb_service.errors import InvalidRequest
from flashbulb_service.processes import stop_on_signals

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)

EXAMPLES = """
\b
Examples:
  flashbulb bench serve --rate 0.5x --rate 1x --rate 1.5x
  flashbulb bench serve --rate 20 --rate 40 --slo-ms 250 --cv 2 --out load/
  flashbulb bench serve --rate 30 --size 64x64=3 --size 128x128=1 --n 1=9 --n 4=1 --zipf 1.1
  flashbulb bench serve --trace yesterday.jsonl --rate 0.8x
  flashbulb bench serve --base-url http://127.0.0.1:9000/v1 --model sdxl-turbo --no-seed \\
    --extra-body '{"num_inference_steps": 1}' --rate 2 --slo-scale 3
"""  # \b: these lines are not joined and wrapped


@app.callback()
def _root() -> None:
    """Measure a server of pictures under load."""


@app.command(epilog=EXAMPLES)
def serve(
    base_url: Annotated[str, typer.Option(help="Address of the API, with /v1")] = "http://127.0.0.1:8000/v1",
    rate: Annotated[
        list[str] | None,
        typer.Option(metavar="R", help="Requests/s, or with an x multiples of the measured capacity [1x]"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of one measurement")] = 20.0,
    warm_up: Annotated[float, typer.Option(metavar="SECONDS", help="Sent before it, and not counted")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Measurements per rate")] = 3,
    cv: Annotated[float, typer.Option(help="Variation of the gaps: 1 Poisson, 2 bursts, 0 metronome")] = 1.0,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSONL or CSV with offset_s, prompt, seed, size, n, …; --rate scales it"
        ),
    ] = None,
    slo_ms: Annotated[float | None, typer.Option(help="An answer later than this is not good")] = None,
    slo_scale: Annotated[
        float, typer.Option(help="Without --slo-ms: multiple of the unloaded latency")
    ] = 5.0,
    model: Annotated[str | None, typer.Option(help="[the server's default]")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="FLASHBULB_API_KEY", help="Bearer token")] = None,
    extra_body: Annotated[str, typer.Option(metavar="JSON", help="Fields to add to every request")] = "{}",
    no_seed: Annotated[
        bool, typer.Option("--no-seed", help="Send no seed; implies --check decodable")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="HOW", help="reference: pixels as when asked alone; decodable: n pictures of the size"
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="One prompt a line")] = None,
    size: Annotated[list[str] | None, typer.Option(metavar="WxH[=SHARE]", help="Size to ask for")] = None,
    n: Annotated[
        list[str] | None, typer.Option("--n", metavar="N[=SHARE]", help="Pictures per request")
    ] = None,
    output_format: Annotated[
        list[str] | None, typer.Option("--format", metavar="F[=SHARE]", help="png, jpeg or webp")
    ] = None,
    deadline_ms: Annotated[
        list[str] | None, typer.Option(metavar="MS[=SHARE]", help="or none[=SHARE]")
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=SHARE[=VARIABLE]]", help="VARIABLE of the environment holds its key"),
    ] = None,
    zipf: Annotated[float, typer.Option(help="Popularity of picture k is k^-Z; 0 is uniform")] = 0.0,
    pool: Annotated[int, typer.Option(min=1, max=100_000, help="How many different pictures")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn")] = 0,
    capacity: Annotated[float | None, typer.Option(help="Known capacity in requests/s [measured]")] = None,
    capacity_seconds: Annotated[float, typer.Option(help="How long capacity is measured")] = 10.0,
    concurrency: Annotated[
        int, typer.Option(min=1, max=4096, help="In flight while capacity is measured")
    ] = 32,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Of one request")] = 60.0,
    max_in_flight: Annotated[
        int, typer.Option(min=1, max=50_000, help="More are not sent, and void the run")
    ] = 2000,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Write result.json, table.md and plot.svg"),
    ] = None,
) -> None:
    """Offer load to an OpenAI-shaped images API, open loop: requests leave when planned, whatever came back.

    Goodput counts answers in time whose pixels are right. A measurement that the generator spoilt says void.
    Ctrl-C ends the run; what was measured is written.
    """
    rows: tuple[TraceRow, ...] = ()
    if trace is not None:
        rows = tuple(_usage("--trace", read_trace, trace))
        if rows[-1].offset_s <= 0:
            raise InvalidRequest(f"{trace}: expected times that rise, got 0 in every row", param="--trace")
    recorded = len(rows) / rows[-1].offset_s if rows else 0.0
    wanted = Plan(
        target=Target(_url(base_url), model, api_key, _json_object(extra_body), send_seed=not no_seed),
        mix=Mix(
            prompts=_prompts(prompts),
            sizes=_shares("--size", size, str) or ((None, 1.0),),
            counts=_shares("--n", n, _count) or ((1, 1.0),),
            formats=_shares("--format", output_format, _format) or ((None, 1.0),),
            tenants=tuple(_tenant(text) for text in tenant or ()) or (Tenant("default"),),
            deadlines_ms=_shares("--deadline-ms", deadline_ms, _deadline) or ((None, 1.0),),
            zipf=_number("--zipf", zipf, 0, 10),
            pool=pool,
            seed=seed,
        ),
        rates=tuple(dict.fromkeys(_rate(text) for text in rate or ()))
        or ((Rate(recorded),) if rows else (Rate(1.0, relative=True),)),
        seconds=_number("--seconds", seconds, 0.1, 86400),
        warm_up_s=_number("--warm-up", warm_up, 0, 86400),
        repeats=repeats,
        cv=_number("--cv", cv, 0, 10),
        trace=rows,
        slo_ms=None if slo_ms is None else _number("--slo-ms", slo_ms, 0.001, 1e9),
        slo_scale=_number("--slo-scale", slo_scale, 0.001, 1e6),
        check=_check(check, no_seed=no_seed),
        capacity_rps=None if capacity is None else _number("--capacity", capacity, 1e-6, 1e6),
        capacity_s=_number("--capacity-seconds", capacity_seconds, 0.1, 3600),
        concurrency=concurrency,
        timeout_s=_number("--timeout", timeout, 0.001, 86400),
        max_in_flight=max_in_flight,
    )
    if out is not None:
        _usage("--out", lambda folder: folder.mkdir(parents=True, exist_ok=True), out)
    result = run_async(wanted)
    if trace is not None:
        result["plan"]["trace_sha256"] = hashlib.sha256(trace.read_bytes()).hexdigest()
    if not result["points"]:
        raise BenchFailed("stopped before anything was measured")
    typer.echo(markdown(result))
    if out is not None:
        write(result, out)
    if result["interrupted"]:
        typer.echo("stopped early: the last measurement is void", err=True)
        raise typer.Exit(1)


def run_async(wanted: Plan) -> dict[str, Any]:
    """Run a session until its end or a signal, with progress on stderr."""

    async def run() -> dict[str, Any]:
        return await run_session(wanted, stop_on_signals(), lambda line: typer.echo(line, err=True))

    factory = None
    if os.name != "nt":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(run())


def markdown(result: dict[str, Any]) -> str:
    """Write the result as a table with the facts that it depends on."""
    plan, slo = result["plan"], result["slo_ms"]
    limit = (
        f"{slo:g} ms"
        if isinstance(slo, int | float)
        else ", ".join(f"{ms:.1f} ms ({g})" for g, ms in slo.items())
    )
    arrivals = f"trace of {plan['trace_rows']} rows" if plan["trace_rows"] else f"gaps of CV {plan['cv']:g}"
    capacity = result["capacity_rps"]
    facts = [
        f"{plan['target']['base_url']}: {arrivals}, {plan['repeats']} repeats of {plan['seconds']:g} s after "
        f"{plan['warm_up_s']:g} s, answers in time within {limit}, pixels checked: {plan['check']}"
        + (f", capacity {capacity:.1f}/s" if capacity is not None else "")
        + f"; {result['machine']['cpu']}, {result['machine']['cores']} cores, {result['started_at']}.",
        "",
        table([point["summary"] for point in result["points"]]),
    ]
    return "\n".join(facts)


def write(result: dict[str, Any], folder: Path) -> None:
    """Write result.json, table.md and plot.svg."""
    (folder / "result.json").write_text(
        json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "table.md").write_text(markdown(result) + "\n", encoding="utf-8")
    points = [point["summary"] for point in result["points"]]
    title = f"{result['plan']['target']['base_url']}, {result['started_at'][:10]}"
    (folder / "plot.svg").write_text(draw_plot(title, {"server": points}), encoding="utf-8")
    typer.echo(f"wrote {folder}/result.json, table.md, plot.svg", err=True)


def _usage(option: str, work: Any, *arguments: Any) -> Any:
    """Call something whose failure is the caller's wrong usage."""
    try:
        return work(*arguments)
    except (ValueError, OSError) as error:
        raise InvalidRequest(f"{option}: {error}", param=option) from error


def _rate(text: str) -> Rate:
    relative = text.endswith("x")
    try:
        value = float(text.removesuffix("x"))
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e6:
        raise InvalidRequest(f"--rate: expected requests/s such as 20, or 1.5x, got {text!r}", param="--rate")
    return Rate(value, relative)


def _number(option: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise InvalidRequest(
            f"{option}: expected a number from {low:g} to {high:g}, got {value:g}", param=option
        )
    return value


def _shares(option: str, texts: Sequence[str] | None, read: Any) -> tuple[tuple[Any, float], ...]:
    """Read VALUE or VALUE=SHARE, several times."""
    shares = []
    for text in texts or ():
        value, _, share = text.partition("=")
        shares.append((_usage(option, read, value), _share(option, share)))
    return tuple(shares)


def _share(option: str, text: str) -> float:
    try:
        share = float(text or 1)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise InvalidRequest(f"{option}: expected a share above 0, got {text!r}", param=option)
    return share


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1000:
        raise ValueError(f"expected a whole number from 1 to 1000, got {text!r}")
    return int(text)


def _format(text: str) -> str:
    if text not in ("png", "jpeg", "webp"):
        raise ValueError(f"expected png, jpeg or webp, got {text!r}")
    return text


def _deadline(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"expected whole milliseconds or none, got {text!r}")
    return int(text)


def _tenant(text: str) -> Tenant:
    name, _, rest = text.partition("=")
    share, _, variable = rest.partition("=")
    if not name or (variable and variable not in os.environ):
        raise InvalidRequest(
            f"--tenant: expected NAME[=SHARE[=VARIABLE]] with a variable that is set, got {text!r}",
            param="--tenant",
        )
    return Tenant(name, _share("--tenant", share), os.environ[variable] if variable else None)


def _prompts(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return DEFAULT_PROMPTS
    lines = tuple(line.strip() for line in _usage("--prompts", path.read_text, "utf-8").splitlines())
    found = tuple(line for line in lines if line)
    if not found:
        raise InvalidRequest(f"--prompts: expected at least one line in {path}, got none", param="--prompts")
    return found


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise InvalidRequest(f"--base-url: expected http:// or https://, got {text!r}", param="--base-url")
    return text


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"--extra-body: expected JSON, got {error}", param="--extra-body") from error
    if not isinstance(found, dict):
        raise InvalidRequest(
            f"--extra-body: expected a JSON object, got {type(found).__name__}", param="--extra-body"
        )
    return found


def _check(text: str | None, *, no_seed: bool) -> Mode:
    if text == "reference" and no_seed:
        raise InvalidRequest(
            "--check reference needs seeds: drop --no-seed or use decodable", param="--check"
        )
    if text == "reference" or (text is None and not no_seed):
        return "reference"
    if text in ("decodable", None):
        return "decodable"
    raise InvalidRequest(f"--check: expected reference or decodable, got {text!r}", param="--check")
