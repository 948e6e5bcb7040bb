"""Claims about the page with attention maps to play with (lab/explore.py and lab/explore.html)."""

import base64
import json
import re
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made import NAMES, both_models
from made_browser import open_browser
from made_data import ASKED, DRAWN, MIXED
from made_folders import opened
from made_runs import command, refused

import eval as evaluation
import lab.explore
import train
from formats.checkpoints import newest_checkpoint, save_checkpoint, tensors_of
from formats.weights import save
from parts.settings import write_json

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
EVIL = "</script><img src=x onerror=alert(1)>{{data}}&lt;"


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """{name: run folder} that has other weights before AIA, and has learned conversations."""
    folders = {}
    for name in NAMES:
        folders[name] = folder = tmp_path_factory.mktemp("explore") / "a <b> run"
        shutil.copytree(runs[name], folder)
        write_json(asdict(train.TrainConfig(preset=name, ratio="1:1:1")), folder / "settings.json")
        m, _ = opened(folder)
        torch.manual_seed(1)
        with torch.no_grad():
            for layer in m.lm.layers:
                layer.self_attn.q_proj.weight.normal_(0, 0.3)
        manifest = newest_checkpoint(folder)[1]
        save_checkpoint(tensors_of(m), {key: manifest[key] for key in ("config", "dtype")}, folder / "before").result()
    return folders


def content_of(page):
    """The data in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))[1])


def shown(content, sample, arm, task, head=None):
    """What a page has to say of a sample: intensity of each layer for its own marks, (L,)."""
    sizes, marks = np.array(sample["sizes"]), sample["marks"][task]
    roots = np.frombuffer(base64.b64decode(sample["maps"][arm]), "<u2").reshape(content["layers"], content["heads"], -1)
    maps = np.zeros((*roots.shape[:2], len(sizes), len(sizes)))                 # (L, h, N, N)
    maps[..., *np.tril_indices(len(sizes))] = (roots / 65535) ** 2
    maps = maps.mean(1) if head is None else maps[:, head]
    rows = np.array(marks["rows"])
    mass = maps[:, :, np.array(marks["columns"])].sum(-1)                       # (L, N)
    return mass[:, rows] @ sizes[rows] / sizes[rows].sum()


def measured(folder, **settings):
    """The same of the model itself: {arm: [{task: (L,)} of each sample]}."""
    m, text, run = evaluation.load_run(evaluation.ScoreWorld(checkpoint=str(folder), device="cpu"))
    samples = lab.explore.usable(lab.explore.Explore(run=str(folder), **settings), m, text, run)
    found = {}
    for arm, model in evaluation.arms(folder, m):
        with torch.inference_mode():
            found[arm] = [dict(zip(batch.tasks, (one[0].numpy() for one in batch.per_task(model(batch).intensity)),
                                   strict=True)) for _, _, batch in samples]
    return found


@both_models
@pytest.mark.parametrize("limits", [(), ("--heads", 1, "--tokens", 70)])
def test_the_data_of_a_page_are_eq_1(name, limits, compared, tmp_path):
    """Of both arms, each task and a story, token by token, and as means over heads and blocks of tokens too."""
    page = tmp_path / "explore.html"
    command(compared[name], "--n", 1, "--out", page, *limits, main=lab.explore.main)
    content, expected = content_of(page), measured(compared[name], n=1)
    assert [sorted(sample["marks"]) for sample in content["samples"]] == [["gen"], ["und"], ["gen", "und"]]
    assert [arm["name"] for arm in content["arms"]] == ["before", "after"]
    assert content["heads"] == (1 if limits else 3)
    assert (max(content["samples"][2]["sizes"]) > 1) == bool(limits)
    for i, sample in enumerate(content["samples"]):
        assert len(sample["sizes"]) <= 70 or not limits
        for arm, task in ((arm, task) for arm in ("before", "after") for task in sample["marks"]):
            np.testing.assert_allclose(shown(content, sample, arm, task), expected[arm][i][task], rtol=0, atol=1e-3)
    assert np.abs(expected["before"][0]["gen"] - expected["after"][0]["gen"]).max() > 3e-3


def test_a_block_is_marked_as_a_whole():
    """Neighbours that differ never share one; blocks are as small as the number allows, which may be too few."""
    same = [0] * 5 + [1] + [0] * 4
    assert lab.explore.blocks(same, 10) == [1] * 10 and lab.explore.blocks(same, 6) == [2, 2, 1, 1, 2, 2]
    with pytest.raises(lab.explore.InputError, match="give at least 3"):
        lab.explore.blocks(same, 2)


def test_the_example_is_a_page_of_the_present_template():
    """A page in assets/ that was made before a change of the template would show what no longer is."""
    page = (lab.explore.TEMPLATE.parents[1] / "assets/explore.html").read_text(encoding="utf-8")
    content = json.loads(re.search('<script type="application/json" id="data">(.*)</script>', page)[1])
    assert page == lab.explore.page_of("tiny-emu3-seed0", content)


def test_many_small_weights_do_not_vanish(monkeypatch):
    """Below half a step of 16 bits, 512 keys are worth 0.003 together: their roots are rounded, not they."""
    attention = torch.full((1, 1, 512, 512), 6e-6)
    monkeypatch.setattr(lab.explore, "attention_maps", lambda m, batch, keep: [keep(attention)])
    found = lab.explore.packed(None, SimpleNamespace(lengths=(512,)), [1] * 512, 8)
    roots = np.frombuffer(base64.b64decode(found), "<u2")[-512:]                # the last row
    assert abs(((roots / 65535) ** 2).sum() - 512 * 6e-6) < 4e-4


@both_models
def test_pictures_are_found_among_the_tokens(name, compared):
    """A story draws three, of 16 cells each; Janus-Pro looks at each again. A cell's place is its token's."""
    m, text, run = evaluation.load_run(evaluation.ScoreWorld(checkpoint=str(compared[name]), device="cpu"))
    batch = lab.explore.usable(lab.explore.Explore(run=str(compared[name]), n=1), m, text, run)[2][2]
    sample = lab.explore.sample_of(m, text, "mixed", 1, batch, 512)
    drawn = [picture["drawn"] for picture in sample["pictures"]]
    assert drawn == ([True] * 3 if name == "tiny-emu3" else [True, False] * 3)
    for picture in sample["pictures"]:
        cells = [sample["cells"][row][1:] for row in picture["rows"]]
        assert cells == [[cell, cell] for cell in range(picture["h"] * picture["w"])]
    queries = {i for i, chosen in enumerate(sample["marks"]["gen"]["rows"]) if chosen}
    assert queries < {row for picture in sample["pictures"] if picture["drawn"] for row in picture["rows"]}


def test_a_page_that_is_too_large_has_fewer_samples(compared, tmp_path, capsys, monkeypatch):
    """As many of each kind as fit; where one of each is too much, one line says what to do."""
    page, run = tmp_path / "explore.html", compared["tiny-emu3"]
    command(run, "--n", 2, "--out", page, main=lab.explore.main)
    whole = page.stat().st_size
    assert len(content_of(page)["samples"]) == 6 and f'"bytes": {whole}' in capsys.readouterr().out
    monkeypatch.setattr(lab.explore, "LARGEST", whole - 1)
    command(run, "--n", 2, "--out", page, main=lab.explore.main)
    assert len(content_of(page)["samples"]) == 3 and "3 more would not fit" in capsys.readouterr().out
    monkeypatch.setattr(lab.explore, "LARGEST", 20_000)
    assert "give --heads 1, or fewer --tokens" in refused(capsys, run, "--n", 2, "--out", page, main=lab.explore.main)


@both_models
def test_public_weights_show_own_pictures(name, runs, album, tmp_path, capsys):
    """The built-in world means nothing to them, and there is one map of each sample."""
    m, _ = opened(runs[name])
    save(m, tmp_path / "public")
    page = tmp_path / "explore.html"
    assert "--data" in refused(capsys, tmp_path / "public", "--out", page, main=lab.explore.main)
    command(tmp_path / "public", "--data", album(DRAWN, ASKED, MIXED), "--out", page, main=lab.explore.main)
    content = content_of(page)
    assert content["arms"] == [{"name": "public", "label": "the model"}]
    titles = [sample["title"].split(":")[0] for sample in content["samples"]]
    assert titles == ["generation 1", "understanding 1", "story 1"]
    drawn = [[picture["drawn"] for picture in sample["pictures"]] for sample in content["samples"]]
    assert drawn[:2] == [[True], [False]]


def test_bad_input_is_one_line(compared, tmp_path, capsys):
    """No traceback for a folder that is no run, a place that is none, a data set that is missing."""
    run, page = compared["tiny-emu3"], tmp_path / "explore.html"
    for words, message in (((tmp_path / "none",), "does not exist"), ((run, "--n", 0), "--n 0: give at least 1"),
                           ((run, "--out", tmp_path / "no/page.html"), "cannot be written"),
                           ((run, "--data", tmp_path / "no.jsonl"), "no.jsonl")):
        assert message in refused(capsys, "--out", page, *words, main=lab.explore.main)
    assert not page.exists()


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(compared, tmp_path_factory):
    """A page with two samples of each kind."""
    file = tmp_path_factory.mktemp("page") / "explore.html"
    command(compared["tiny-emu3"], "--n", 2, "--out", file, main=lab.explore.main)
    return file


def shows(browser, expected):
    """Whether both arms show these intensities."""
    found = [float(browser.text(f"#I-{arm}")) for arm in ("before", "after")]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    return found


def test_the_numbers_on_the_page_are_eq_1(browser, page, compared):
    """Layer and sample chosen by keyboard alone; the first tab from the top is the sample."""
    browser.send("url", url=page.as_uri())
    expected = measured(compared["tiny-emu3"], n=2)
    shows(browser, [expected[arm][0]["gen"][0] for arm in ("before", "after")])
    browser.press("tab", "tab", "down")
    shows(browser, [expected[arm][0]["gen"][1] for arm in ("before", "after")])
    browser.run("document.getElementById('sample').focus()")
    browser.press("down", "down")
    shows(browser, [expected[arm][2]["und"][1] for arm in ("before", "after")])
    browser.press("down", "down", "tab", "down")                                # a story, its other direction
    shows(browser, [expected[arm][4]["und"][1] for arm in ("before", "after")])
    browser.press("tab", "tab", "down", "down")
    content = content_of(page)
    shows(browser, [shown(content, content["samples"][4], arm, "und", 1)[1] for arm in ("before", "after")])
    assert browser.run("return document.querySelectorAll('#curve circle').length") == 4
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_marks_change_the_mean(browser, page):
    """By key on the focused map, by a click on its strip, and by a checkbox; a button brings back the first ones."""
    browser.send("url", url=page.as_uri())
    content = content_of(page)
    sample = content["samples"][0]

    def expected():
        return [shown(content, sample, arm, "gen")[0] for arm in ("before", "after")]
    start = shows(browser, expected())
    marks = sample["marks"]["gen"]
    browser.run("document.getElementById('map-after').focus()")
    browser.press("right", "c", "up", "r")                                      # from the last query and the first key
    row, column = max(i for i, chosen in enumerate(marks["rows"]) if chosen) - 1, 1
    marks["columns"][column], marks["rows"][row] = False, not marks["rows"][row]
    assert shows(browser, expected()) != start
    width = browser.run("return document.getElementById('map-before').clientWidth")
    size = (width - 16) / len(sample["sizes"])
    browser.point("#map-before", round(16 + 2.5 * size - width / 2), round(5 - width / 2), click=True)
    marks["columns"][2] = False
    shows(browser, expected())
    browser.click("#rows-title")
    browser.click("#rows label:nth-child(2) input")
    marks["rows"][1] = True
    shows(browser, expected())
    assert browser.text("#rows-title") == f"{sum(marks['rows'])} of {len(sample['sizes'])} rows"
    browser.click("#reset")
    assert shows(browser, start) == start


def test_what_is_pointed_at_is_said(browser, page):
    """Query, key, cell and weight of both arms stand in a live region, by pointer and by arrow keys."""
    browser.send("url", url=page.as_uri())
    content = content_of(page)
    sample = content["samples"][0]
    row = sample["pictures"][0]["rows"][5]
    width = browser.run("return document.getElementById('map-before').clientWidth")
    size = (width - 16) / len(sample["sizes"])
    browser.point("#map-before", round(16 + 1.5 * size - width / 2), round(16 + (row + 0.5) * size - width / 2))
    said = browser.text("#status")
    assert said.startswith(f"Query {row}, picture 1, cell 2 down, 2 across; key 1, {sample['names'][1]}: ")
    marks = sample["marks"]["gen"]                  # a mean over one pair is its weight
    marks["rows"], marks["columns"] = ([i == one for i in range(len(sample["sizes"]))] for one in (row, 1))
    weights = [float(word) for word in re.findall(r"0\.\d{4}", said)]
    expected = [shown(content, sample, arm, "gen")[0] for arm in ("before", "after")]
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-4)
    browser.run("document.getElementById('map-before').focus()")
    browser.press("down", "left")
    assert browser.text("#status").startswith(f"Query {row + 1}, picture 1, cell 2 down, 3 across; key 0, “<bos>”")
    browser.press(*["up"] * (row + 1), "right")
    assert browser.text("#status").endswith("comes later, so it cannot be seen")
    assert browser.run("return document.getElementById('status').getAttribute('aria-live')") == "polite"


def test_the_picture_grows_with_the_slider(browser, page):
    """A step is a cell; the row of the query that has just drawn it follows, and cells to come are blank."""
    browser.send("url", url=page.as_uri())
    sample = content_of(page)["samples"][0]
    browser.run("document.getElementById('step').focus()")
    here = int(browser.text("#drawn").split()[0])
    browser.press(*["left"] * (here - 5))
    assert browser.text("#drawn") == "5 of 16"
    row = sample["pictures"][0]["rows"][4]
    assert browser.text("#status").startswith(f"Query {row}, picture 1, cell 2 down, 1 across; ")
    assert browser.spoken("#pictures canvas")[1] == "picture 1, 5 of 16 cells"
    blank = browser.run("""const canvas = document.querySelector('#pictures canvas'), side = canvas.width / 4;
        return [0, 1].map(cell => [...canvas.getContext('2d').getImageData(
            (cell + 0.5) * side, 1.5 * side, 1, 1).data].join() === '228,230,234,255')""")
    assert blank == [False, True]


def test_all_can_be_reached_and_has_a_name(browser, page):
    """What a screen reader is told, and the order of the tabulator; the focus can be seen."""
    browser.send("url", url=page.as_uri())
    assert browser.spoken("#map-before") == ("application", "Attention map before AIA")
    order, names = [], []
    for _ in range(9):
        browser.press("tab")
        order.append(browser.run("return document.activeElement.id || document.activeElement.localName"))
        names.append(browser.spoken(":focus")[1])
        assert browser.run("return getComputedStyle(document.activeElement).outlineWidth") == "3px"
    assert order == ["sample", "layer", "head", "reset", "map-before", "map-after", "step", "columns-title",
                     "rows-title"]
    assert all(names) and names[6].startswith("Cells drawn so far")


def test_the_page_fits_a_telephone(browser, page):
    """390 pixels wide, nothing is cut off, whatever the sample's title; dark where that is asked for."""
    browser.send("url", url=page.as_uri())
    colour = "return getComputedStyle(document.body).backgroundColor"
    assert browser.run(colour) == "rgb(255, 255, 255)"
    with browser.telephone(390):
        assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        assert browser.run("return document.getElementById('map-before').clientWidth") > 340
        assert browser.run(colour) == "rgb(22, 24, 28)"


def test_text_of_users_is_text(browser, compared, album, tmp_path):
    """A prompt that would end the script, or load a picture, stands there as it was written; so does a run's name."""
    file = album({"image": "a.png", "conversations": [{"from": "human", "value": EVIL},
                                                        {"from": "gpt", "value": "<image>"}]})
    page = tmp_path / "explore.html"
    command(compared["tiny-emu3"], "--data", file, "--out", page, main=lab.explore.main)
    text = page.read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<img" not in text and "<b>" not in text and "a &lt;b&gt; run" in text
    assert not re.search(r"https?:|@import|(?:src|href)=", re.sub('id="data">.*?</script>', "", text))
    browser.send("url", url=page.as_uri())
    assert browser.text("#sample option") == f"generation 1: {EVIL}"
    assert browser.run("return document.querySelectorAll('img, b').length") == 0 and 0 < float(browser.text("#I-after"))
    assert browser.text("h1") == "Attention maps of a <b> run"
