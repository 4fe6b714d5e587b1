"""The page of a short run in a real browser: scalars, charts of all scales, the picture, the table, settings."""

import json
import re
import subprocess
import sys

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_mm.callbacks.tensorboard_page import layout
from lit_mm.callbacks.token_efficiency import TokenEfficiency
from lit_mm.model.scales import VideoScale
from tests.helpers.browser import CHROMIUM, TEXT, Browser
from tests.helpers.records import write_instruction_set
from tests.helpers.runs import watched_fit

STEPS = 60
LONGEST = """roots => {
  const curves = roots.flatMap(root => [...root.querySelectorAll("svg path")]);
  const points = Math.max(0, ...curves.map(curve => (curve.getAttribute("d") || "").split("L").length));
  return points >= %d && points;
}"""
"""The most points of a curve, once there are so many."""
PICTURES = """roots => {
  const seen = roots.flatMap(root => [...root.querySelectorAll("img, image")]);
  const loaded = seen.filter(image => image.naturalWidth > 100).map(image => [image.naturalWidth, image.naturalHeight]);
  return loaded.length >= %d && loaded;
}"""
TABLES = """roots => {
  const rows = roots.flatMap(root => [...root.querySelectorAll("table tr")]);
  const cells = rows.map(row => [...row.children].map(cell => cell.innerText.trim()));
  return cells.length >= %d && cells;
}"""

LINES = f"""roots => {{
  const matches = {TEXT}.match(/Matches \\(\\d+\\)/g) || [];
  return matches.length >= %d && matches;
}}"""


def test_charts_name_every_level_and_leave_out_what_there_is_not():
    charts = layout([VideoScale(8, 16), VideoScale(2, 1)], utilization=False)
    [_, tags] = charts["quality of every scale"]["validation accuracy"]
    assert [bool(re.match(tag, "val/accuracy@8x16")) for tag in tags] == [True, False]
    assert not any(re.match(tag, "val/accuracy@8x161") for tag in tags)
    assert "MFU" not in charts["speed"]
    assert "MFU" in layout([1], utilization=True)["speed"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """TensorBoard's address and the folder of a run: fit, validation and test."""
    root = tmp_path_factory.mktemp("page")
    logger = TensorBoardLogger(root / "runs", name="", default_hp_metric=False)  # as the command line has it
    options = {"log_every_n_steps": 1, "val_check_interval": 20, "check_val_every_n_epoch": None}
    options |= {"max_steps": STEPS, "max_epochs": -1}
    trainer, lit, data, _ = watched_fit(
        write_instruction_set(root), root, TokenEfficiency(0.5), logger=logger, **options
    )
    trainer.test(lit, data, verbose=False)
    logger.experiment.flush()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(root / "runs"), "--load_fast", "false"]
    process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    told = (re.search(r"http://\S+", line) for line in process.stderr)
    yield next(found for found in told if found)[0], root / "runs/version_0"
    process.kill()
    process.wait()


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    made = Browser(tmp_path)
    yield made
    made.close()


@pytest.mark.slow
def test_scalars(page, browser):
    browser.open(f"{page[0]}?tagFilter=%5E(speed%7Ctokens)%2F#timeseries")
    browser.wait_for("speed/tokens_per_s", "speed/MFU", "Next")
    assert browser.wait(LONGEST % (STEPS - 1)) >= STEPS - 1
    browser.open(f"{page[0]}?tagFilter=%5E(val%7Cscale)%2F#timeseries")
    browser.wait_for("scale/first_token_ms@4", "scale/KV_MiB@16")


@pytest.mark.slow
def test_charts_of_all_scales(page, browser):
    browser.open(f"{page[0]}#custom_scalars")
    text = browser.wait_for("training loss", "validation accuracy", "tokens per second", "peak memory (GiB)")
    assert "MFU" in text
    assert browser.wait(LONGEST % (STEPS - 1)) >= STEPS - 1
    matches = browser.wait(LINES % 11)
    assert set(matches) == {"Matches (1)", "Matches (3)", "Matches (4)"}  # scales, kinds of tokens, parts


@pytest.mark.slow
def test_the_picture(page, browser):
    browser.open(f"{page[0]}#images")
    browser.wait_for("val/accuracy against tokens", "test/accuracy against tokens")
    assert browser.wait(PICTURES % 2)[:2] == [[900, 1050]] * 2


@pytest.mark.slow
def test_the_table(page, browser):
    browser.open(f"{page[0]}#text")
    rows = browser.wait(TABLES % 10)
    result = json.loads((page[1] / "accuracy_tokens.json").read_text())
    for row in result["scales"]:
        assert any(cells[:2] == [row["scale"], f"{100 * row['accuracy']:.2f}"] for cells in rows)
    assert ["majority answer", f"{100 * result['majority_answer']:.2f}"] in [cells[:2] for cells in rows]


@pytest.mark.slow
def test_settings(page, browser):
    browser.open(f"{page[0]}#hparams")
    browser.wait_for("16, 4, 1", "val/loss", "4 records", "convnext_atto (ConvNeXtEncoder)", "0.001 / 0.002 / 0.003")
