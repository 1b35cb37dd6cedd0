"""Write docs/performance.md from benchmarks/results/*.json: no number is typed in. Called by docs/reference.py."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
Result = Mapping[str, Any]
COMMANDS = {"student_vs_teacher": "student"}  # where a result is named otherwise than its command


def performance_page(folder: Path = RESULTS) -> str:
    """Return the page: a section for each result that is there, with its command, machine and commit."""
    lines = [
        "# Performance",
        "",
        "What `python -m benchmarks NAME --write` left in `benchmarks/results/`, each with the machine and commit that",
        "gave it. How it is measured is in [benchmarks](benchmarks.md). Two cores are noisy: the load average is told.",
    ]
    for name, (title, table) in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            lines += ["", f"## {title}", "", *table(result), "", _origin(name, result)]
    return "\n".join(lines) + "\n"


def _origin(name: str, result: Result) -> str:
    machine = result.get("machine", {})
    where = machine if isinstance(machine, str) else f"{machine.get('cpu')}, {machine.get('cores')} cores"
    load = machine.get("load_average", []) if isinstance(machine, dict) else []
    busy = f", load average {load[0]:.1f}" if load else ""
    command = f"python -m benchmarks {COMMANDS.get(name, name)}"
    return f"`{command}`, {where}{busy}, commit `{result.get('commit', 'unknown')}`."


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(_text(cell) for cell in row)} |" for row in rows]


def _text(cell: Any) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "**no**"
    return f"{cell:.3g}" if isinstance(cell, float) and abs(cell) < 1000 else str(cell)


def _spread(names: Mapping[str, str]) -> Callable[[Result], list[str]]:
    def table(result: Result) -> list[str]:
        rows = [[says, *(result[key][p] for p in ("p50", "p90", "p99"))] for key, says in names.items()]
        return _table(["ms", "p50", "p90", "p99"], rows)

    return table


def _student(result: Result) -> list[str]:
    rows = [[who, float(ms)] for who, ms in result["cpu_ms"].items()]
    return _table(["one picture", "CPU ms"], rows)


def _step_budget(result: Result) -> list[str]:
    rows = [[part, float(ms)] for part, ms in result["cpu_ms"].items() if part != "iteration"]
    own, whole = result["sum_of_passes_ms"], result["cpu_ms"]["iteration"]
    ratio = result["iteration_over_passes"]
    verdict = f"The iteration is {ratio:.2f} times its passes; the budget is {result['budget']}."
    rows += [["sum", float(own)], ["whole iteration", float(whole)]]
    return [*_table([f"ADM, batch of {result['batch_size']}", "CPU ms"], rows), "", verdict]


def _saturate(result: Result) -> list[str]:
    bare = [run["pictures_per_s"] for run in result["bare"]]
    server = [run["pictures_per_s"] for run in result["server"]]
    rows = [
        ["bare onnxruntime loop at its best batch", max(bare), min(bare)],
        ["the whole server", max(server), min(server)],
    ]
    ratio = result["ratio_wall"]
    return [
        *_table(["pictures per second", "best run", "worst run"], rows),
        "",
        f"Server over bare, by turns: {ratio['mean']:.3g} ± {ratio['ci95']:.2g} (95 % interval).",
    ]


def _floor(result: Result) -> list[str]:
    rows = [
        [name, p50["median"], min(p50["turns"]), max(p50["turns"])]
        for name, p50 in result["overhead_p50_ms"].items()
    ]
    return _table(["added to a picture, p50 in ms, by turns", "median", "least", "most"], rows)


def _stages(result: Result) -> list[str]:
    return _table(["mark", "ms since the one before"], [[k, v] for k, v in result["stages_ms"].items()])


def _decide(result: Result) -> list[str]:
    rows = [
        [f"decision over {what}", *(t[p] for p in ("p50", "p99"))] for what, t in result["plan_ms"].items()
    ]
    rows.append(["a whole claim on Valkey", *(result["claim_ms"][p] for p in ("p50", "p99"))])
    return _table([f"{result['waiting']} requests waiting, ms", "p50", "p99"], rows)


def _durability(result: Result) -> list[str]:
    names = {
        "store_p50_ms": "storing one job, ms",
        "picture_p50_ms": "a picture alone, median, ms",
        "picture_p90_ms": "a picture alone, p90, ms",
        "pictures_per_s": f"pictures per second, {result['concurrency']} in flight",
    }
    rows = [
        [
            says,
            *("{mean:.3g} ± {ci95:.2g}".format(**result[policy][key]) for policy in ("everysec", "always")),
        ]
        for key, says in names.items()
    ]
    disk = result["disk_ms"]
    told = (
        f"A sync of this disk takes {disk['p50']:.2g} ms (p99 {disk['p99']:.2g}). Means and 95 % intervals."
    )
    return [told, "", *_table(["`appendfsync` of a Valkey of your own", "everysec", "always"], rows)]


def _live(result: Result) -> list[str]:
    rows = [
        [
            load,
            point["live_goodput_rps"]["mean"],
            point["simulated_goodput_rps"]["mean"],
            point["live_over_simulated"]["mean"],
            point["live_on_time"]["mean"],
        ]
        for load, point in result["points"].items()
    ]
    return _table(["load", "live goodput/s", "simulated", "live over simulated", "answers on time"], rows)


def _capacity(result: Result) -> list[str]:
    rows = [
        [
            f"{point['rate_per_s']:.1f}",
            point["planned"]["workers"],
            *(f"{point[who]['share_on_time']:.1%}" for who in ("planned", "same_arrivals", "measured")),
            *(f"{point[who]['p99_ms']:.0f}" for who in ("planned", "same_arrivals", "measured")),
        ]
        for point in result["points"]
    ]
    head = ["requests/s", "workers", "on time: planned", "simulated on these arrivals", "measured"]
    told = (
        f"Objective: 99 % within {result['objective_ms']:g} ms; a device does {result['capacity_rps']:g}/s at most. "
        "Planned is the mean of 20,000 requests; a measurement has a few hundred."
    )
    return [told, "", *_table([*head, "p99, ms: planned", "on these", "measured"], rows)]


def _verdict(result: Result) -> list[str]:
    rows = [[key.replace("_", " "), value] for key, value in result["verdict"].items()]
    return _table(["verdict", ""], rows)


def _rolling(result: Result) -> list[str]:
    runs = {name.replace("_", " "): run for name, run in result.items() if name.endswith("_first")}
    rows = [
        [
            what,
            sum(count for status, count in run["answers"].items() if status != "200"),
            f"{run['jobs'].get('completed', 0)} of {sum(run['jobs'].values())}",
            f"{run['latency_ms']['before']['p50']:.0f} / {run['latency_ms']['rolling']['p50']:.0f}",
            f"{sum(run['answers'].values())}",
            "{differ} of {pictures}, by {largest_of_255}".format(**run["versions"]),
            run["verdict"]["good"],
        ]
        for what, run in runs.items()
    ]
    head = ["replaced", "failed requests", "jobs completed", "p50 before / while, ms", "requests"]
    head += ["pictures that differ, of 255 at most", "good"]
    return [f"From `{result['old']}` to this version, two APIs and two workers.", "", *_table(head, rows)]


def _chaos(result: Result) -> list[str]:
    kills = ", ".join(f"{count} of {what}" for what, count in result["chaos"]["kills"].items())
    return [f"{result['jobs']} jobs, killed with SIGKILL: {kills}.", "", *_verdict(result)]


def _soak(result: Result) -> list[str]:
    growth = ", ".join(f"{part} {share:+.1%}" for part, share in result["growth"].items())
    return [f"{result['seconds'] / 60:.0f} minutes; growth of memory: {growth}.", "", *_verdict(result)]


def _peers(result: Result) -> list[str]:
    summaries = {name: peer["summary"] for name, peer in result["peers"].items()}
    offered = [point["offered_rps"] for point in next(iter(summaries.values()))]
    rows = [[name, *(_goodput(point) for point in points)] for name, points in summaries.items()]
    bare = f"{result['bare_pictures_per_s']:.0f}/s at its best batch size"
    told = f"Goodput per second in {result['slo_ms']:g} ms, p99 of the answers; bare student: {bare}."
    return [told, "", *_table(["server", *(f"{rate:.0f}/s offered" for rate in offered)], rows)]


def _goodput(point: Mapping[str, Any]) -> str:
    p99 = f", p99 {point['p99_ms']['mean']:.0f}" if point["p99_ms"] else ""
    return f"{point['goodput_rps']['mean']:.1f}{p99}{' (void)' if point['invalid'] else ''}"


SECTIONS: Mapping[str, tuple[str, Callable[[Result], list[str]]]] = {
    "student_vs_teacher": ("Student and teacher", _student),
    "step_budget": ("A training step beside its passes", _step_budget),
    "saturate": ("Saturated throughput", _saturate),
    "overhead": (
        "What the server adds to a picture",
        _spread(
            {
                "overhead_ms": "overhead: HTTP in to HTTP out, less model and PNG",
                "http_ms": "HTTP in to HTTP out",
                "model_ms": "model",
                "png_ms": "PNG",
            }
        ),
    ),
    "floor": ("What servers add that do less", _floor),
    "stages": ("The way of a picture", _stages),
    "decide": ("Decisions under a backlog", _decide),
    "durability": ("A sync before every answer", _durability),
    "capacity": ("The capacity planner beside a measurement", _capacity),
    "live": ("The live server beside the simulation", _live),
    "chaos": ("Chaos", _chaos),
    "fuzz": ("Requests drawn from the OpenAPI document", _verdict),
    "soak": ("Soak", _soak),
    "rolling": ("Rolling upgrade", _rolling),
    "peers": ("Beside other servers", _peers),
}
