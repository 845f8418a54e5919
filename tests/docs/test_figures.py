"""Tables and pictures of the pages are those of `benchmarks/results`, and say who is fastest and who is wrong."""

import re

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import front
from benchmarks.pages import DOCS, drawn, pictures
from benchmarks.pictures import plt, save
from benchmarks.report import make_report
from benchmarks.workloads import WORKLOADS
from tests.support.benchmark import MACHINE, case_of, fact
from tests.support.page import PAGES

pytestmark = pytest.mark.cpu
MEBIBYTE = 2**20


def test_figures_are_those_of_the_results():
    named = re.findall("<!-- figures: (.*) -->", "".join(PAGES.values()))
    assert sorted(named) == ["counts", "cpu", "gpu", "host", "linear", "summary"]
    for page, text in PAGES.items():
        assert drawn(text) == text, f"{page}: run python -m benchmarks.pages"


def test_pages_show_every_picture_that_is_drawn(tmp_path):
    made = {path.relative_to(tmp_path).as_posix() for path in pictures(tmp_path)}
    there = {
        path.relative_to(DOCS).as_posix()
        for folder in ("benchmarks", "pictures")
        for path in DOCS.glob(f"{folder}/**/*.png")
    }
    assert made == there, "run python -m benchmarks.pages"
    shown = set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGES["docs/benchmarks.md"]))
    assert shown == {path for path in made if path.startswith("benchmarks/")}
    others = made - shown - {"pictures/ranks.png"}
    assert others < made and all(f"docs/{path}" in PAGES["README.md"] for path in others)
    assert "](pictures/ranks.png)" in PAGES["docs/several_gpus.md"]


def test_a_picture_is_written_where_its_pixels_are_new(tmp_path):
    def write(width):
        figure, axes = plt.subplots(figsize=(1, 1))
        axes.plot([0, 1], linewidth=width)
        save(figure, path)

    path = tmp_path / "folder" / "line.png"
    write(1)
    path.write_bytes(path.read_bytes() + b"\0")  # as another encoder would have it
    write(1)
    assert path.read_bytes().endswith(b"\0")
    write(9)
    assert not path.read_bytes().endswith(b"\0")


def report(**changed):
    """Of every workload: ours in 2 s and 3 MiB, and of each family what is ``changed``."""
    facts = {}
    for workload in WORKLOADS:
        for dtype in ("fp32", "bf16"):
            case = case_of(workload, dtype=dtype)
            ours = {"family": "egpo_kernels", "peak_bytes": 3 * MEBIBYTE}
            facts[case, "egpo_kernels"] = fact([2.0 if dtype == "bf16" else 9.0], **ours)
            for family, more in changed.items():
                facts[case, f"{family}, somehow"] = fact([1.0], peak_bytes=MEBIBYTE) | {"family": family} | more
    return make_report(MACHINE, 1e9, facts)


def rows(found):
    """The cells of each row below the head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in front.table([found]).splitlines()[2:8]]


def test_the_readmes_table_shows_16_bits_and_a_column_a_family():
    found = rows(report(eager={"seconds": [4.0]}, Liger={"refused": "needs a CUDA device"}))
    assert len(found) == len(front.ROWS)
    for row in found:
        assert row[1:] == ["**2 s**<br>3 MiB", "4 s<br>1 MiB", "-", "-", "-", "-"]
        assert "bf16" in row[0] or "responses" in row[0]


def test_the_readmes_table_says_who_is_faster():
    for row in rows(report(TRL={})):
        assert row[1] == "2 s<br>3 MiB" and row[4] == "**1 s**<br>1 MiB"


def test_who_is_wrong_is_never_the_fastest_of_the_readmes_table():
    for row in rows(report(TRL={"wrong": True})):
        assert row[1] == "**2 s**<br>3 MiB" and row[4] == "1 s*<br>1 MiB"


def test_the_readmes_table_ends_with_what_calls_cost_the_host():
    def one(family, median, **more):
        found = {"call": "logits_policy_loss", "provider": family, "family": family, "refused": None}
        return found | {"seconds": {"median": median}, "launches": ["a"], "operations": ["b", "c"]} | more

    results = [one("egpo_kernels", 2e-3), one("Liger", 1e-3), one("egpo_kernels", 9.0), one("TRL", 0, refused="no")]
    results += [found | {"call": "egpo_loss"} for found in results]
    text = front.table([report()], {"machine": MACHINE | {"cpu": "slide rule"}, "results": results})
    for row, call in zip(text.splitlines()[2 + len(front.ROWS) :], front.HOST_ROWS, strict=False):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert call in cells[0]
        assert cells[1:] == ["2 ms<br>1 + 2 launches", "-", "-", "-", "**1 ms**<br>1 + 2 launches", "-"]
    assert "slide rule" in text and "launches" in text.splitlines()[-4]


def test_a_workload_that_no_report_has_is_named():
    with pytest.raises(ValueError, match="workload 'logits'"):
        front.table([])


def test_without_a_gpus_results_the_page_says_so(tmp_path):
    assert "Not measured yet" in drawn("<!-- figures: gpu -->\n<!-- end of figures -->", tmp_path)
