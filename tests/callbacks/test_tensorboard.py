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
from tests.helpers.browser import until
from tests.helpers.records import write_instruction_set
from tests.helpers.runs import watched_fit

STEPS = 60


def test_charts_name_every_level_and_leave_out_what_there_is_not():
    charts = layout([VideoScale(8, 16), VideoScale(2, 1)], utilization=False)
    [_, tags] = charts["quality of every scale"]["validation accuracy"]
    assert [bool(re.match(tag, "val/accuracy@8x16")) for tag in tags] == [True, False]
    assert not any(re.match(tag, "val/accuracy@8x161") for tag in tags)
    assert "MFU" not in charts["speed"]
    assert "MFU" in layout([1], utilization=True)["speed"]


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory):
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


def open_tab(page, address: str, *words: str) -> None:
    """Go to a tab of TensorBoard's and wait until it shows some words."""
    page.goto("about:blank")  # another fragment of the same page would not load it
    page.goto(address)
    for word in words:
        page.get_by_text(word).filter(visible=True).first.wait_for()


def longest_curve(page) -> int:
    """The most points of a curve, once there are as many as steps."""

    def points() -> int:
        curves = page.locator("svg path").evaluate_all("all => all.map(curve => curve.getAttribute('d') || '')")
        most = max((curve.count("L") for curve in curves), default=0)
        return most if most >= STEPS - 2 else 0

    return until(points)


@pytest.mark.slow
def test_scalars(tensorboard, page):
    address, _ = tensorboard
    open_tab(page, f"{address}?tagFilter=%5E(speed%7Ctokens)%2F#timeseries", "speed/tokens_per_s", "speed/MFU", "Next")
    assert longest_curve(page) >= STEPS - 2
    open_tab(page, f"{address}?tagFilter=%5E(val%7Cscale)%2F#timeseries", "scale/first_token_ms@4", "scale/KV_MiB@16")


@pytest.mark.slow
def test_charts_of_all_scales(tensorboard, page):
    words = "training loss", "validation accuracy", "tokens per second", "peak memory (GiB)", "MFU"
    open_tab(page, f"{tensorboard[0]}#custom_scalars", *words)
    assert longest_curve(page) >= STEPS - 2
    matches = page.get_by_text(re.compile(r"^\s*Matches \(\d+\)"))
    matches.nth(10).wait_for()
    found = {text.split("(")[1].split(")")[0] for text in matches.all_inner_texts()}
    assert found == {"1", "3", "4"}  # scales, kinds of tokens, parts


@pytest.mark.slow
def test_the_picture(tensorboard, page):
    open_tab(page, f"{tensorboard[0]}#images", "val/accuracy against tokens", "test/accuracy against tokens")
    sizes = "all => all.map(image => [image.naturalWidth, image.naturalHeight]).filter(size => size[0] > 100)"
    pictures = page.locator("img")
    assert until(lambda: pictures.evaluate_all(sizes).count([900, 1050]) == 2)  # the oracle's is larger


@pytest.mark.slow
def test_the_table(tensorboard, page):
    address, folder = tensorboard
    open_tab(page, f"{address}#text", "majority answer")
    read = "rows => rows.map(row => [...row.children].map(cell => cell.innerText.trim()))"
    rows = page.locator("table tr").evaluate_all(read)
    result = json.loads((folder / "accuracy_tokens.json").read_text())
    for row in result["scales"]:
        shown = f"{100 * row['accuracy']:.2f} ± "
        assert any(cells[0] == row["scale"] and cells[1].startswith(shown) for cells in rows)
    assert ["majority answer", f"{100 * result['majority_answer']:.2f}"] in [cells[:2] for cells in rows]


@pytest.mark.slow
def test_settings(tensorboard, page):
    words = "16, 4, 1", "val/loss", "4 records", "convnext_atto (ConvNeXtEncoder)", "0.001 / 0.002 / 0.003"
    open_tab(page, f"{tensorboard[0]}#hparams", *words)
