"""fp-bench report and pareto: what the page, the summary, README's table and CI's JSON say; the page in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from latency_reports import STAGES, mood, peers_and_sweep, repetition, report, result

from factorportrait.benchmarks import cli, svg
from factorportrait.benchmarks.page import binary, metric_prefix, significant
from factorportrait.benchmarks.pareto import Point, Way, approximations, describe, mark_best
from factorportrait.benchmarks.quality import report as quality
from factorportrait.benchmarks.report import (
    FILES,
    README_END,
    README_START,
    doubts,
    engines_table,
    html_page,
    smaller_is_better,
    update_readme,
)
from factorportrait.benchmarks.schema import Noise, write_report
from factorportrait.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KINDS = ("distribution", "stages", "waterfall", "roofline", "scaling")


@pytest.fixture(scope="module")
def whole():
    return peers_and_sweep(np.random.default_rng(0))


@pytest.fixture
def folder(tmp_path, whole):
    write_report(tmp_path, whole)
    return tmp_path


# Files


def test_command_writes_three_files_beside_the_report(folder, whole, capsys):
    assert cli.main(["report", str(folder)]) == 0
    assert all((folder / name).is_file() for name in FILES)
    assert capsys.readouterr().out.count(str(folder)) == 3
    assert cli.main(["report", str(folder / "latency.json"), "--output", str(folder / "other")]) == 0
    assert (folder / "other" / FILES[0]).read_text() == (folder / FILES[0]).read_text()


def test_page_has_every_plot_and_row(whole):
    page = html_page(whole)
    assert [page.count(f'<figure class="{kind}">') for kind in KINDS] == [1, 1, 1, 1, 2]
    for row in whole.results:
        assert f"<td>{row.key}" in page
    assert "shapes &lt;1&gt; &amp; &quot;2&quot;" in page and "no C++ compiler" in page
    latency = whole.results[0].latency.per_frame
    assert f"{significant(latency.low)} … {significant(latency.high)}" in page


def test_page_needs_nothing_from_outside(whole):
    assert not re.search(r"https?://|//cdn|<script|<link|@import|url\(|src=|file:", html_page(whole))


def test_page_stays_small():
    """Six rows of twenty repetitions: what a run of the demo makes."""
    rng = np.random.default_rng(1)
    rows = [
        result([repetition(rng, slow, i, {}, chunks=8) for i, slow in enumerate(mood(rng, 20))], peer=f"peer-{index}")
        for index in range(6)
    ]
    assert len(html_page(report(rows))) < 200_000


def test_noise_and_interruption_are_told(whole, tmp_path):
    noisy = dataclasses.replace(whole, noise=Noise(reasons=("the clock <wandered>",)), interrupted=True)
    write_report(tmp_path, noisy)
    assert cli.main(["report", str(tmp_path)]) == 0
    page, summary = (tmp_path / FILES[0]).read_text(), (tmp_path / FILES[1]).read_text()
    assert "the clock &lt;wandered&gt;" in page and "interrupted" in page
    assert "> Noisy run: the clock" in summary and "> The run was interrupted" in summary


def test_stages_that_do_not_add_up_and_limits_that_were_beaten_are_told(whole):
    """In serial execution the named stages have to explain 98 % of the time; a share above 1 says that the limit is wrong."""
    assert not any("account for only" in doubt or "limit of the machine" in doubt for doubt in doubts(whole))
    row = whole.results[0]
    lost = dataclasses.replace(row, accounted=0.975)
    assert "demo/onnxruntime-cpu account for only 97.5 %" in doubts(dataclasses.replace(whole, results=(lost,)))[-1]
    overlapped = dataclasses.replace(lost, execution="overlapped")
    assert doubts(dataclasses.replace(whole, results=(overlapped,))) == doubts(dataclasses.replace(whole, results=(row,)))
    beaten = dataclasses.replace(row, stages=(dataclasses.replace(row.stages[0], fraction=1.4),))
    assert "in 1 of 1 rows (demo/onnxruntime-cpu): something else ran" in doubts(dataclasses.replace(whole, results=(beaten,)))[-1]


def test_rows_without_a_latency(whole):
    """A peer that makes no pictures has stages alone; a report without any figures is a page all the same."""
    part = dataclasses.replace(whole.results[1], latency=None, stages=whole.results[1].stages[4:6])
    page = html_page(dataclasses.replace(whole, results=(whole.results[0], part)))
    assert "no pictures; denoising steps" in page
    assert "No row has figures" in html_page(dataclasses.replace(whole, results=whole.results[2:4]))


def test_summary_is_a_table(folder, whole):
    cli.main(["report", str(folder)])
    rows = [line for line in (folder / FILES[1]).read_text().splitlines() if line.startswith("|")]
    # Pipes inside reasons would break it.
    widths = {len(re.split(r"(?<!\\)\|", line)) for line in rows}
    assert len(widths) == 2, "one width for the rows, one for the stages"
    assert len([line for line in rows if line.startswith("| demo")]) == len(whole.results)


def test_json_for_github_action_benchmark(whole):
    """Name, unit and value of every figure; names differ, values are the report's."""
    entries = json.loads(smaller_is_better(whole))
    assert all(
        {"name", "unit", "value"} <= set(entry) <= {"name", "unit", "value", "range", "extra"} for entry in entries
    )
    values = {entry["name"]: entry["value"] for entry in entries}
    assert len(values) == len(entries)
    first = whole.results[0]
    assert values["demo/onnxruntime-cpu per frame p50"] == first.latency.per_frame.p50
    assert values["demo/onnxruntime-cpu stage decode"] == first.stages[-1].per_chunk.p50
    assert sum(name.startswith("demo/onnxruntime-cpu stage") for name in values) == len(STAGES)


# README


def test_readme_gets_the_table_between_its_markers(tmp_path, whole):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{README_START}\nold\n{README_END}\n\nrest |\n", encoding="utf-8")
    update_readme(readme, whole)
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{README_START}\n") and text.endswith(f"\n{README_END}\n\nrest |\n")
    assert "old" not in text and "| PyTorch's modules in the same loop" in text and "Test CPU" in text
    update_readme(readme, whole)
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "text", ["", f"{README_END}\n{README_START}", f"{README_START}\n", f"{README_START}{README_START}{README_END}"]
)
def test_readme_without_its_markers_is_refused(tmp_path, whole, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(UserError, match="once each"):
        update_readme(readme, whole)
    assert readme.read_text() == text


def test_engines_are_compared_with_the_first_row_of_the_same_work():
    rng = np.random.default_rng(6)
    fast, slow = ([repetition(rng, 0.0, i, dict.fromkeys(STAGES, f)) for i in range(8)] for f in (1, 2))
    rows = [
        result(fast), result(slow, peer="torch"), result(slow, case="demo-int8", precision="int8"),
        result(slow, case="long", frames=99),
    ]  # fmt: skip
    lines = [line.split(" | ") for line in engines_table(rows)[2:]]
    assert [cells[0] for cells in lines][:3] == [
        "| demo: 128 px, fp32, stream, 2 steps", "| ", "| demo-int8: 128 px, int8, stream, 2 steps",
    ]  # fmt: skip
    ratios = [float(cells[4].rstrip("×")) for cells in lines]
    assert ratios == pytest.approx([1, 2, 2, 1], rel=0.1)


# Numbers and scales


@pytest.mark.parametrize(
    "value, text",
    [(0.01234, "0.0123"), (123.4, "123"), (12345.6, "12346"), (0, "0"), (None, "–"), (9.996, "10.00"), (-2.5, "-2.50")],
)
def test_significant(value, text):
    assert significant(value) == text


def test_units():
    assert (
        binary(512) == "512 B"
        and binary(4 << 20) == "4 MiB"
        and binary(1_073_000_000) == "1023 MiB"
        and binary(5 << 40) == "5120 GiB"
    )
    assert metric_prefix(1.52e14, "FLOP") == "152 TFLOP" and metric_prefix(12, "B/s") == "12.0 B/s"


@pytest.mark.parametrize("low, high", [(0, 1), (0.013, 0.017), (-3, 250), (99, 100), (1e9, 4e12)])
def test_ticks_are_few_and_inside(low, high):
    ticks = svg.Scale(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 8 and all(low <= tick <= high for tick in ticks)
    if low > 0:
        assert len([tick for tick in svg.Scale(low, high, 0, 100, log=True).ticks() if tick < low * 0.99]) == 0


def test_one_value_can_be_drawn():
    plot = svg.Plot((3, 3), (0, 0))
    plot.axes("x")
    plot.point(3, 0, "c0", "only")
    assert "nan" not in plot.figure("", "k") and "inf" not in plot.figure("", "k")


# Quality beside speed


def way(steps, window=9):
    return Way("k" * 16, "fp32", "stream", steps, window)


def test_mark_best():
    points = [
        Point(str(i), way(1), ms, q, "cpu", 2, ms, ms)
        for i, (ms, q) in enumerate([(10, 20.0), (20, 19.0), (30, 21.0), (10, 18.0)])
    ]
    assert [point.name for point in mark_best(points, True) if point.best] == ["0", "2"]
    assert [point.name for point in mark_best(points, False) if point.best] == ["3"]


def test_approximations_are_ways_of_their_own():
    """Older reports say nothing of them, and ran without."""
    assert approximations({}) == approximations({"guidance": "1", "commit": "clean", "step_cache": 0.0}) == ()
    other = dataclasses.replace(way(4), approximations=approximations({"step_cache": 0.5, "commit": "last-step", "steps": 4}))
    assert other != way(4) and "4 steps, window 9, commit last-step, step cache 0.5 (" in describe(other)


def quality_report(folder, steps, window, psnr, identities=1, **approximations):
    """psnr: by steps."""
    figures = {f"steps_{n}": {metric: None for metric in quality.METRICS} | {"psnr": psnr[n]} for n in steps}
    truth = {"truth": {metric: None for metric in quality.METRICS}}
    found = quality.Report(
        schema=quality.SCHEMA, bundle={"name": "demo", "precision": "fp32", "source_key": "k" * 16},
        settings={
            "steps": steps, "primary_steps": steps[0], "generation": "stream", "window_frames": window, "identities": identities,
            "approximations": approximations,
        },
        thresholds={}, rulers={}, clips=[{"person": "a", "mode": "all", "changed_share": 0.1, "methods": figures | truth}],
        cross=[], disentanglement=[], actions=[], stream=None, seconds=1.0,
    )  # fmt: skip
    folder.mkdir()
    (folder / "quality.json").write_text(found.to_json())
    return folder


@pytest.fixture
def both(tmp_path):
    """Latency of steps 1, 2, 4 and of window 3; quality of steps 1 and 4, and of window 3; fewer frames cost quality here."""
    rng = np.random.default_rng(3)
    rows = []
    for name, steps, window in (("one", 1, 9), ("two", 2, 9), ("four", 4, 9), ("narrow", 4, 3)):
        factor = steps * (1 if window == 9 else 1.5)
        reps = [repetition(rng, 0.0, i, {"step.0": factor, "step.1": factor}) for i in range(4)]
        rows.append(result(reps, case=name, steps=steps, window=window, guidance="1"))
    rows = [dataclasses.replace(row, source_key="k" * 16) for row in rows]
    rows.append(dataclasses.replace(rows[0], key="one/torch-bf16", peer="torch-bf16"))
    write_report(tmp_path, report(rows))
    wide = quality_report(tmp_path / "wide", [1, 4], 9, {1: 19.0, 4: 21.0})
    narrow = quality_report(tmp_path / "narrow", [4], 3, {4: 20.0})
    return tmp_path, wide, narrow


def test_pareto_matches_what_ran_in_the_same_way(both, capsys):
    folder, wide, narrow = both
    page = folder / "pareto.html"
    arguments = ["pareto", "--latency", str(folder), "--quality", str(wide), str(narrow), "--output", str(page)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert [line[0] for line in out.splitlines()[1:4]] == ["*", "*", " "]
    assert "narrow/onnxruntime-cpu" in out.splitlines()[3] and "torch-bf16" not in out
    assert "two/onnxruntime-cpu: no quality report of fp32, stream, 2 steps" in out
    assert "Judged on 1 clips" in out and "Noisy" not in out
    text = page.read_text()
    assert text.count("<circle") == 3 and '<figure class="pareto">' in text and "<script" not in text


def test_a_solver_has_the_time_of_its_steps(both, capsys):
    """Other pictures, and no other cost: every solver of a number of steps lies over one time."""
    folder, wide, narrow = both
    solved = quality_report(folder / "solved", [4], 9, {4: 20.5}, solver="unipc")
    arguments = ["pareto", "--latency", str(folder), "--quality", str(wide), str(narrow), str(solved)]
    assert cli.main([*arguments, "--output", str(folder / "pareto.html")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "four/onnxruntime-cpu" in line]
    assert len(lines) == 2 and len({line.lstrip("* ").split()[0] for line in lines}) == 1
    assert float(lines[0].lstrip("* ").split()[0]) > 0
    assert "solver unipc" in lines[1] + lines[0] and sum("solver" in line for line in lines) == 1


def test_a_solver_decides_which_steps_a_cache_skips():
    """So such a report has the time of no other."""
    both = dataclasses.replace(way(4), approximations=approximations({"step_cache": 1.0, "solver": "unipc"}))
    alone = dataclasses.replace(way(4), approximations=approximations({"step_cache": 1.0}))
    assert both.timed == both and alone.timed == alone != both
    assert dataclasses.replace(way(4), approximations=approximations({"solver": "unipc"})).timed == way(4)


def test_pareto_refuses_what_does_not_belong_together(both, capsys, tmp_path):
    folder, wide, _ = both
    write_report(tmp_path / "alone.json", report([result([repetition(np.random.default_rng(0), 0.0, 0, {})])]))
    for arguments in (
        ["--latency", tmp_path / "alone.json", "--quality", wide],
        ["--latency", folder, "--quality", wide, "--metric", "sharpness"],
        ["--latency", folder, "--quality", folder],
        ["--latency", folder, "--quality", wide, quality_report(tmp_path / "others", [4], 3, {4: 20.0}, identities=2)],
        ["--latency", wide / "quality.json", "--quality", wide],
    ):
        assert cli.main(["pareto", "--output", str(tmp_path / "p.html"), *map(str, arguments)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "p.html").exists()


# In a real browser


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian: apt-get install chromium)")
def test_page_in_a_browser(folder, tmp_path):
    """It is laid out, every plot has a size, nothing is logged as an error, and nothing is asked of the network."""
    cli.main(["report", str(folder)])
    probe = """<script>
      addEventListener("load", () => {
        const plots = [...document.querySelectorAll("svg.plot")].map(plot => plot.getBoundingClientRect());
        const wrong = [...document.querySelectorAll("svg.plot *")].filter(part => /NaN|Infinity|undefined/.test(part.outerHTML));
        const asked = performance.getEntriesByType("resource").map(entry => entry.name);
        const wide = document.documentElement.scrollWidth - innerWidth;
        document.title = JSON.stringify({plots: plots.map(p => [p.width, p.height]), wrong: wrong.length, asked, wide});
      });
    </script>"""
    page = tmp_path / "probed.html"
    page.write_text((folder / FILES[0]).read_text().replace("</body>", probe + "</body>"), encoding="utf-8")
    log = tmp_path / "browser"
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", f"--user-data-dir={log}",
            "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1].replace("&amp;", "&"))
    assert len(found["plots"]) == 6 and all(width > 300 and height > 80 for width, height in found["plots"])
    assert found["wrong"] == 0 and found["asked"] == [] and found["wide"] <= 0
    assert ":CONSOLE" not in done.stderr
