"""The page at / in a real browser: a file is dropped, and its vectors are drawn."""

from __future__ import annotations

import json

import chromium
import numpy as np
import pandas as pd
import pytest
from http_service import people, save_model, serving, wait_until

from fastenc.pipeline import SavedModel

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="there is no Chromium on this machine")
TOKEN = "a-token-of-some-length"
DRAWN = """(() => {
  const canvas = document.getElementById("map"), context = canvas.getContext("2d");
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  let drawn = 0;
  for (let at = 3; at < pixels.length; at += 4) drawn += pixels[at] > 0;
  return drawn;
})()"""
DROP = """(() => {
  const data = new DataTransfer();
  data.items.add(new File([%s], "dropped.csv"));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
})()"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return SavedModel(save_model(tmp_path_factory.mktemp("people") / "model", people()))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser):
    browser.problems.clear()
    browser.resize(1000, 800, phone=False)
    browser.prefer("light")
    yield browser
    browser.open("about:blank")
    assert browser.problems == []


def status(tab, words):
    return tab.until(f"document.getElementById('status').textContent.includes({json.dumps(words)})")


def test_a_file_is_chosen_and_its_vectors_are_drawn_and_saved(saved, tab, tmp_path):
    people().to_csv(tmp_path / "people.csv", index=False)
    (tmp_path / "saved").mkdir()
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"), eventsEnabled=False)
    with serving(saved) as client:
        tab.open(str(client.base_url))
        tab.until("document.getElementById('model').textContent.includes('tables with age, colour, height')")
        assert tab.run("document.getElementById('result').hidden")
        tab.put_into("#file", tmp_path / "people.csv")
        status(tab, "people.csv: 40 vectors of 5 numbers")
        assert tab.run("document.getElementById('map').dataset.points") == "40"
        points = tab.run("places")
        assert len({(round(x), round(y)) for x, y in points}) > 20
        # A point is some 38 pixels; there are far more than one point's, and far fewer than the whole map's.
        assert 300 < tab.run(DRAWN) < 40 * 60
        box = tab.run("(() => { const box = $('map').getBoundingClientRect(); return [box.left, box.top]; })()")
        x, y = points[7]
        tab.run("window.scrollTo(0, 0)")
        tab.move_to(box[0] + x, box[1] + y)
        tab.until("!document.getElementById('tip').hidden")
        row = tab.run("chosen")
        assert np.hypot(*np.subtract(points[row], points[7])) < 2  # that point, or one that covers it
        assert tab.run("document.getElementById('tip').textContent").startswith(f"row {row}: ")
        tab.run("$('save').click()")
        content = (tmp_path / "people.csv").read_bytes()
        expected = client.post("encode", files={"file": ("people.csv", content)}).json()["vectors"]
    wait_until((tmp_path / "saved" / "vectors.csv").exists, "nothing is saved")
    table = pd.read_csv(tmp_path / "saved" / "vectors.csv")
    assert table["name"].tolist() == [f"row {row}" for row in range(40)]
    np.testing.assert_array_equal(table.iloc[:, 1:].to_numpy(np.float32), np.array(expected, np.float32))


def test_a_file_is_dropped(saved, tab):
    with serving(saved) as client:
        tab.open(str(client.base_url))
        tab.run(DROP % json.dumps(people(12).to_csv(index=False)))
        status(tab, "dropped.csv: 12 vectors")
        assert tab.run(DRAWN) > 100


def test_errors_are_shown(saved, tab):
    with serving(saved, max_bytes=5000) as client:
        tab.open(str(client.base_url))
        tab.until("most === 5000")
        tab.run(DROP % json.dumps("a" * 5001))
        status(tab, "this server takes 5,000")
        tab.run(DROP % json.dumps("age\n1\n"))
        status(tab, "the table has no column 'colour', 'height'")
        assert tab.run("document.getElementById('status').className") == "bad"
        assert tab.run("document.getElementById('result').hidden")
    # The browser itself notes an answer that is an error.
    assert all("422" in problem for problem in tab.problems)
    tab.problems.clear()


def test_a_token_is_asked_for(saved, tab):
    with serving(saved, token=TOKEN) as client:
        tab.open(str(client.base_url))
        tab.until("!document.getElementById('access').hidden")
        tab.run("$('token').focus()")
        tab.call("Input.insertText", text=TOKEN)
        tab.run("$('token').blur()")
        tab.until("document.getElementById('model').textContent.includes('age')")
        tab.run(DROP % json.dumps(people(12).to_csv(index=False)))
        status(tab, "12 vectors")


def test_on_a_phone_and_in_the_dark(saved, tab):
    with serving(saved) as client:
        tab.resize(360, 640, phone=True)
        tab.prefer("dark")
        tab.open(str(client.base_url))
        tab.run(DROP % json.dumps(people().to_csv(index=False)))
        status(tab, "40 vectors")
        assert tab.run("document.documentElement.scrollWidth") <= 360
        assert tab.run("$('map').width") == 2 * tab.run("$('map').clientWidth")  # sharp on its screen
        dark = tab.run("getComputedStyle(document.body).backgroundColor")
        tab.prefer("light")
        light = tab.run("getComputedStyle(document.body).backgroundColor")
        assert brightness(dark) < 60 < 200 < brightness(light)


def brightness(colour):
    return np.mean([int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")])
