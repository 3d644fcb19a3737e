"""Write one HTML page about a run: its curves, and sampled completions token by token.

python report.py RUN                      # writes RUN/report.html
python report.py RUN --steps 0,50,110     # shows only these steps of samples.jsonl

The page is a single file and loads nothing else. A completion can contain anything, so Jinja2
escapes every text, and the page's security policy stops every script but its own.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from harness.terminal import ignore_output_errors
from plot_rewards import (
    METRICS,
    REWARDS,
    PlotError,
    curve,
    moving_average,
    read_metrics,
    show_range,
)
from shapes import Figure, Shape, canvas_of, check_image_size, default_style

TEMPLATE = Path(__file__).resolve().with_name("report.html.j2")
WINDOW = 20  # steps in the moving average
TEXT_LIMIT = 4_000  # characters shown of each text
FULL_COLOR = 2.0  # the advantage at which a row's color is strongest
FULL_SHARE = 0.99  # share of the tokens that change less than one in the strongest color
MOVED = 4  # tokens of a group that are listed because they moved most, up and down each
BEFORE = 10  # characters shown before such a token
CHECKS = {  # key of a completion: what the page calls it; older runs lack them
    "shape_named": "names the class",
    "answer_follows": "the answer follows",
    "arithmetic_right": "the arithmetic is right",
}
COLUMNS = {  # key of a completion: heading and number format
    "advantage": ("advantage", "+z.2f"),
    "total": ("sum", "z.2f"),
    "area_correctness": ("area", "z.2f"),
    "area_format": ("decimals", ".1f"),
    "xml_format": ("XML", ".1f"),
    "predicted": ("answer", ".2f"),
    "relative_error": ("error", ".1%"),
}
INK, LINE, DOT = "#000001", "#000002", "#000003"  # placeholders: the page may be light or dark
THEME = {INK: "var(--soft)", LINE: "rgb(var(--blue))", DOT: "rgb(var(--orange))"}
NOT_A_RECORD = (ValueError, TypeError, AttributeError, IndexError, ArithmeticError)
NOT_A_RECORD += (RecursionError,)  # JSON of a hostile depth


# --- reading ------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Return the contents of a file. Raises `PlotError`."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror or error}") from error


def read_description(run: Path) -> tuple[dict, dict]:
    """Return how the run was made and its options, from config.json. Raises `PlotError`."""
    path = run / "config.json"
    text = read_text(path)
    try:
        made = json.loads(text)
        options = made.pop("config")
        check_image_size(options["image_size"])
        made["versions"] = ", ".join(f"{key} {value}" for key, value in made["versions"].items())
        if "resumed" in made:
            resumes = [f"after {each['steps_done']}: {each['command']}" for each in made["resumed"]]
            made["resumed"] = "; ".join(resumes)
    except (KeyError, *NOT_A_RECORD) as error:
        raise PlotError(f"{path}: does not describe a run: {error!r}") from error
    return {key: value for key, value in made.items() if isinstance(value, str)}, options


def read_records(path: Path, parse: Callable[[dict], dict]) -> list[dict]:
    """Return the result of `parse` for each line of a file. Raises `PlotError`.

    Skips a last line that has no newline: the run is still writing it.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            records.append(parse(json.loads(line)))
        except KeyError as error:
            raise PlotError(f"{path}: line {number} has no {error}") from error
        except NOT_A_RECORD as error:
            raise PlotError(f"{path}: line {number} is damaged: {error}") from error
    return records


def parse_evaluation(line: dict) -> dict:
    """Return a line of evaluations.jsonl as a step that `curve` can read.

    `curve` plots step n at n + 1, so an evaluation after n steps becomes step n - 1.
    """
    return {"step": int(line["steps_done"]) - 1, **{key: known(line.get(key)) for key in METRICS}}


def parse_group(line: dict, *, image_size: int) -> dict:
    """Return a line of samples.jsonl as the template needs it, with the plot as a data URL."""
    shape = Shape(**line["shape"])
    if not isinstance(shape.kind, str):
        raise ValueError(f"no shape is a {shape.kind!r}")
    return {
        "step": int(line["step"]),
        "kind": shape.kind,
        "width": known(shape.width),
        "height": known(shape.height),
        "area": known(line["area"]),
        "image": png(canvas_of(image_size).draw(shape)),
        "completions": [parse_completion(completion) for completion in line["completions"]],
    }


def parse_completion(completion: dict) -> dict:
    """Return a completion's text, its numbers, the sum of its rewards and what is true of it."""
    if not isinstance(completion["text"], str):
        raise ValueError(f"the text of a completion cannot be {completion['text']!r}")
    numbers = {key: known(completion[key]) for key in COLUMNS if key != "total"}
    checks = {name: completion.get(key) for key, name in CHECKS.items()}
    tokens = parse_tokens(completion["text"], completion.get("tokens"))  # none in older runs
    if tokens:
        tokens["ends"] = completion["truncated"] is False and not characters_cut(completion["text"])
    rewards = (numbers[key] for key in ("area_correctness", "area_format", "xml_format"))
    weights = completion.get("weights", (1, 1, 1))  # none in older runs
    total = sum(weight * reward for weight, reward in zip(weights, rewards, strict=True))
    named = {"text": completion["text"], "total": total, "checks": checks, "tokens": tokens}
    return named | numbers


def parse_tokens(text: str, tokens: dict | None) -> dict | None:
    """Return what the page shows of a completion's tokens, one list entry each; None if unknown.

    `texts`, `old` log-probs, `change` of the log-probs by the update, `k3` or None without a
    reference, and `weights`. Tokens beyond the limit of a text are left out. `total` is the change
    of the whole completion.
    """
    if tokens is None or not "".join(tokens["texts"]).startswith(text):
        return None
    texts = tokens["texts"]
    old, new = ([known(value) for value in tokens[key]] for key in ("old_logprobs", "new_logprobs"))
    found = {
        "texts": [visible(each) for each in texts],
        "old": old,
        "change": [after - before for before, after in zip(old, new, strict=True)],
        "k3": [known(value) for value in tokens["k3"]] if "k3" in tokens else None,
        "weights": [known(value) for value in tokens["weights"]],
    }
    if any(len(each) != len(texts) for each in found.values() if each is not None):
        raise ValueError("the lists about its tokens differ in length")
    total = sum(found["change"])
    begins = accumulate(map(len, texts), initial=0)
    shown = sum(begin < TEXT_LIMIT for begin in [*begins][:-1])
    return {key: each and each[:shown] for key, each in found.items()} | {"total": total}


def known(value: float | None) -> float:
    """Return a number from a run's files, or nan if the run has none."""
    return math.nan if value is None else float(value)


def choose(groups: list[dict], steps: list[int] | None) -> list[dict]:
    """Return the groups of these steps, or all of them if `steps` is None.

    Raises `PlotError` if a step has no group.
    """
    there = [group["step"] for group in groups]
    for step in steps or []:
        if step not in there:
            names = ", ".join(map(str, there)) or "none yet"
            raise PlotError(f"--steps {step}: has no sample; those that have: {names}")
    return [group for group in groups if steps is None or group["step"] in steps]


# --- tokens -------------------------------------------------------------------------------


def full_change(groups: list[dict]) -> float | None:
    """Return the change of a log-prob at which a token's color is strongest, with two digits.

    None if no group has tokens.
    """
    told = [row["tokens"] for group in groups for row in group["completions"] if row["tokens"]]
    changes = [abs(each) for tokens in told for each in tokens["change"] if math.isfinite(each)]
    changes.sort()
    if not told:
        return None
    largest = changes[math.ceil(FULL_SHARE * len(changes)) - 1] if changes else 0.0
    return float(f"{max(largest, 1e-6):.1e}")


def moved_most(completions: list[dict]) -> dict[str, list[dict]]:
    """Return the tokens of a group whose log-probs the update raised and lowered most.

    Each has its text, the end of the text before it, and the change. Completions that begin alike
    share their tokens: each is listed once.
    """
    moves = {
        ("".join(tokens["texts"][:place]), tokens["texts"][place]): change
        for tokens in (row["tokens"] for row in completions)
        if tokens
        for place, change in enumerate(tokens["change"])
        if math.isfinite(change)
    }
    ordered = sorted(moves.items(), key=itemgetter(1))
    lowered = [move for move in ordered[:MOVED] if move[1] < 0]
    raised = [move for move in ordered[: -MOVED - 1 : -1] if move[1] > 0]
    return {
        name: [
            {"before": before[-BEFORE:], "text": text, "change": change}
            for (before, text), change in chosen
        ]
        for name, chosen in (("raised most", raised), ("lowered most", lowered))
    }


def compact(completions: list[dict]) -> list[dict | None]:
    """Return a group's tokens for the page's script: short keys, few digits, equal weights once.

    >>> tokens = {"texts": ["a"], "old": [-0.25], "change": [1 / 3], "k3": None, "weights": [0.5]}
    >>> compact([{"tokens": {**tokens, "ends": False}}])
    [{'t': ['a'], 'l': [-0.25], 'c': [0.333], 'k': None, 'w': 0.5, 'ends': False}]
    """
    return [
        tokens
        and {
            "t": tokens["texts"],
            "l": [short(each, ".4g") for each in tokens["old"]],
            "c": [short(each) for each in tokens["change"]],
            "k": tokens["k3"] and [short(each) for each in tokens["k3"]],
            "w": equal_once([short(each) for each in tokens["weights"]]),
            "ends": tokens["ends"],
        }
        for tokens in (row["tokens"] for row in completions)
    ]


def short(value: float, form: str = ".3g") -> float | None:
    """Return the value with few significant digits, or None if it is not finite."""
    return float(f"{value:{form}}") if math.isfinite(value) else None


def equal_once(values: list) -> list | float | None:
    """Return the one value that all are, or the list."""
    return values[0] if values and values.count(values[0]) == len(values) else values


# --- pictures -----------------------------------------------------------------------------


def png(image: Image.Image) -> str:
    """Return an image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_curve(key: str, steps: list[dict], evaluations: list[dict]) -> Markup:
    """Return a drawing of one value: each step, the moving average and the evaluations."""
    with default_style(**{"svg.fonttype": "none", "svg.hashsalt": key}):  # no id occurs twice
        return svg(curve_figure(key, steps, evaluations))


def curve_figure(key: str, steps: list[dict], evaluations: list[dict]) -> Figure:
    """Return the figure for `draw_curve`, which has no title: the page shows one above it."""
    _, limits = METRICS[key]
    figure = Figure(figsize=(4, 2), layout="constrained")
    axes = figure.add_subplot()
    x, y = curve(steps, key, "steps")
    axes.plot(x, y, color=LINE, alpha=0.4, linewidth=1)
    axes.plot(x, moving_average(y, WINDOW), color=LINE, linewidth=2)
    axes.plot(*curve(evaluations, key, "steps"), "o", color=DOT, markersize=4)
    show_range(axes, limits)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=INK, labelsize=7.5, length=0)
    axes.grid(color=INK, alpha=0.2, linewidth=0.5)
    axes.spines[:].set_visible(False)
    return figure


def svg(figure: Figure) -> Markup:
    """Return a figure as an SVG element in the page's colors.

    The page trusts it: matplotlib wrote it, and it contains no text from the run.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r'<g id="[\w.]+"', "<g", buffer.getvalue())
    for color, variable in THEME.items():
        text = text.replace(color, variable)
    return Markup(text[text.index("<svg") :])


# --- filters for the template: plain text in, plain text out; Jinja2 escapes it -----------


def visible(value: object) -> str:
    r"""Return the first `TEXT_LIMIT` characters of a text, with invisible ones as code points.

    That covers control characters, marks that change the writing direction, and lone surrogates.

    >>> visible('<b>\x00\u202e\n')
    '<b>⟨U+0000⟩⟨U+202E⟩\n'
    """
    return "".join(
        character if character.isprintable() or character in "\n\t" else f"⟨U+{ord(character):04X}⟩"
        for character in str(value)[:TEXT_LIMIT]
    )


def characters_cut(value: object) -> int:
    """Return how many characters of a text `visible` leaves out."""
    return max(0, len(str(value)) - TEXT_LIMIT)


def number(value: float, form: str) -> str:
    """Return a number in this format, with a real minus sign, or a dash if it is not finite.

    >>> number(0.051, ".1%"), number(2e9, ".2f")
    ('5.1 %', '2.00e+09')
    """
    if not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{value:.2e}" if abs(value) >= 1e7 else f"{value:{form}}"
    return text.replace("-", "\N{MINUS SIGN}").replace("%", " %")


def side(advantage: float) -> str:
    """Return the CSS class of a row: "above", "below" or "equal" to its group's mean."""
    return "above" if advantage > 0 else "below" if advantage < 0 else "equal"


def strength(advantage: float) -> float:
    """Return how strong the color of a row is, from 0 to 1."""
    return 0.0 if math.isnan(advantage) else min(1.0, abs(advantage) / FULL_COLOR)


def content_security_policy(script: str) -> str:
    """Return a policy that lets the page run this script, and load nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'"
    return f"{nothing}; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


# --- the page -----------------------------------------------------------------------------


def template() -> Template:
    """Return the page's template. It escapes every value that is not `Markup`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    filters = (visible, characters_cut, number, side, strength, content_security_policy)
    filters += (moved_most, compact)
    environment.filters.update({function.__name__: function for function in filters})
    return environment.get_template(TEMPLATE.name)


def content(run: Path, steps: list[int] | None) -> dict:
    """Return the values that the template needs for a run. Raises `PlotError`.

    With `steps`, `groups` has only the groups of these steps.
    """
    made, options = read_description(run)
    metrics = read_metrics(run)
    evaluations = read_records(run / "evaluations.jsonl", parse_evaluation)
    parse = partial(parse_group, image_size=options["image_size"])
    groups = choose(read_records(run / "samples.jsonl", parse), steps)
    return {
        "name": run.resolve().name,
        "made": made,
        "options": options,
        "window": WINDOW,
        "curves": {
            METRICS[key][0]: draw_curve(key, metrics, evaluations)
            for key in METRICS
            if key not in CHECKS or any(step.get(key) is not None for step in metrics)
        },
        "full_color": FULL_COLOR,
        "full_change": full_change(groups),
        "kinds": sorted({group["kind"] for group in groups}),
        "least": sum(limits[0] for _, limits in REWARDS.values()),
        "most": sum(limits[1] for _, limits in REWARDS.values()),
        "columns": COLUMNS,
        "groups": groups,
    }


def page(run: Path, steps: list[int] | None) -> str:
    """Return the page about a run, with the groups of these steps. Raises `PlotError`."""
    return template().render(content(run, steps))


# --- command ------------------------------------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    """Write a file completely, or leave it as it was. Raises `OSError`."""
    unfinished = path.parent / f".{path.name}.partial"
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raise `PlotError` if it is already clear that the file cannot be written."""
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise PlotError(f"{path}: must be a file in a writable folder; --out names another one")


def step_numbers(text: str | None) -> list[int] | None:
    """Return the numbers in a list such as "0,50,110". Raises `PlotError`."""
    try:
        return None if text is None else [int(step) for step in text.split(",")]
    except ValueError as error:
        raise PlotError(f"--steps {text}: must be step numbers like 0,50,110") from error


def main(arguments: list[str] | None = None) -> None:
    """Write the page about the run that the command line names."""
    ignore_output_errors()
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the page; default: RUN/report.html"
    )
    parser.add_argument(
        "--steps", metavar="N,N,...", help="steps to show; default: all in samples.jsonl"
    )
    args = parser.parse_args(arguments)
    out = args.out or args.run / "report.html"
    try:
        steps = step_numbers(args.steps)
        if args.out or os.path.isdir(args.run):
            check_place(out)
        write_whole(out, page(args.run, steps))
    except PlotError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{out}: cannot be written: {error.strerror or error}"
    else:
        print(out)
        return
    parser.error(" ".join(problem.split()))


if __name__ == "__main__":
    main()
