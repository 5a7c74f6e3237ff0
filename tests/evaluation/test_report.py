"""The HTML report in a real browser: the worst come first, sliders uncover the quantized image, nothing is fetched."""

import json

import numpy as np
import pytest

from fp4dit_ao.evaluation.fidelity import Comparison, Evaluation, Fidelity
from fp4dit_ao.evaluation.kept_images import KeptImages
from fp4dit_ao.evaluation.report import Measure, worst, write_report
from tests.browser import page

SEEDS, PROMPTS = (4, 5), ["a red cat", "a <script>alert(1)</script> dog", "tree"]
LPIPS = "LPIPS (alex)"


def variant(name, psnr, lpips=None) -> Fidelity:
    psnr = np.array(psnr, dtype=float)
    scores = {} if lpips is None else {LPIPS: np.array(lpips, dtype=float)}
    return Fidelity(name, psnr, psnr / 100, scores=scores, seconds=0.5, notes={"bits / weight": "4.25"})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    original = variant("original", np.full((2, 3), 100.0))
    quantized = variant("quantized", [[30, 20, 25], [35, 40, 22]], [[0.1, 0.2, 0.9], [0.3, 0.15, 0.25]])
    floor = variant("original, batch size 8", np.full((2, 3), 60.0))
    kept = []
    for number, name in enumerate(("original", "quantized", "floor")):
        images = KeptImages(folder / "images", name, {}, 2, 3)
        for seed in range(2):
            for prompt in range(3):
                images.keep(seed, prompt, np.full((64, 64, 3), 80 * number + 10 * prompt + seed, np.uint8))
        kept.append(images)
    pairs = [Comparison.of(quantized, floor)]
    evaluation = Evaluation([original, quantized, floor], {"prompts": 3, "seeds": 2}, pairs, digits={LPIPS: 2})
    path = folder / "report.html"
    write_report(path, evaluation, kept, PROMPTS, SEEDS, {LPIPS: False}, shown=4)
    return path


def test_the_worst_by_every_measure_in_turn() -> None:
    one = variant("x", [[30, 20, 25], [35, 40, 22]], [[0.1, 0.2, 0.9], [0.3, 0.15, 0.25]])
    by = [Measure("psnr", "PSNR", True, 2), Measure(LPIPS, LPIPS, False, 2)]
    assert worst(one, by, 3) == [(0, 1), (0, 2), (1, 2)]
    assert worst(one, by, 99) == [(0, 1), (0, 2), (1, 2), (1, 0), (0, 0), (1, 1)]


def test_a_person_can_use_it(report, tmp_path) -> None:
    asked, wrong = [], []
    with page() as browser:
        browser.on("request", lambda request: asked.append(request.url))
        browser.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        browser.on("pageerror", lambda error: wrong.append(str(error)))
        browser.goto(report.as_uri())
        assert browser.title() == "quantized against original"
        prompts = browser.locator(".case .prompt").all_text_contents()
        assert prompts[0] == PROMPTS[1]  # 20 dB, and its markup is text
        psnr = [float(text) for text in browser.locator(".case dd.sorted").all_text_contents()]
        assert psnr == sorted(psnr) and psnr[0] == 20
        browser.select_option("#metric", label=LPIPS)
        assert [float(x) for x in browser.locator(".case dd.sorted").all_text_contents()] == [0.9, 0.3, 0.25, 0.2]
        card = browser.locator(".case").first
        size = card.locator(".over").evaluate("image => [image.naturalWidth, image.naturalHeight]")
        assert size == [64, 64]
        card.locator("input").evaluate("s => { s.value = 20; s.dispatchEvent(new Event('input')); }")
        assert card.locator(".over").evaluate("image => image.style.clipPath") == "inset(0px 0px 0px 20%)"
        browser.select_option("#variant", label="original, batch size 8")
        assert browser.locator(".case .tag.right").first.text_content() == "original, batch size 8"
        browser.get_by_text("Copy as Markdown").first.click()
        assert browser.get_by_text("Copied").count() == 1
        tables = browser.locator("details pre").all_text_contents()
        assert "quantized" in tables[0] and tables[1].startswith("| paired difference")
        facts = browser.locator("#environment").text_content()
        assert "torch" in facts and "processor" in facts
        browser.screenshot(path=str(tmp_path / "report.png"), full_page=True)
    assert not wrong
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}, "it asks for no other file"


def test_it_reads_on_a_narrow_screen(report) -> None:
    with page(width=380) as browser:
        browser.goto(report.as_uri())
        assert browser.evaluate("document.documentElement.scrollWidth") <= 380


def test_no_prompt_can_end_the_script(report) -> None:
    text = report.read_text(encoding="utf-8")
    start = text.index('id="data">') + len('id="data">')
    data = json.loads(text[start : text.index("</script>", start)])
    assert PROMPTS[1] in {case["prompt"] for case in data["cases"]}
