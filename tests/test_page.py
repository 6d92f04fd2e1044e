"""The demo's page and the model card: made from templates, whole, escaped, self-contained."""
import json
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard

from dreamllm_edu.app import page
from dreamllm_edu.app.card import model_card
from dreamllm_edu.documents.document import Document

from conftest import ROOT, picture

METRICS = json.loads((ROOT / "dreamllm_edu/weights/mini/metrics.json").read_text())
TEMPLATES = ROOT / "dreamllm_edu" / "app" / "templates"
VOID = {"meta", "img", "br", "link", "input", "hr"}
ATTACK = '<script>alert(1)</script> & "x"'


class Checker(HTMLParser):
    """Every element that is opened is closed, in order; pictures and links are collected."""
    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.addresses, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(attributes)
        if tag == "a":
            self.addresses.append(attributes["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing, or something else: {self.open[-3:]}"


@pytest.fixture(scope="module")
def shown():
    document = Document([f"Bird: {ATTACK}.", " Owl: a bird.", picture(1), " end"], 1)
    return {"articles": {"Seen": [document], "Never seen": [document]}, "dialogues": [document],
            "edits": {"Into seen": [(picture(1), "noto", picture(2), picture(3))]},
            "galleries": {"Concepts never seen": [(picture(4), ATTACK), (picture(5), "owl in Noto style")]}}


@pytest.fixture(scope="module")
def quick():
    short = {key: METRICS[key] for key in ("creation", "comprehension", "layout")}
    return {
        "shown": [[picture(i) for i in range(2)]] * 2,
        "labels": ["before", "after"],
        "texts": ["owl in Noto style", ATTACK],
        "stages": ["1-alignment"],
        "histories": [[{"image_loss": 1.0}, {"image_loss": 0.5, "lm_loss": 2.0}]],
        "untrained": short,
        "trained": short,
    }


def test_the_page_is_whole_escaped_and_self_contained(shown, quick):
    text = page.page(METRICS, quick, shown)
    checked = Checker(text)
    assert text.lstrip().startswith("<!doctype html>") and text.count("<html") == 1
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert len(checked.pictures) == 3 + 3 + 2 + 3  # documents, an edit, a gallery, a sheet and two plots
    for attributes in checked.pictures:
        assert attributes["alt"].strip() and attributes["src"].startswith("data:image/png;base64,")
    assert {"tr", "td", "th"} <= set(checked.tags)
    inside = {address[1:] for address in checked.addresses if address.startswith("#")}
    assert inside and all(f'id="{name}"' in text for name in inside), "a link of the page's own list leads nowhere"
    for name, value in page.flat({key: METRICS[key] for key in ("layout", "language", "editing")}):
        assert f"<td>{name}</td><td>{page.metric_cell(value)}</td>" in text, name


@pytest.mark.parametrize(
    "value, text, cell",
    [
        (
            {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4},
            "0.50 [0.25, 0.75], n=4",
            "0.50 <small>[0.25, 0.75], n=4</small>",
        ),
        ({"value": None, "low": None, "high": None, "n": 0}, "–", "–"),
        (0.123456, "0.123", "0.123"),
        (12, "12", "12"),
        ("<b>", "<b>", "&lt;b&gt;"),
    ],
)
def test_a_metric_is_written(value, text, cell):
    assert page.metric_text(value) == text and page.metric_cell(value) == cell


def test_tables_have_as_many_cells_as_columns():
    for table in (
        page.creation_table(METRICS["creation"]),
        page.learning_table({"untrained": METRICS, "trained": METRICS}, METRICS),
    ):
        tags = Checker(table).tags
        assert tags.count("td") == tags.count("th") * (tags.count("tr") - 1) and tags.count("tr") > 10
        assert "\n\n" not in table, "an empty line would end the table in Markdown"


def test_a_name_that_a_template_lacks_is_an_error():
    from jinja2 import UndefinedError
    with pytest.raises(UndefinedError, match="header"):
        page.render("table.html.jinja", rows=[])


def test_all_templates_are_used_and_compile():
    used = " ".join(
        path.read_text(encoding="utf8")
        for path in [*TEMPLATES.iterdir(), *(ROOT / "dreamllm_edu" / "app").glob("*.py")]
    )
    for path in TEMPLATES.iterdir():
        assert path.suffix == ".jinja" and f'"{path.name}"' in used, path.name
        page.templates().get_template(path.name)


def test_the_card_has_valid_front_matter_and_the_measured_numbers():
    text = model_card(METRICS, "Tiny")
    front = yaml.safe_load(text.split("---\n")[1])
    assert (
        front["license"] == "apache-2.0"
        and front["library_name"] == "transformers"
        and front["model-index"][0]["name"] == "Tiny"
    )
    card = ModelCard(text)
    found = {(r.dataset_config, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert len(found) == 3 + 3 + 2
    assert found["seen", "concept top-1 of the judge"] == round(METRICS["creation"]["seen"]["concept_top1"]["value"], 4)
    assert found["held_out_renderings", "captions that name the concept exactly"] == round(
        METRICS["comprehension"]["caption_top1"]["held_out_renderings"]["value"], 4
    )
    assert "# Tiny\n" in text and "seconds" not in text and text.count("\n| ") > 60
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
