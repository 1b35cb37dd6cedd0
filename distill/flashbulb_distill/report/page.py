"""The report as one HTML text: styles and pictures inside, no script, nothing from elsewhere."""

import json
from collections.abc import Mapping, Sequence
from html import escape

from .chart import line_chart
from .collect import Contents, Json, Stage, estimates
from .pictures import Drawn, data_uri

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #6b6b70; --line: #d9d9de; --paper: #fff; --band: #2e9e4f22; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --soft: #a0a0a8; --line: #3a3a40; --paper: #151517; --band: #58d07a22; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1100px;
  margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p.soft, caption, .soft { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; } code, pre { font: 13px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .7rem; border-radius: 6px; max-height: 30rem; }
table.pictures td, table.pictures th { padding: 2px; border: 0; vertical-align: middle; }
table.pictures th { font-weight: normal; font-size: 12px; color: var(--soft); max-width: 8rem; }
table.pictures img { display: block; image-rendering: auto; min-width: 64px; max-width: 220px; }
.prompts { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: .6rem; }
svg { width: 100%; height: auto; } svg .title { font-size: 12px; fill: var(--ink); }
svg .tick { font-size: 9px; fill: var(--soft); } svg .end { text-anchor: end; } svg .grid { stroke: var(--line); }
svg .band { fill: var(--band); } svg .mark { stroke: #c0392b; stroke-dasharray: 3 2; }
svg polyline { fill: none; stroke-width: 1.4; }
.fault { color: #c0392b; font-weight: 600; } .ok { color: #2e8b57; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(
    contents: Contents, drawn: Sequence[Drawn], prompts: Sequence[str], seeds: Sequence[int], machine: str
) -> str:
    """Return the whole page. Parts that the run has nothing for say so in a line, or are left out."""
    recipe = contents.record.get("recipe", {})
    name = f"{recipe.get('name', 'run')} {recipe.get('version', '')}".strip()
    stages = " → ".join(stage.name for stage in contents.stages)
    teacher = f"{recipe.get('family')} teacher {recipe.get('teacher')}"
    made = f"{teacher} · {stages} · commit {contents.record.get('commit')}"
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{escape(made)}</p>',
        _pictures(drawn, prompts, seeds),
        _metrics(contents),
        _beside_teacher(drawn),
        _cost(contents, drawn, machine),
        *[_health(stage) for stage in contents.stages],
        _doctor(contents),
        _provenance(contents),
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        f"<title>{escape(name)}: distillation report</title><style>{STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _pictures(drawn: Sequence[Drawn], prompts: Sequence[str], seeds: Sequence[int]) -> str:
    if not drawn:
        return "<h2>Pictures</h2><p class='soft'>None were drawn.</p>"
    blocks = []
    for number, prompt in enumerate(prompts):
        rows = []
        for model in drawn:
            cells = "".join(
                f'<td><img alt="{escape(model.name)}, seed {seed}" '
                f'src="{data_uri(model.images[number, place])}"></td>'
                for place, seed in enumerate(seeds)
            )
            rows.append(f"<tr><th>{escape(model.name)}<br>{_steps(model.steps)}</th>{cells}</tr>")
        heads = "".join(f"<th>seed {seed}</th>" for seed in seeds)
        blocks.append(
            f'<div class="wide"><h3>{escape(prompt)}</h3><table class="pictures"><tr><th></th>{heads}</tr>'
            f"{''.join(rows)}</table></div>"
        )
    told = (
        "Prompts evenly through the training's and seeds 0, 1, …: nothing was picked. A column is one noise."
    )
    return f"<h2>Pictures</h2><p class='soft'>{told}</p><div class='prompts'>{''.join(blocks)}</div>"


def _metrics(contents: Contents) -> str:
    if not contents.evaluations:
        return "<h2>Measured</h2><p class='soft'>The recipe has no evaluation.</p>"
    columns = {name: estimates(found) for name, found in contents.evaluations.items()}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [
        [name.replace("_", " "), *(_estimate(column.get(name)) for column in columns.values())]
        for name in names
    ]
    note = "<p class='soft'>With 95 % intervals over prompts, on seeds that training never used.</p>"
    return f"<h2>Measured</h2>{note}{_table(['', *columns], rows)}"


def _beside_teacher(drawn: Sequence[Drawn]) -> str:
    if not drawn:
        return ""
    teacher = drawn[0]
    rows = []
    for model in drawn:
        found = model.compare(teacher)
        figures = [f"{found[name]:.2f}" for name in ("diversity", "contrast", "colour_drift")]
        rows.append([model.name, _steps(model.steps), *figures])
    heads = ["", "", "diversity across seeds", "contrast", "colour drift"]
    note = "<p class='soft'>On the pictures above, over the teacher's; colour drift in its standard deviations.</p>"
    return f"<h2>Beside the teacher</h2>{note}{_table(heads, rows)}"


def _cost(contents: Contents, drawn: Sequence[Drawn], machine: str) -> str:
    trained = [
        [
            stage.name,
            str(stage.lines[-1]["step"]),
            _time(stage.seconds),
            _time(stage.seconds / stage.lines[-1]["step"]),
        ]
        for stage in contents.stages
        if stage.lines
    ]
    latency = [
        [
            model.name,
            _steps(model.steps),
            f"{1000 * model.seconds:.1f} ms",
            f"{drawn[0].seconds / model.seconds:.1f} ×",
        ]
        for model in drawn
    ]
    total = sum(stage.seconds for stage in contents.stages)
    return (
        f"<h2>Cost</h2><p>{_time(total)} of training on one process of this run.</p>"
        f"{_table(['stage', 'steps', 'time', 'a step'], trained)}"
        "<h2>Latency</h2><p class='soft'>Of one picture drawn alone, decoding included, and text encoding where the "
        f"family's encoder is small; in torch on {escape(machine)}: the median.</p>"
        f"{_table(['', '', 'a picture', 'faster'], latency)}"
    )


def _health(stage: Stage) -> str:
    if not stage.lines:
        return ""
    guard = stage.guard or {}
    events = guard.get("events", [])
    bands = guard.get("bands", [])
    marks = [(event["step"], f"{event['action']}: {event['reason']}") for event in events]
    series: dict[str, list[tuple[float, float]]] = stage.series()
    for look in guard.get("looks", []):
        for name, value in look["figures"].items():
            if name not in stage.series():
                series.setdefault(name, []).append((look["step"], value))
    grouped: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, points in series.items():
        title = name.partition("_t0.")[0] if "_t0." in name else name
        grouped.setdefault(title, {})[name] = points
    charts = []
    for title, lines in grouped.items():
        band: Json = next((b for b in bands if _covers(b["figure"], next(iter(lines)))), {})
        charts.append(line_chart(title, lines, band=(band.get("low"), band.get("high")), marks=marks))
    told = "".join(f"<li>{_event(event)}</li>" for event in events)
    acts = f"<ul>{told}</ul>" if told else "<p class='soft'>The guard had nothing to do.</p>" if guard else ""
    return f"<h2>Health of {escape(stage.name)}</h2>{acts}<div class='charts'>{''.join(charts)}</div>"


def _event(event: Json) -> str:
    back = "" if event.get("to_step") is None else f" to step {event['to_step']}"
    return f"step {event['step']}: <b>{escape(event['action'])}</b>{back}: {escape(event['reason'])}"


def _doctor(contents: Contents) -> str:
    if contents.doctor is None:
        return ""
    rows = [
        f"<tr><td class='{'fault' if f['verdict'] == 'fault' else 'ok'}'>{escape(f['verdict'])}</td>"
        f"<td>{escape(f['check'])}</td><td>{escape(f['message'])}</td></tr>"
        for f in contents.doctor["findings"]
    ]
    return f"<h2>Doctor</h2><table>{''.join(rows)}</table>"


def _provenance(contents: Contents) -> str:
    record, manifest = contents.record, contents.manifest or {}
    hashes = {"recipe": record.get("sha256"), **manifest.get("parents", {})}
    hashes |= {name: entry["sha256"] for name, entry in manifest.get("files", {}).items()}
    rows = [[name, f"<code>{escape(str(value))}</code>"] for name, value in hashes.items()]
    parity = {name: _number(value) for name, value in manifest.get("parity", {}).items()}
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    told = f"<p class='soft'>Python {escape(str(record.get('python')))}, {escape(versions)}.</p>"
    export = (
        f"<h3>Parity of the export</h3>{_table(['', ''], [list(item) for item in parity.items()])}"
        if parity
        else ""
    )
    recipe = escape(json.dumps(record.get("recipe", {}), indent=1))
    return (
        f"<h2>Made of</h2>{told}{_table(['', 'sha256'], rows, raw=True)}{export}"
        f"<h3>Resolved recipe</h3><pre>{recipe}</pre>"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, raw: bool = False) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if raw else escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _covers(figure: str, name: str) -> bool:
    return name.startswith(figure[:-1]) if figure.endswith("*") else name == figure


def _estimate(found: tuple[float, float | None, float | None] | None) -> str:
    if found is None:
        return "–"
    value, low, high = found
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _number(value: Mapping[str, float] | float | bool) -> str:
    return str(value) if isinstance(value, bool) else f"{value:.2e}"


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
