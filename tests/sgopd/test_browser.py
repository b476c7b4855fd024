"""The pages in a real Chromium: `make long ONLY=browser`, which brings Playwright; skipped where there is none."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sgopd.report import write_comparison, write_report
from sgopd.scores import scores

api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make long ONLY=browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

FRAMES_A_SECOND = 50  # median while 5,000 rollouts are scrolled
EVIL = "</script><script>window.hit=1</script><img src=x onerror='window.hit=2'> \u202egnirts\u2066 \x00 end"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page from the disk; at the end there must have been no error and no request."""
    wrong: list[str] = []
    contexts = []

    def open_page(path: Path, width: int = 1280, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if request.url != path.as_uri() else None)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True) and "report" in path.name:
            page.wait_for_selector("#inspector:not([hidden])")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def metrics(folder: Path) -> Path:
    records = [{"kind": "train", "step": step, "kl": 1 / step, "rollout/accuracy": 0.5} for step in range(1, 60)]
    for step in (0, 59):
        counts = [(step + place) % 4 for place in range(8)]
        evaluation = {
            **scores(counts, 4, 2),
            "eval/correct": counts,
            "eval/questions_sha256": "x",
            "eval/length_mean": 9,
        }
        records.append({"kind": "eval", "model": "student", "step": step, **evaluation})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(f"gate: {folder.name}\n")
    return folder


@pytest.fixture(scope="module")
def run(keep_rollouts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = keep_rollouts(tmp_path_factory.mktemp("run") / "small", 40, 30, steps=2)
    write_report(metrics(folder))
    return folder


@pytest.fixture(scope="module")
def rows(run: Path) -> list[dict[str, Any]]:
    paths = sorted((run / "completions").iterdir())
    return pyarrow.concat_tables(map(pyarrow.parquet.read_table, paths)).to_pylist()


def shown(page: Any) -> list[str]:
    """What the list shows, from its top."""
    script = "rows => rows.sort((a, b) => a.ariaPosInSet - b.ariaPosInSet).map(row => row.innerText)"
    return page.locator("#list .row:not([hidden])").evaluate_all(script)


def test_rollouts_are_filtered_ordered_and_searched(show: Any, run: Path, rows: list[dict[str, Any]]) -> None:
    page = show(run / "report.html")
    assert page.inner_text("#count") == "40 of 40 rollouts"
    for kind, verdict in (("correct", 1), ("incorrect", -1), ("unknown", 0)):
        page.select_option("#kind", kind)
        assert page.inner_text("#count") == f"{sum(row['verdict'] == verdict for row in rows)} of 40 rollouts"
        assert all(text.startswith(kind) for text in shown(page))
    page.select_option("#kind", "teacher")
    assert all("· teacher ·" in text for text in shown(page)) and page.inner_text("#count") == "4 of 40 rollouts"
    page.select_option("#kind", "all")
    page.select_option("#step", "2")
    assert page.inner_text("#count") == "20 of 40 rollouts" and all("step 2 " in text for text in shown(page))
    page.select_option("#step", "")

    def conflict(row: dict[str, Any]) -> float:
        return sum(abs(d) for d, agreement in zip(row["logratio"], row["agreement"]) if agreement < 0)

    page.select_option("#order", "conflict")
    assert page.inner_text("#prompt") == max(rows, key=conflict)["prompt"]
    page.fill("#search", "is 17 AND 18?")
    page.locator("#count", has_text="1 of 40 rollouts").wait_for()
    assert page.inner_text("#prompt") == rows[17]["prompt"]
    page.fill("#search", "nothing of that kind")
    page.wait_for_selector("#none:not([hidden])")
    assert page.is_hidden("#rollout")


def test_a_token_shows_what_the_loss_measured(show: Any, run: Path, rows: list[dict[str, Any]]) -> None:
    page = show(run / "report.html")
    page.locator(".row", has_text="incorrect").first.click()
    row = next(row for row in rows if row["verdict"] == -1)
    assert page.inner_text("#prompt") == row["prompt"] and page.inner_text("#reason") == "no answer"
    assert (page.inner_text("#extracted"), page.inner_text("#answer")) == ("–", row["answer"])
    assert page.locator("#tokens .token").count() == 30
    for place in (0, 7, 29):
        page.locator("#tokens .token").nth(place).hover()
        assert page.inner_text("#piece") == json.dumps(row["token_text"][place])
        cell = {1: "incorrect, agree", -1: "incorrect, conflict", 0: "neutral"}[row["agreement"][place]]
        assert page.inner_text("#cell") == cell
        for name, expected in (
            ("d", row["logratio"][place]),
            ("kl", row["kl"][place]),
            ("weight", row["gate"][place]),
            ("student", row["student_logprob"][place]),
            ("teacher", row["student_logprob"][place] + row["logratio"][place]),
            ("student-entropy", row["student_entropy"][place]),
            ("teacher-entropy", row["teacher_entropy"][place]),
        ):
            shown = float(page.inner_text(f"#token-{name}").replace("−", "-"))
            assert shown == pytest.approx(expected, rel=0.07, abs=2e-3), name
    shades = page.locator("#tokens .token").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert len(set(shades)) > 5  # by |d|, in two colours
    page.select_option("#shade", "kl")
    assert shades != page.locator("#tokens .token").evaluate_all(
        "all => all.map(one => getComputedStyle(one).backgroundColor)"
    )


def test_everything_can_be_done_by_keyboard(show: Any, run: Path, rows: list[dict[str, Any]]) -> None:
    page = show(run / "report.html")
    page.focus("#search")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#prompt") == rows[2]["prompt"]
    page.keyboard.press("End")
    assert page.inner_text("#prompt") == rows[-1]["prompt"]
    active = page.locator(f"#{page.get_attribute('#list', 'aria-activedescendant')}")
    assert active.get_attribute("aria-posinset") == "40" and active.get_attribute("aria-selected") == "true"
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "tokens"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#place") == "token 2 of 30"
    conflicts = [place for place, agreement in enumerate(rows[2]["agreement"]) if agreement < 0]
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#place") == f"token {next(place for place in conflicts if place > 0) + 1} of 30"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(
    show: Any, run: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    comparison = write_comparison([run, metrics_copy(run, tmp_path)], tmp_path / "comparison.html")
    for path in (run / "report.html", comparison):
        page = show(path, width, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


def metrics_copy(run: Path, folder: Path) -> Path:
    (folder / "other").mkdir()
    return metrics(folder / "other")


def test_what_a_model_wrote_is_text_and_nothing_else(show: Any, tmp_path: Path) -> None:
    flood = EVIL * (1_000_000 // len(EVIL))
    quantities = {
        name: [0.5, 1.0] for name in ("logratio", "kl", "student_logprob", "student_entropy", "teacher_entropy", "gate")
    }
    row = {name: EVIL for name in ("prompt", "answer", "extracted", "reason", "source")} | {"step": 1, "tokens": 2}
    table = [
        {
            **row,
            "verdict": 1,
            "gate_verdict": 1,
            "token_text": [EVIL, flood],
            "agreement": [1, -1],
            **quantities,
            "completion": None,
        },
        {**row, "verdict": -1, "completion": flood},
    ]
    (tmp_path / "completions").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "completions" / "step-000001.parquet")
    page = show(write_report(metrics(tmp_path)))
    assert page.inner_text("#prompt").startswith("</script><script>window.hit=1</script><img")
    first = page.locator("#tokens .token").first
    assert "<img src=x" in first.inner_text() and "⟨202e⟩" in first.inner_text() and "⟨0000⟩" in first.inner_text()
    page.locator(".row").nth(1).click()
    assert "<img src=x" in page.inner_text("#tokens")
    page.fill("#search", "<script>")
    page.wait_for_timeout(300)
    assert page.evaluate("[window.hit, document.images.length, document.scripts.length]") == [None, 0, 2]


def test_the_policy_is_in_force(chromium: Any, run: Path) -> None:
    """Not by the page's good will: markup from text is refused, and so is another script."""
    page = chromium.new_page()
    page.goto((run / "report.html").as_uri())
    for attempt in ("document.body.innerHTML = '<b>x</b>'", "document.body.setAttribute('onclick', 'window.hit = 1')"):
        assert page.evaluate(f"() => {{ try {{ {attempt}; return false }} catch (error) {{ return true }} }}"), attempt
    page.close()


def test_without_scripts_the_page_reads(show: Any, run: Path) -> None:
    page = show(run / "report.html", java_script_enabled=False)
    assert page.is_hidden("#inspector")
    assert page.locator("#completions article").count() > 3
    assert page.locator("noscript").inner_text().startswith("With scripts")


def test_five_thousand_long_rollouts_scroll_smoothly(
    show: Any, keep_rollouts: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_report(metrics(keep_rollouts(tmp_path / "large", 5000, 500, steps=10)))
    page = show(path)
    assert page.inner_text("#count") == "5,000 of 5,000 rollouts"
    scroll = """() => new Promise((resolve) => {
        const list = document.getElementById("list"), times = [];
        const frame = (time) => {
            times.push(time);
            list.scrollTop += 900;
            times.length > 240 ? resolve(times) : requestAnimationFrame(frame);
        };
        list.scrollTop = 0;
        requestAnimationFrame(frame);
    })"""
    rates = []
    for _ in range(3):  # the machine may be busy with something else
        times = page.evaluate(scroll)
        rates.append(1000 / statistics.median(b - a for a, b in itertools.pairwise(times)))
    print(f"frames a second, median of 240, three times: {', '.join(f'{rate:.0f}' for rate in rates)}")
    assert page.locator("#list .row").count() < 40  # however many there are
    assert max(rates) >= FRAMES_A_SECOND
    began = page.evaluate("performance.now()")
    page.select_option("#order", "conflict")
    page.fill("#search", "what is 4321 and")
    page.locator("#count", has_text="1 of 5,000 rollouts").wait_for()
    print(f"ordered and searched in {page.evaluate('performance.now()') - began:.0f} ms; {path.stat().st_size:,} bytes")
