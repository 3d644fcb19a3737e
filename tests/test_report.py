"""report.py on fabricated run folders. The tests parse the page as a browser would."""

import base64
import dataclasses
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from jinja2 import UndefinedError
from matplotlib import rc_context
from PIL import Image

import report
from plot_rewards import METRICS, REWARDS, curve
from report import TEXT_LIMIT, characters_cut, number, parse_evaluation, visible
from shapes import ShapeSpec, canvas_of, make_example

EXAMPLES = [make_example(ShapeSpec(), seed=0, split="train", index=i) for i in range(2)]
HOSTILE = {  # what a model may write: what the reader must see, if not the same
    "<script>document.title = 'taken'</script>": None,
    "<img src=x onerror=\"document.title = 'taken'\">": None,
    "</div></td></tr></table></section></body></html>": None,
    '"><svg onload="document.title = \'taken\'">': None,
    "' onclick='alert(1)' style='position: fixed; inset: 0": None,
    "<!-- <plaintext> <textarea> </title></style></script><script>": None,
    "]]> <![CDATA[ &lt; &#60; &amp;": None,
    "{{ 7 * 7 }} {% raw %} {# gone #} ${script} $name {0} %s": None,
    "NUL \0, escape \x1b[31m, return \r": "NUL ⟨U+0000⟩, escape ⟨U+001B⟩[31m, return ⟨U+000D⟩",
    "from the right: \u202e \u2066 \u200f": "from the right: ⟨U+202E⟩ ⟨U+2066⟩ ⟨U+200F⟩",
    "half a character: \ud800": "half a character: ⟨U+D800⟩",
    "line\n\ttab, 面積 · площадь · 🟦": None,
}


def completion(text: str = "<answer>1.00</answer>", **values) -> dict:
    values = {"area_correctness": 1.25, "area_format": 0.5, "xml_format": 0.0, **values}
    return {
        "text": text,
        "truncated": False,
        **{"predicted": 300.0, "relative_error": 0.291, "advantage": 0.5, **values},
    }


def sample(step: int, *completions: dict) -> dict:
    example = EXAMPLES[step // 10 % 2]
    shape = dataclasses.asdict(example.shape)
    named = {"step": step, "index": example.index, "area": example.area, "shape": shape}
    return {**named, "completions": list(completions) or [completion()]}


def metrics(step: int) -> dict:
    values = {"kl": 0.1, "entropy": None, "completion_length_mean": 30.0}
    return {"step": step, "prompts": 8 * (step + 1), **dict.fromkeys(REWARDS, 0.2), **values}


@pytest.fixture
def make_run(tmp_path):
    def make(*samples: dict, name: str = "run", options: dict | None = None, **made):
        folder = tmp_path / name
        folder.mkdir()
        made = {"command": "python main.py", "versions": {"torch": "2.1", "numpy": "2.2"}, **made}
        config = {"config": {"image_size": 224, "seed": 7, **(options or {})}, **made}
        (folder / "config.json").write_text(json.dumps(config))
        evaluations = [{"steps_done": n, **dict.fromkeys(REWARDS, 0.3)} for n in (0, 15)]
        lines = {"metrics": map(metrics, range(30)), "evaluations": evaluations, "samples": samples}
        for file, records in lines.items():
            text = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{file}.jsonl").write_text(text)
        return folder

    return make


class Page(HTMLParser):
    """A page's elements, its comments and declarations, and the text after each opening tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.others, self.texts = [], [], [("", "")]
        self.handle_comment = self.handle_pi = self.unknown_decl = self.others.append
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append((tag, ""))

    def handle_data(self, data):
        tag, text = self.texts[-1]
        self.texts[-1] = (tag, text + data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text_of(self, tag: str) -> list[str]:
        return [text.strip() for name, text in self.texts if name == tag]


def page_of(folder, *flags: str) -> Page:
    report.main([str(folder), *flags])
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def refused(folder, capsys, *flags: str) -> str:
    """The program's error message, which must be one line."""
    with pytest.raises(SystemExit) as stop:
        report.main([str(folder), *flags])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1
    return error


# --- what is on the page ------------------------------------------------------------------


def test_a_completion_stands_beside_its_rewards(make_run):
    first = completion("one", area_correctness=-1.254, xml_format=0.5, advantage=-0.5)
    unread = completion("two", predicted=None, relative_error=1.0, advantage=None)
    page = page_of(make_run(sample(10, first, unread)))
    assert page.text_of("th")[:3] == ["advantage", "sum", "area"]
    numbers = [text for text in page.text_of("td") if text]
    assert numbers[:7] == ["−0.50", "−0.25", "−1.25", "0.5", "0.5", "300.00", "29.1 %"]  # noqa: RUF001
    assert numbers[7:] == ["–", "1.75", "1.25", "0.5", "0.0", "–", "100.0 %"]  # noqa: RUF001
    assert page.text_of("span") == ["one", "two"]


def test_a_group_shows_its_plot(make_run):
    page = page_of(make_run(sample(0), sample(10)))
    for image, example in zip(page.all("img"), EXAMPLES, strict=True):
        picture = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        expected = canvas_of(224).draw(example.shape)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture))), expected)
    shapes = [example.shape for example in EXAMPLES]
    assert [group["data-kind"] for group in page.all("section")] == [s.kind for s in shapes]
    for text, shape in zip(page.text_of("br")[1::2], shapes, strict=True):
        assert text == f"true area {shape.area:.2f}"


def test_color_tells_the_sign_and_the_size_of_the_advantage(make_run):
    advantages = [1.0, -0.5, 0.0, 9.0, None]
    group = sample(0, *[completion(advantage=advantage) for advantage in advantages])
    rows = page_of(make_run(group)).all("tr")[1:]
    assert [row["class"] for row in rows] == ["above", "below", "equal", "above", "equal"]
    strengths = [float(row["style"].removeprefix("--strength: ")) for row in rows]
    assert strengths == [0.5, 0.25, 0.0, 1.0, 0.0]


def test_filters_find_the_sum_and_the_step(make_run):
    page = page_of(make_run(sample(0, completion(), completion(area_correctness=None)), sample(10)))
    assert [row.get("data-sum") for row in page.all("tr")] == [None, "1.75", "nan", None, "1.75"]
    assert [group["data-step"] for group in page.all("section")] == ["0", "10"]
    sliders = [field for field in page.all("input") if field["type"] == "range"]
    assert sliders == [{"type": "range", "name": "step", "min": "0", "max": "2", "value": "0"}]
    assert "hidden" in page.all("fieldset")[0]  # until the script runs


def test_curves_and_held_out_evaluations_are_drawn(make_run):
    page = page_of(make_run(sample(0)))
    assert len(page.all("svg")) == 6
    assert page.text_of("figcaption")[3] == "KL to the reference, nats per token"
    dots = [use for use in page.all("use") if "--orange" in use["style"]]
    assert len(dots) == 2 * len(REWARDS)
    assert curve([parse_evaluation({"steps_done": 15})], "kl", "steps")[0] == [15]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_what_is_known_of_the_words_is_marked(make_run):
    judged = completion(shape_named=True, answer_follows=False, arithmetic_right=None)
    page = page_of(make_run(sample(0, judged, completion())))
    marks = page.text_of("small")
    assert marks == ["\N{CHECK MARK} names the class", "\N{BALLOT X} the answer follows"]


def test_the_sum_has_the_runs_own_weights(make_run):
    rewards = {"area_correctness": 1.5, "area_format": 0.5, "xml_format": 0.5}
    page = page_of(make_run(sample(0, completion(**rewards, weights=[2, 0, 1]))))
    assert page.all("tr")[1]["data-sum"] == "3.50"


def test_the_head_says_how_the_run_was_made(make_run):
    resumed = [{"steps_done": 3, "command": "again"}, {"steps_done": 5, "command": "once more"}]
    page = page_of(make_run(sample(0), git_commit=None, device="cpu", resumed=resumed))
    assert page.text_of("title") == page.text_of("h1") == ["run"]
    assert page.text_of("dt") == ["command", "versions", "device", "resumed", "image size", "seed"]
    made = ["python main.py", "torch 2.1, numpy 2.2", "cpu", "after 3: again; after 5: once more"]
    assert page.text_of("dd") == [*made, "224", "7"]
    assert page.text_of("summary") == ["All options"]


def test_a_text_that_is_none_and_json_of_a_hostile_depth_are_damage(make_run, capsys):
    run = make_run(sample(0))
    lines = (run / "samples.jsonl").read_text()
    record = json.loads(lines)
    record["completions"][0]["text"] = None
    for line in (json.dumps(record), "[" * 100_000):
        (run / "samples.jsonl").write_text(line + "\n")
        assert "samples.jsonl: line 1 is damaged" in refused(run, capsys)


def test_steps_are_chosen(make_run, capsys):
    run = make_run(sample(0), sample(10), sample(20))
    groups = page_of(run, "--steps", "20,0").all("section")
    assert [group["data-step"] for group in groups] == ["0", "20"]
    assert "--steps 5: has no sample; those that have: 0, 10, 20" in refused(
        run, capsys, "--steps", "0,5"
    )
    for steps in ("0-3", "x", "", "0,", "1.5"):
        told = f"error: --steps {steps}: must be step numbers like 0,50,110"
        assert refused(run, capsys, "--steps", steps).endswith(told)


def test_a_half_written_line_of_an_unfinished_run_is_skipped(make_run):
    run = make_run(sample(0))
    whole = page_of(run)
    for name in ("metrics", "evaluations", "samples"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 10, "ind')
    page = page_of(run)
    assert len(page.all("section")) == 1
    assert page.elements == whole.elements


def test_an_unfinished_run_without_samples_and_evaluations_has_a_page(make_run):
    run = make_run()
    (run / "evaluations.jsonl").write_text("")
    page = page_of(run)
    assert page.all("section") == []
    assert len(page.all("svg")) == len(METRICS.keys() - report.CHECKS)  # an older run has no checks
    assert page.all("input")[0]["max"] == "0"


def test_the_template_uses_every_value_and_does_without_none(make_run):
    content = report.content(make_run(sample(0)), None)
    for name in content:
        rest = {key: value for key, value in content.items() if key != name}
        with pytest.raises(UndefinedError, match=f"'{name}' is undefined"):
            report.template().render(rest)
    for name in content["groups"][0]:
        rest = {key: value for key, value in content["groups"][0].items() if key != name}
        with pytest.raises(UndefinedError, match=f"no attribute '{name}'"):
            report.template().render({**content, "groups": [rest]})


def test_the_command_finds_its_template_from_any_folder(make_run):
    run = make_run(sample(0))
    done = subprocess.run(
        [sys.executable, report.__file__, "."], cwd=run, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "report.html\n", "")
    assert Page((run / "report.html").read_text(encoding="utf-8")).text_of("h1") == ["run"]


def test_the_same_run_gives_the_same_bytes(make_run, tmp_path):
    run = make_run(sample(0), sample(10))
    for name in ("one.html", "two.html"):
        report.main([str(run), "--out", str(tmp_path / name)])
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_matplotlib_s_settings_do_not_change_the_page(make_run):
    run = make_run(sample(0), sample(10))
    pages = []
    for size in (10, 20):
        style = {"font.size": size, "text.usetex": size > 10, "axes.grid": size > 10}
        others = {"axes.edgecolor": "red", "lines.marker": "x", "svg.fonttype": "path"}
        with rc_context({**style, **others} if size > 10 else {}):
            report.canvas_of.cache_clear()
            report.main([str(run)])
        pages.append((run / "report.html").read_bytes())
    assert pages[0] == pages[1]


# --- tokens -------------------------------------------------------------------------------


def tokens(**lists) -> dict:
    """Three tokens of a completion, "a", "b" and a stop token, as samples.jsonl has them."""
    lists = {"weights": [0.25] * 3, "ref_logprobs": [-0.5] * 3, "k3": [0.01, 0.0, 0.02], **lists}
    old, new = [-0.5, -1.0, -0.1], [-0.25, -2.0, -0.1]
    named = {"texts": ["a", "b", "<|im_end|>"], "sampled_logprobs": old}
    return {**named, "old_logprobs": old, "new_logprobs": new, **lists}


def test_the_script_gets_what_samples_jsonl_tells_of_each_token(make_run):
    group = sample(0, completion("ab", tokens=tokens()), completion("old"))
    (data,) = [text for text in page_of(make_run(group)).text_of("script") if text[0] == "["]
    told, nothing = json.loads(data)
    assert nothing is None
    assert told == {
        "t": ["a", "b", "<|im_end|>"],
        "l": [-0.5, -1.0, -0.1],
        "c": [0.25, -1.0, 0.0],
        "k": [0.01, 0.0, 0.02],
        "w": 0.25,
        "ends": True,
    }


def test_without_a_reference_there_is_no_kl_and_weights_may_differ(make_run):
    told = tokens(weights=[0.25, 0.25, 0.0], new_logprobs=[None, -2.0, -0.1])
    del told["k3"], told["ref_logprobs"]
    row = completion("ab<|im_end|>", tokens=told, truncated=True)
    page = page_of(make_run(sample(0, row)))
    (data,) = [json.loads(text) for text in page.text_of("script") if text[0] == "["]
    assert (data[0]["k"], data[0]["w"], data[0]["c"]) == (
        None,
        [0.25, 0.25, 0.0],
        [None, -1.0, 0.0],
    )
    assert not data[0]["ends"]


def test_the_tokens_of_a_group_that_moved_most_are_listed_once(make_run):
    other = tokens(texts=["c", "d", "e"], new_logprobs=[-0.45, -1.0, -0.2])
    rows = [completion("ab", tokens=tokens()), completion("cd", tokens=other)]
    page = page_of(make_run(sample(0, *rows, *rows)))
    moved = [attributes.get("class") for tag, attributes in page.elements if tag == "b"][-4:]
    assert moved == ["above", "above", "below", "below"]
    assert page.text_of("b")[-4:] == ["a +0.25", "c +0.05", "b −1", "e −0.1"]  # noqa: RUF001
    assert page.text_of("code") == ["", "", "a", "cd"]  # the text before each
    items = [report.moved_most(report.parse_group(sample(0, *rows), image_size=28)["completions"])]
    changes = [token["change"] for tokens in items[0].values() for token in tokens]
    assert changes == pytest.approx([0.25, 0.05, -1.0, -0.1])
    assert page.text_of("small")[-2:] == [
        "log-prob of the whole changed by\n−0.75",  # noqa: RUF001
        "log-prob of the whole changed by\n−0.05",  # noqa: RUF001
    ]


def test_the_strongest_color_is_that_of_the_largest_hundredth():
    changes = [i / 100 for i in range(100)]
    group = {"completions": [{"tokens": {"change": [*changes, float("nan")]}}, {"tokens": None}]}
    assert report.full_change([group]) == 0.98
    assert report.full_change([{"completions": [{"tokens": None}]}]) is None
    assert report.full_change([{"completions": [{"tokens": {"change": [0.0]}}]}]) == 1e-6


def test_tokens_beyond_the_limit_of_a_text_are_left_out(make_run):
    texts = ["x" * 1_000] * 5
    told = {key: [-0.1] * 5 for key in tokens() if key != "texts"}
    row = completion("x" * 5_000, tokens={**told, "texts": texts})
    page = page_of(make_run(sample(0, row)))
    (data,) = [json.loads(text) for text in page.text_of("script") if text[0] == "["]
    assert [len(text) for text in data[0]["t"]] == [1_000] * 4
    assert len(data[0]["l"]) == len(data[0]["c"]) == 4
    assert not data[0]["ends"]
    assert page.text_of("em") == ["… 1,000 more characters"]


def test_what_is_not_known_of_a_token_stays_unknown(make_run):
    """A run that diverged has null for what was not finite."""
    told = tokens(old_logprobs=[None, -1.0, -0.1], k3=[None, 0.0, 0.0], weights=[None] * 3)
    page = page_of(make_run(sample(0, completion("ab", tokens=told))))
    (data,) = [json.loads(text) for text in page.text_of("script") if text[0] == "["]
    assert (data[0]["l"][0], data[0]["c"][0], data[0]["k"][0], data[0]["w"]) == (None,) * 4


def test_tokens_that_do_not_make_the_text_are_not_shown(make_run):
    page = page_of(make_run(sample(0, completion("another text", tokens=tokens()))))
    assert page.text_of("span") == ["another text"]
    assert [text for text in page.text_of("script") if text[0] == "["] == []


def test_a_shape_of_ones_own_is_drawn_and_can_be_chosen(make_run):
    corners = [[10, 10], [30, 10], [35, 30], [20, 40]]
    own = {**sample(0)["shape"], "kind": "kite <b>", "vertices": corners}
    page = page_of(make_run({**sample(0), "shape": own}))
    assert page.text_of("option") == ["all", "kite <b>"]
    assert page.all("section")[0]["data-kind"] == "kite <b>"
    picture = base64.b64decode(page.all("img")[0]["src"].removeprefix("data:image/png;base64,"))
    expected = canvas_of(224).draw(report.Shape(**own))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture))), expected)


def test_a_run_without_tokens_has_no_switch(make_run):
    radios = [
        field for field in page_of(make_run(sample(0))).all("input") if field["type"] == "radio"
    ]
    assert radios == []


# --- hostile text -------------------------------------------------------------------------


@pytest.fixture
def run_of_texts(make_run):
    """A run that has these texts wherever its files can contain text."""

    def make(texts: list[str], name: str):
        group = sample(0, *[completion(text) for text in texts])
        options = dict(zip(texts, texts, strict=True))
        versions = {text: text for text in texts}
        return make_run(
            group, name=name, command=" ".join(texts), versions=versions, options=options
        )

    return make


def test_hostile_texts_stay_text(run_of_texts):
    page = page_of(run_of_texts(list(HOSTILE), name="one"))
    harmless = page_of(run_of_texts([f"text {i}" for i in range(len(HOSTILE))], name="two"))
    assert page.elements == harmless.elements
    assert page.others == harmless.others == []
    seen = [visible or text for text, visible in HOSTILE.items()]
    assert page.text_of("span") == seen
    assert page.text_of("dt")[-len(HOSTILE) :] == [text.replace("_", " ") for text in seen]
    assert page.text_of("dd")[-len(HOSTILE) :] == seen
    assert page.text_of("dd")[0] == " ".join(seen)


def test_hostile_tokens_stay_text(make_run):
    def page_with(texts: list[str], name: str) -> Page:
        told = {key: [-0.1] * len(texts) for key in tokens() if key != "texts"}
        row = completion("".join(texts), tokens={**told, "texts": texts})
        return page_of(make_run(sample(0, row), name=name))

    page = page_with(list(HOSTILE), "one")
    assert page.elements == page_with(["text"] * len(HOSTILE), "two").elements
    assert page.others == []
    (data,) = [json.loads(text) for text in page.text_of("script") if text[0] == "["]
    assert data[0]["t"] == [visible or text for text, visible in HOSTILE.items()]


def test_a_hostile_name_stays_text(make_run):
    name = "<img src=x onerror=alert(1)><title>\u202e\"'"
    page = page_of(make_run(sample(0), name=name))
    assert page.text_of("h1") == page.text_of("title") == [name.replace("\u202e", "⟨U+202E⟩")]
    assert page.elements == page_of(make_run(sample(0), name="harmless")).elements


def test_a_long_text_is_cut(make_run):
    run = make_run(sample(0, completion("<" * 1_000_000), completion("x" * TEXT_LIMIT)))
    page = page_of(run)
    assert page.text_of("span") == ["<" * TEXT_LIMIT, "x" * TEXT_LIMIT]
    assert page.text_of("em") == ["… 996,000 more characters"]
    assert (run / "report.html").stat().st_size < 200_000


def test_the_page_loads_nothing_and_runs_one_script(make_run):
    run = make_run(sample(0))
    page = page_of(run)
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    (script,) = re.findall(r"<script>(.*?)</script>", (run / "report.html").read_text(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert dict(rule.split(maxsplit=1) for rule in policy.split("; ")) == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
    }
    for tag, attributes in page.elements:
        assert tag not in ("a", "link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"@import|url\((?!#)", (run / "report.html").read_text())


@pytest.mark.parametrize("character", ["\0", "\x7f", "\x85", "\u200d", "\ufeff", "\udfff"])
def test_an_invisible_character_is_written_as_its_code_point(character):
    assert visible(f"a{character}b") == f"a⟨U+{ord(character):04X}⟩b"


def test_a_filter_returns_plain_text_for_jinja_to_escape():
    for text in (visible("<&"), number(-1.0, ".1f"), report.content_security_policy("")):
        assert type(text) is str
    assert visible("<&\"'\n\t") == "<&\"'\n\t"


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (-0.5, "+.2f", "−0.50"),  # noqa: RUF001
        (0.5, "+.2f", "+0.50"),
        (0.051, ".1%", "5.1 %"),
        (-2e9, ".2f", "−2.00e+09"),  # noqa: RUF001
        (float("nan"), ".2f", "–"),  # noqa: RUF001
        (float("inf"), ".2f", "–"),  # noqa: RUF001
    ],
)
def test_a_number_has_a_real_minus_sign_or_is_a_dash(value, form, shown):
    assert number(value, form) == shown


@pytest.mark.parametrize(("length", "cut"), [(TEXT_LIMIT - 1, 0), (TEXT_LIMIT, 0), (5_000, 1_000)])
def test_what_is_not_shown_is_counted(length, cut):
    text = "x" * length
    assert characters_cut(text) == cut
    assert len(visible(text)) + cut == length


# --- bad input ----------------------------------------------------------------------------


def with_(change: dict) -> str:
    """A line of samples.jsonl with something changed, in it or in its shape."""
    line = sample(0)
    shape = {key: value for key, value in change.items() if key in ("kind", "center", "vertices")}
    rest = {key: value for key, value in change.items() if key not in shape}
    return json.dumps({**line, "shape": {**line["shape"], **shape}, **rest}) + "\n"


def with_tokens(**lists) -> str:
    """A line of samples.jsonl with something changed in what it tells of the tokens."""
    return json.dumps(sample(0, completion("ab", tokens=tokens(**lists)))) + "\n"


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", None, "No such file"),
        ("config.json", "{", "does not describe a run"),
        ("config.json", "[]", "does not describe a run"),
        ("config.json", '{"config": []}', "does not describe a run"),
        ("config.json", '{"config": {"image_size": "big"}}', "does not describe a run"),
        ("config.json", '{"config": {"image_size": 225}}', "multiple of 28"),
        ("config.json", '{"config": {"image_size": 28000}}', "from 28 to 3,584 pixels"),
        ("config.json", '{"config": {"image_size": 224}, "versions": 1}', "does not describe"),
        ("metrics.jsonl", None, "No such file"),
        ("metrics.jsonl", "", "no step has been logged yet"),
        ("evaluations.jsonl", None, "No such file"),
        ("evaluations.jsonl", "{}\n", "line 1 has no 'steps_done'"),
        ("samples.jsonl", None, "No such file"),
        ("samples.jsonl", with_({}) + "not json\n", "line 2 is damaged"),
        ("samples.jsonl", "[]\n", "line 1 is damaged"),
        ("samples.jsonl", '{"step": 0, "kind": "square"}\n', "line 1 has no 'shape'"),
        ("samples.jsonl", with_({"kind": 5}), "no shape is a 5"),
        ("samples.jsonl", with_({"vertices": "many"}), "line 1 is damaged"),
        ("samples.jsonl", with_({"kind": "circle", "center": []}), "line 1 is damaged"),
        ("samples.jsonl", with_({"shape": {"sides": 4}}), "line 1 is damaged"),
        ("samples.jsonl", with_({"step": 1e999}), "line 1 is damaged"),
        ("samples.jsonl", with_({"area": "large"}), "line 1 is damaged"),
        ("samples.jsonl", with_({"completions": None}), "line 1 is damaged"),
        ("samples.jsonl", with_({"completions": [{"text": ""}]}), "line 1 has no 'advantage'"),
        ("samples.jsonl", with_tokens(k3=[0.0]), "line 1 is damaged: the lists about its tokens"),
        ("samples.jsonl", with_tokens(weights=["much"] * 3), "line 1 is damaged"),
        ("samples.jsonl", with_tokens(texts=None), "line 1 is damaged"),
        ("samples.jsonl", with_tokens(texts=[1, 2, 3]), "line 1 is damaged"),
    ],
)
def test_a_damaged_run_is_told_in_one_line_and_the_page_stays(
    make_run, capsys, file, content, told
):
    run = make_run(sample(0))
    (run / "report.html").write_text("the page before")
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    error = refused(run, capsys)
    assert str(run / file) in error
    assert told in error
    assert (run / "report.html").read_text() == "the page before"


def test_a_full_disk_leaves_the_page_before(make_run, capsys, file_size_limit):
    run = make_run(sample(0))
    (run / "report.html").write_text("the page before")
    with file_size_limit(10_000):
        assert "report.html: cannot be written" in refused(run, capsys)
    assert (run / "report.html").read_text() == "the page before"
    assert {path.suffix for path in run.iterdir()} == {".html", ".json", ".jsonl"}


@pytest.mark.parametrize("out", ["no such/folder.html", "run/config.json/x.html", "."])
def test_a_place_that_cannot_be_written_is_named(make_run, tmp_path, capsys, out):
    assert str(tmp_path / out) in refused(make_run(), capsys, "--out", str(tmp_path / out))


@pytest.mark.parametrize("out", ["missing/x.html", "run", "run/x.html"])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_drawn(
    make_run, tmp_path, capsys, monkeypatch, out
):
    run = make_run()
    monkeypatch.setattr(report, "page", None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    told = f"{tmp_path / out}: must be a file in a writable folder"
    assert told in refused(run, capsys, "--out", str(tmp_path / out))
    assert "must be a file in a writable folder" in refused(run, capsys)


def test_output_that_cannot_be_written_costs_no_page(make_run):
    run = make_run(sample(0), name="my_ü")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, report.__file__, run]
        assert subprocess.run(command, env=environment, stdout=full, stderr=full).returncode == 0
    assert "my_ü" in (run / "report.html").read_text(encoding="utf-8")


def test_a_refusal_is_one_line_whatever_the_path(make_run, tmp_path, capsys):
    assert "no such/config.json: No such file" in refused(tmp_path / "no\nsuch", capsys)
    assert "no such/x.html" in refused(
        make_run(), capsys, "--out", str(tmp_path / "no\nsuch/x.html")
    )
