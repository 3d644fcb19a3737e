"""One page about a run: its curves, and what the model wrote beside what it was rewarded with.

python report.py RUN                      # RUN/report.html
python report.py RUN --steps 0,100,190    # of samples.jsonl, these steps only

The page is one file and loads nothing. What a model wrote may hold anything, so every text is
escaped, and the browser is told to run no script but the page's own.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from string import Template

from PIL import Image

from harness.terminal import never_fail
from plot_rewards import REWARDS, RunError, curve, moving_average, read_metrics
from shapes import KINDS, Figure, Shape, canvas_of, check_image_size, default_style

WINDOW = 20  # steps of the moving average
TEXT_LIMIT = 4_000  # characters shown of a text
FULL_COLOR = 2.0  # advantage from which the color grows no stronger
CURVES = {  # key in metrics.jsonl: title, and range if it has one
    **REWARDS,
    "kl": ("KL to the reference, nats per token", None),
    "entropy": ("Entropy, nats per token", None),
    "completion_length_mean": ("Completion length, tokens", None),
}
COLUMNS = {  # of a completion: heading and number format
    "advantage": ("advantage", "+z.2f"),
    "total": ("sum", "z.2f"),
    "area_correctness": ("area", "z.2f"),
    "area_format": ("decimals", ".1f"),
    "xml_format": ("XML", ".1f"),
    "predicted": ("answer", ".2f"),
    "relative_error": ("error", ".1%"),
}
INK, LINE, DOT = "#000001", "#000002", "#000003"  # stand for the page's colors, light or dark
THEME = {INK: "var(--soft)", LINE: "rgb(var(--blue))", DOT: "rgb(var(--orange))"}
NOT_A_RECORD = (ValueError, TypeError, AttributeError, IndexError, ArithmeticError)


# --- reading ------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Return what a file holds. Raises `RunError`."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}") from error


def read_description(run: Path) -> tuple[dict, dict]:
    """Return from config.json how the run was made, and its knobs. Raises `RunError`."""
    path = run / "config.json"
    text = read_text(path)
    try:
        made = json.loads(text)
        knobs = made.pop("config")
        check_image_size(knobs["image_size"])
        made["versions"] = ", ".join(f"{key} {value}" for key, value in made["versions"].items())
    except (KeyError, *NOT_A_RECORD) as error:
        raise RunError(f"{path}: does not describe a run: {error!r}") from error
    return {key: value for key, value in made.items() if isinstance(value, str)}, knobs


def read_records(path: Path, parse: Callable[[dict], dict]) -> list[dict]:
    """Return what `parse` makes of each line of a file. Raises `RunError`.

    A last line without its end is one that is being written: it is left out.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            records.append(parse(json.loads(line)))
        except KeyError as error:
            raise RunError(f"{path}: line {number} has no {error}") from error
        except NOT_A_RECORD as error:
            raise RunError(f"{path}: line {number} is damaged: {error}") from error
    return records


def parse_evaluation(line: dict) -> dict:
    """Return a line of evaluations.jsonl as `curve` takes it, with the step that came before."""
    return {"step": int(line["steps_done"]) - 1, **{key: known(line.get(key)) for key in CURVES}}


def parse_group(line: dict, *, image_size: int) -> dict:
    """Return a line of samples.jsonl with its picture, as an address that holds it."""
    shape = Shape(**line["shape"])
    if shape.kind not in KINDS:
        raise ValueError(f"no shape is a {shape.kind!r}")
    return {
        "step": int(line["step"]),
        "kind": shape.kind,
        "size": [known(shape.width), known(shape.height)],
        "area": known(line["area"]),
        "image": png(canvas_of(image_size).draw(shape)),
        "completions": [parse_completion(completion) for completion in line["completions"]],
    }


def parse_completion(completion: dict) -> dict:
    """Return a completion's text, its numbers, and the sum of its rewards."""
    numbers = {key: known(completion[key]) for key in COLUMNS if key != "total"}
    total = sum(numbers[key] for key in ("area_correctness", "area_format", "xml_format"))
    return {"text": completion["text"], "total": total, **numbers}


def known(value: float | None) -> float:
    """Return a number of a run's files, nan for one that was not finite, or not there."""
    return math.nan if value is None else float(value)


def choose(groups: list[dict], steps: list[int] | None) -> list[dict]:
    """Return the groups of these steps; of all if None. Raises `RunError` for one without."""
    there = [group["step"] for group in groups]
    for step in steps or []:
        if step not in there:
            names = ", ".join(map(str, there)) or "none yet"
            raise RunError(f"--steps {step}: has no sample; those that have: {names}")
    return [group for group in groups if steps is None or group["step"] in steps]


# --- parts of the page --------------------------------------------------------------------


def escape(value) -> str:
    r"""Return a text as HTML that shows it and does nothing else, cut where it is too long.

    Characters without a look of their own are written as numbers: controls, turns of the direction
    of writing, halves of surrogate pairs.

    >>> escape('<a href="">\x00\u202e')
    '&lt;a href=&quot;&quot;&gt;⟨U+0000⟩⟨U+202E⟩'
    """
    text = str(value)
    visible = "".join(
        character if character.isprintable() or character in "\n\t" else f"⟨U+{ord(character):04X}⟩"
        for character in text[:TEXT_LIMIT]
    )
    rest = len(text) - TEXT_LIMIT
    return html.escape(visible) + (f"<em> … {rest:,} more characters</em>" if rest > 0 else "")


def number(value: float, form: str) -> str:
    """Return a number as HTML, a dash where it is not known.

    >>> number(-0.5, "+.2f"), number(0.051, ".1%"), number(2e9, ".2f"), number(math.nan, ".2f")
    ('&minus;0.50', '5.1 %', '2.00e+09', '&ndash;')
    """
    if not math.isfinite(value):
        return "&ndash;"
    text = f"{value:.2e}" if abs(value) >= 1e7 else f"{value:{form}}"
    return text.replace("-", "&minus;").replace("%", " %")


def terms_html(values: dict) -> str:
    """Return names and values as the inside of a description list."""
    pairs = [(escape(key.replace("_", " ")), escape(value)) for key, value in values.items()]
    return "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>\n" for key, value in pairs)


def group_html(group: dict) -> str:
    """Return one group: its picture and what is true of it, then its completions as sampled."""
    width, height = (number(value, ".1f") for value in group["size"])
    return GROUP.substitute(
        group,
        size=f"{width} &times; {height}",
        area=number(group["area"], ".2f"),
        headings="".join(f"<th>{heading}</th>" for heading, _ in COLUMNS.values()),
        completions="".join(map(completion_html, group["completions"])),
    )


def completion_html(completion: dict) -> str:
    """Return one completion as a table row in the color of its advantage."""
    advantage = completion["advantage"]
    side = "above" if advantage > 0 else "below" if advantage < 0 else "equal"
    strength = 0.0 if side == "equal" else min(1.0, abs(advantage) / FULL_COLOR)
    numbers = [number(completion[key], form) for key, (_, form) in COLUMNS.items()]
    data = f'data-sum="{completion["total"]:.2f}"'  # as shown: what reads 3.50 is found from 3.5
    return (
        f'<tr class="{side}" style="--strength: {strength:.2f}" {data}>'
        f"<td>{'</td><td>'.join(numbers)}</td>"
        f'<td class="text"><div>{escape(completion["text"])}</div></td></tr>\n'
    )


def png(image: Image.Image) -> str:
    """Return a picture as an address that holds it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve_html(key: str, steps: list[dict], evaluations: list[dict]) -> str:
    """Return a value's figure: of each step, averaged, and in the held-out evaluations."""
    with default_style(**{"svg.fonttype": "none", "svg.hashsalt": key}):  # ids unlike the others'
        drawing = svg(curve_figure(key, steps, evaluations))
    return f"<figure><figcaption>{CURVES[key][0]}</figcaption>{drawing}</figure>\n"


def curve_figure(key: str, steps: list[dict], evaluations: list[dict]) -> Figure:
    """Return that figure without its title."""
    _, limits = CURVES[key]
    figure = Figure(figsize=(4, 2), layout="constrained")
    axes = figure.add_subplot()
    x, y = curve(steps, key, "steps")
    axes.plot(x, y, color=LINE, alpha=0.3, linewidth=1)
    axes.plot(x, moving_average(y, WINDOW), color=LINE, linewidth=2)
    axes.plot(*curve(evaluations, key, "steps"), "o", color=DOT, markersize=4)
    if limits:
        air = 0.05 * (limits[1] - limits[0])
        axes.set_ylim(limits[0] - air, limits[1] + air)
    axes.tick_params(colors=INK, labelsize=7.5, length=0)
    axes.grid(color=INK, alpha=0.2, linewidth=0.5)
    axes.spines[:].set_visible(False)
    return figure


def svg(figure: Figure) -> str:
    """Return a figure as a part of the page, in the page's colors."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r'<g id="[\w.]+"', "<g", buffer.getvalue())
    for color, variable in THEME.items():
        text = text.replace(color, variable)
    return text[text.index("<svg") :]


# --- the page -----------------------------------------------------------------------------

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name</title>
<style>$style</style>
</head>
<body>
<h1>$name</h1>
<dl>$made</dl>
<details><summary>All knobs</summary><dl class="knobs">$knobs</dl></details>
<h2>Curves</h2>
<p>By steps. Faint: each step; strong: the mean of the last $window; dots: held-out plots, answered
greedily.</p>
<div class="curves">$curves</div>
<h2>Completions</h2>
<p>Color is the advantage: <b class="above">blue</b> completions earned more than their group's mean
and were made likelier, <b class="below">orange</b> ones earned less and were made less likely; it
is strongest from &plusmn;$full_color.</p>
<fieldset id="filters" hidden>
<label>step <input type="range" name="step" min="0" max="$count" value="0">
<output name="at"></output></label>
<label>class <select name="kind"><option value="">all</option>$kinds</select></label>
<label>sum <input type="number" name="least" step="0.5" placeholder="$least" aria-label="least sum">
to <input type="number" name="most" step="0.5" placeholder="$most" aria-label="largest sum"></label>
<label>text <input type="search" name="words"></label>
<output name="told"></output>
</fieldset>
$groups
<script>$script</script>
</body>
</html>
""")

GROUP = Template("""\
<section class="group" data-kind="$kind" data-step="$step">
<figure>
<img src="$image" alt="plot of a $kind">
<figcaption><b>Step $step</b><br>$kind, $size<br>true area $area</figcaption>
</figure>
<table>
<thead><tr>$headings<th class="text">completion</th></tr></thead>
<tbody>
$completions</tbody>
</table>
</section>
""")

STYLE = """
:root { color-scheme: light dark; --page: #f7f6f3; --card: #fff; --line: #e3e1dc; --ink: #22252a;
  --soft: #666a72; --blue: 0 104 172; --orange: 184 80 0; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1d2024; --line: #34383e;
  --ink: #e4e6e9; --soft: #9ba1aa; --blue: 86 172 236; --orange: 244 148 58; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { max-width: 80rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2 { margin: 0 0 .75rem; font-size: 1.75rem; font-weight: 650; line-height: 1.2; }
h2 { margin: 2.5rem 0 .4rem; font-size: 1.2rem; }
p { max-width: 52rem; margin: 0 0 1rem; }
p, dt, summary, th, label, [name=told] { color: var(--soft); }
p b { color: rgb(var(--hue)); }
.above { --hue: var(--blue); } .below { --hue: var(--orange); } .equal { --hue: 128 128 128; }
dl, dd, figure { margin: 0; }
dl div { display: grid; grid-template-columns: 6rem 1fr; }
.knobs { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .4rem; }
.knobs div { display: block; } .knobs dt { font-size: .8rem; }
summary { margin: .5rem 0; cursor: pointer; }
.curves figure, .group, fieldset { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: 1rem; }
.curves figure { padding: .75rem; }
figcaption { font-size: .9rem; }
svg, img { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
fieldset { position: sticky; top: .5rem; z-index: 1; display: flex; flex-wrap: wrap;
  gap: .5rem 1.25rem; align-items: center; margin: 0; padding: .6rem 1rem; }
label { display: flex; gap: .4rem; align-items: center; }
input, select { font: inherit; accent-color: rgb(var(--blue)); }
[type=number] { width: 4.5rem; } [type=search] { width: 9rem; } [name=at] { width: 2.5rem; }
.group { display: grid; grid-template-columns: 14rem 1fr; gap: 1.25rem; margin-top: 1rem;
  padding: 1rem; }
.group img { max-width: 14rem; margin-bottom: .5rem; border-radius: .3rem; }
table { width: 100%; table-layout: fixed; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
tbody tr { background: rgb(var(--hue) / calc(.4 * var(--strength)));
  border-bottom: 2px solid var(--card); box-shadow: inset 3px 0 rgb(var(--hue)); }
th, td { padding: .3rem .4rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { width: 4.4rem; font-size: .8rem; font-weight: 400; } th:first-child { width: 5.2rem; }
td:nth-child(-n+2) { font-weight: 650; }
th.text { width: auto; }
.text { padding-left: 1rem; text-align: left; white-space: normal; }
.text div { max-height: 20rem; overflow: auto; white-space: pre-wrap;
  font: .85rem/1.6 ui-monospace, monospace; }
@media (max-width: 55rem) {
  fieldset { position: static; }
  .group { grid-template-columns: 1fr; }
  .group figure { display: flex; flex-wrap: wrap; gap: .5rem 1rem; }
  table, thead, tbody { display: block; }
  tr { display: grid; grid-template-columns: 1.4fr 1fr 1fr 1.3fr .8fr 1.2fr 1.1fr; }
  th, td { padding: .3rem .15rem; font-size: .72rem; }
  th, th:first-child { width: auto; font-size: .62rem; }
  .text { grid-column: 1 / -1; padding: 0 .5rem .4rem; } th.text { display: none; }
}
"""

SCRIPT = """
const filters = document.getElementById("filters");
const { step, at, kind, least, most, words, told } = filters.elements;
const groups = [...document.querySelectorAll(".group")];
const rows = [...document.querySelectorAll("tbody tr")];

function isWanted(row) {
  const group = row.closest(".group"), sum = Number(row.dataset.sum);
  return (step.value === "0" || group === groups[step.value - 1])
    && (kind.value === "" || kind.value === group.dataset.kind)
    && !(sum < least.valueAsNumber) && !(sum > most.valueAsNumber)  // an empty field is NaN
    && row.lastElementChild.textContent.toLowerCase().includes(words.value.toLowerCase());
}

function filter() {
  for (const row of rows) row.hidden = !isWanted(row);
  for (const group of groups) group.hidden = !group.querySelector("tbody tr:not([hidden])");
  at.value = step.value === "0" ? "all" : groups[step.value - 1].dataset.step;
  told.value = rows.filter(row => !row.hidden).length + " of " + rows.length + " completions";
}

filters.addEventListener("input", filter);
filters.hidden = false;
filter();
"""


def policy() -> str:
    """Return what the browser may do for the page: run its one script, and load nothing."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{nothing}; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def page(run: Path, steps: list[int] | None) -> str:
    """Return the page about a run, with the groups of these steps. Raises `RunError`."""
    made, knobs = read_description(run)
    metrics = read_metrics(run)
    evaluations = read_records(run / "evaluations.jsonl", parse_evaluation)
    parse = partial(parse_group, image_size=knobs["image_size"])
    groups = choose(read_records(run / "samples.jsonl", parse), steps)
    return PAGE.substitute(
        policy=policy(),
        style=STYLE,
        script=SCRIPT,
        name=escape(run.resolve().name),
        made=terms_html(made),
        knobs=terms_html(knobs),
        window=WINDOW,
        curves="".join(curve_html(key, metrics, evaluations) for key in CURVES),
        full_color=f"{FULL_COLOR:g}",
        count=len(groups),
        kinds="".join(f"<option>{kind}</option>" for kind in KINDS),
        least=sum(limits[0] for _, limits in REWARDS.values()),
        most=sum(limits[1] for _, limits in REWARDS.values()),
        groups="".join(map(group_html, groups)),
    )


# --- command ------------------------------------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises `OSError`."""
    unfinished = path.parent / f".{path.name}.partial"
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raise `RunError` unless a file can be written there, as far as that can be told before."""
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise RunError(f"--out {path}: must be a file, in a folder that can be written to")


def step_numbers(text: str | None) -> list[int] | None:
    """Return the numbers in "0,100,190". Raises `RunError`."""
    try:
        return None if text is None else [int(step) for step in text.split(",")]
    except ValueError as error:
        raise RunError(f"--steps {text}: must be step numbers like 0,100,190") from error


def main(arguments: list[str] | None = None) -> None:
    """Write the page about the run named on the command line."""
    never_fail()
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    parser.add_argument("--steps", metavar="N,N,...", help="default: all of samples.jsonl")
    args = parser.parse_args(arguments)
    out = args.out or args.run / "report.html"
    try:
        steps = step_numbers(args.steps)
        if args.out or os.path.isdir(args.run):
            check_place(out)
        write_whole(out, page(args.run, steps))
    except RunError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{out}: cannot be written: {error.strerror or error}"
    else:
        print(out)
        return
    parser.error(" ".join(problem.split()))


if __name__ == "__main__":
    main()
