"""fp-bench quality: rulers against known values, the report, and one whole small run on the tiny bundle."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from factorportrait.benchmarks import cli
from factorportrait.benchmarks.quality import metrics, report
from factorportrait.benchmarks.quality.measure import Sheets, load_thresholds, reader_doubt
from factorportrait.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
FACTORS = report.FACTORS


@pytest.fixture
def noise() -> np.ndarray:
    """Pictures [6, 32, 32, 3] away from 0 and 255, so that a few levels can be added."""
    return np.random.default_rng(0).integers(60, 196, (6, 32, 32, 3)).astype(np.uint8)


# Rulers


def test_psnr_of_a_constant_error(noise):
    assert metrics.psnr(noise + 10, noise) == pytest.approx(20 * np.log10(255 / 10), abs=1e-4)
    assert metrics.psnr(noise, noise) == metrics.MAX_PSNR


def test_psnr_inside_a_mask(noise):
    mask = np.zeros(noise.shape[:3], bool)
    mask[2, 5:9, 5:9] = True
    wrong = noise.copy()
    wrong[~mask] = 0
    wrong[mask] += 5
    assert metrics.psnr(wrong, noise, mask) == pytest.approx(20 * np.log10(255 / 5), abs=1e-4)
    assert metrics.psnr(wrong, noise, np.zeros_like(mask)) is None


def test_ssim(noise):
    pytest.importorskip("skimage")
    assert metrics.ssim(noise, noise) == pytest.approx(1.0)
    # Two flat pictures: only the luminance term is left, (2ab + C1) / (a² + b² + C1).
    a, b = np.full_like(noise[:1], 100), np.full_like(noise[:1], 120)
    c1 = (0.01 * 255) ** 2
    assert metrics.ssim(a, b) == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), abs=1e-6)
    assert metrics.ssim(255 - noise, noise) < 0


def test_changed_mask_is_above_the_threshold_in_any_channel():
    truth, other = np.zeros((1, 1, 3, 3), np.uint8), np.zeros((1, 1, 3, 3), np.uint8)
    truth[0, 0, 1, 2], other[0, 0, 2, 0] = 24, 25
    assert metrics.changed_mask(truth, other, 24).tolist() == [[[False, False, True]]]


def test_interior_leaves_the_outline_out():
    normals = np.zeros((1, 9, 9, 3), np.uint8)
    normals[0, 1:8, 1:8, 1] = 128
    assert metrics.interior(normals, 2).sum() == 9
    normals[0, :, :, 1] = 128
    assert not metrics.interior(normals, 1)[0, 0].any(), "the border of the picture is an outline too"


def test_sharpness_is_the_square_of_contrast(noise):
    inside = np.ones(noise.shape[:3], bool)
    centred = noise.astype(int) - 128
    softer = (128 + centred // 2).astype(np.uint8)
    assert metrics.sharpness(noise, noise, inside) == pytest.approx(1)
    assert metrics.sharpness(softer, noise, inside) == pytest.approx(0.25, rel=0.02)
    flat = np.full_like(noise, 9)
    assert metrics.sharpness(flat, noise, inside) == pytest.approx(0, abs=1e-9)
    assert metrics.sharpness(noise, flat, inside) is None
    assert metrics.sharpness(noise, noise, ~inside) is None


def test_flicker(noise):
    ramp = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) * np.ones((1, 4, 4, 3), np.uint8)
    assert metrics.jerkiness(ramp) == 0, "even motion does not flicker"
    blinking = ramp.copy()
    blinking[1::2] += 6
    assert metrics.jerkiness(blinking) == 12
    assert metrics.flicker(noise, noise, 0.01) == pytest.approx(1)
    assert metrics.flicker(noise[:, :4, :4], ramp, 0.01) is None


def test_angles():
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert metrics.angles_deg(np.eye(3)[None], turn[None]) == pytest.approx([90])
    assert metrics.angles_deg(turn, turn) == pytest.approx(0, abs=1e-5)


def test_region_colours(noise):
    red, gone, small = (np.zeros(noise.shape[:3], bool) for _ in range(3))
    red[:, :4], small[0, 0, :3] = True, True
    pictures = noise.copy()
    pictures[:, :4] = (200, 10, 20)
    found = metrics.region_colours(pictures, {"red": red, "gone": gone, "small": small}, 4)
    assert list(found) == ["red"] and found["red"].tolist() == [200, 10, 20]
    assert metrics.colour_errors(found, {"red": np.array([200, 10, 50]), "gone": 0}) == {"red": 10}


def test_seam_ratio():
    """Chunks of two latent frames: frames 0..4, 5..12, 13..20; an error appears at every chunk border."""
    truth = np.full((21, 4, 4, 3), 100, np.uint8)
    pictures = truth.copy()
    pictures[5:13] += 12
    pictures[9:] += 4
    found = metrics.seam_ratio(pictures, truth, chunk_frames=2)
    # Borders of chunks: 5 (+12) and 13 (-12); other latent borders: 1, 9 (+4), 17.
    assert found["against_latent_borders"] == pytest.approx(12 / (4 / 3))
    assert found["against_all"] == pytest.approx(12 / (4 / 18))
    assert metrics.seam_ratio(truth, truth, 2)["against_all"] is None


def test_a_bad_reader_is_doubted():
    least = load_thresholds()["reader_explained"]
    assert "explains 10 %" in reader_doubt({"expression_explained": 0.1}, least)
    assert reader_doubt({"expression_explained": 0.9}, least) == reader_doubt(None, least) == ""


# Report


def figures(**known) -> dict:
    return {**dict.fromkeys(report.METRICS), **known}


def make_report(**changes) -> report.Report:
    """Two clips and one disentanglement case with round numbers."""
    methods = {
        "steps_4": figures(psnr=31.0, psnr_expression=25.0, expression_error=0.1, pose_error_deg=2.0, sharpness=0.9),
        "steps_50": figures(psnr=31.5, psnr_expression=25.5, expression_error=0.1, pose_error_deg=1.0, sharpness=1.0),
        "zeroed": figures(psnr=25.0, expression_error=0.3),
        "vae": figures(psnr=33.0),
        "portrait_copied": figures(psnr=21.0),
        "portrait_copied_vae": figures(psnr=22.0),
        "neutral": figures(psnr=26.0),
        "neutral_vae": figures(psnr=25.0, psnr_expression=18.0),
        "truth": figures(psnr=100.0, expression_error=0.0),
    }
    truth = {a: {b: (10.0 if a == b else 1.0) for b in FACTORS} for a in FACTORS}
    generated = {a: {b: (5.0 if a == b else 1.0) for b in FACTORS} for a in FACTORS}
    values = {
        "schema": report.SCHEMA,
        "bundle": {"name": "tiny", "precision": "fp32", "height": 8, "width": 8, "source_key": "ab" * 32, "bytes": 9},
        "settings": {"identities": 2, "frames": 13, "steps": [4, 50], "primary_steps": 4, "modes": ["all"], "seed": 0,
                     "generation": "stream", "expression": "pictures"},
        "thresholds": load_thresholds(),
        "rulers": {"reader": None, "reader_missing": "none <here>", "reader_doubt": "", "lpips_missing": "no package"},
        "clips": [{"person": f"test-{i}", "mode": "all", "changed_share": 0.1, "methods": methods} for i in range(2)],
        "cross": [], "actions": [], "stream": None, "seconds": 1.0,
        "disentanglement": [{"person": "a", "other": "b", "generated": generated, "truth": truth}],
    }  # fmt: skip
    return report.Report(**(values | changes))


def test_json_round_trip_keeps_every_clip():
    made = make_report()
    text = made.to_json()
    assert report.Report.from_json(text, "quality.json") == made
    data = json.loads(text)
    assert data["schema"] == report.SCHEMA and len(data["clips"]) == 2
    assert data["summary"]["self"]["steps_4"]["psnr"] == {"mean": 31, "min": 31, "max": 31, "clips": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("[]", "a quality report"),
        (json.dumps({"kind": report.KIND, "schema": report.SCHEMA + 1}), "update factorportrait"),
        (json.dumps({"kind": report.KIND, "schema": report.SCHEMA}), "all keys"),
    ],
)
def test_bad_json_is_an_error_of_one_line(text, words):
    with pytest.raises(UserError, match=words) as caught:
        report.Report.from_json(text, "quality.json")
    assert "\n" not in str(caught.value)


def test_targets_and_verdicts():
    found = {target["id"]: target for target in report.verdicts(make_report())}
    status = {name: (target["status"], target["value"]) for name, target in found.items()}
    assert status["self_psnr"] == ("met", 31.0)
    assert status["self_below_vae"] == ("met", 2.0)
    assert status["self_above_copy"] == ("missed", 9.0)
    assert status["expression_above_neutral"] == ("met", 7.0)
    assert status["zeroed_expression"] == ("met", pytest.approx(3.0))
    assert status["disentanglement"] == ("met", pytest.approx(5.0))
    assert status["few_steps_pose"] == ("missed", 2.0)
    assert status["few_steps_sharpness"] == ("met", pytest.approx(0.1))
    assert status["stream_drift"] == ("not measured", None)
    assert found["self_psnr"]["note"] == "on 2 of 20 test identities"
    assert set(found) == set(report.target_values(make_report()))


def test_short_stream_does_not_meet_the_target_of_a_long_one():
    short = {"frames": 200, "period": 100, "psnr_by_hundred": [30.0, 30.0], "loss_db": 0.0,
             "seam_ratio": {"against_latent_borders": 1.0, "against_all": 1.0}}  # fmt: skip
    for frames, status in ((200, "not measured"), (1000, "met")):
        found = {t["id"]: t["status"] for t in report.verdicts(make_report(stream=short | {"frames": frames}))}
        assert (found["stream_drift"], found["stream_seam"]) == (status, status)


def test_matrix_is_scaled_by_true_renders():
    found = report.matrix(make_report(), "generated")
    assert found["shares_of_truth"]["pose"] == pytest.approx({**dict.fromkeys(FACTORS, 0.1), "pose": 0.5})
    assert found["rows"]["pose"]["pose"] == 1 and found["dominance"]["pose"] == pytest.approx(5)
    assert report.matrix(make_report(), "truth")["dominance"]["camera"] == pytest.approx(10)
    assert report.matrix(make_report(disentanglement=[]), "generated") is None


def test_every_threshold_and_target_has_its_reason():
    import tomllib

    folder = Path(report.__file__).parent
    entries = tomllib.loads((folder / "thresholds.toml").read_text(encoding="utf-8"))
    assert all(len(entry["why"]) > 40 and entry["unit"] for entry in entries.values())
    for target in report.load_targets():
        assert target["compare"] in ("at_least", "at_most") and target["sentence"].endswith(".") and target["unit"]


def sheets() -> Sheets:
    picture = np.zeros((8, 8, 3), np.uint8)
    return Sheets([("test-0", {"portrait": picture, "truth": picture})], [], [])


def test_page_is_self_contained(tmp_path):
    written = report.write_report(tmp_path, make_report(), sheets())
    assert [path.name for path in written] == ["quality.json", "quality.html", "contact_sheet.png"]
    page = (tmp_path / "quality.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|<script|<link|@import|url\(|file:", page)
    assert re.findall(r'src="([^"]{22})', page) == ["data:image/png;base64,"]
    assert "none &lt;here&gt;" in page and "not measured" in page and "missed" in page


def test_report_replaces_an_earlier_one(tmp_path):
    (tmp_path / "cross_sheet.png").write_bytes(b"old")
    report.write_report(tmp_path, make_report(), sheets())
    report.write_report(tmp_path, dataclasses.replace(make_report(), seconds=2.0), sheets())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contact_sheet.png", "quality.html", "quality.json"]
    assert json.loads((tmp_path / "quality.json").read_text())["seconds"] == 2.0


# Command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--identities", "0"], "--identities; expected 1 or more"),
        (["--frames", "3"], "--frames; expected 5 or more"),
        (["--steps", "4,x"], "--steps"),
        (["--steps", "0"], "--steps"),
        (["--modes", "frontl"], "did you mean frontal?"),
        (["--modes", "all,all"], "name each once"),
        (["--stream", "150"], "a multiple of 100"),
        (["--seed", "-1"], "--seed"),
        ([], "expected a folder made by fp-export"),
    ],
)
def test_bad_inputs_give_one_line_and_code_2(tmp_path, capsys, arguments, words):
    code = cli.main(["quality", str(tmp_path / "none"), "--output", str(tmp_path / "out"), *arguments])
    out, err = capsys.readouterr()
    assert code == 2 and words in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()


def test_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("keep me")
    assert cli.main(["quality", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "an earlier report" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("name", ["skimage.metrics", "scipy.optimize"])
def test_missing_packages_are_named_before_anything_is_rendered(tiny_bundle, tmp_path, capsys, monkeypatch, name):
    pytest.importorskip("warp")
    pytest.importorskip("skimage")
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("factorportrait.runtime.session.open_bundle", lambda *args, **options: pytest.fail("opened"))
    code = cli.main(["quality", str(tiny_bundle), "--quick", "--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert code == 2 and err.count("\n") == 1 and not out and not (tmp_path / "out").exists()
    assert f"found no package {name.split('.')[0]}; run: pip install -e '.[demo]'" in err


def test_shards_of_training_people_are_refused(tiny_bundle, tmp_path, capsys):
    pytest.importorskip("warp")
    pytest.importorskip("skimage")
    (tmp_path / "dataset.json").write_text(json.dumps({"split": "train", "size": 32, "frames": 29}))
    code = cli.main(["quality", str(tiny_bundle), "--output", str(tmp_path / "out"), "--data", str(tmp_path)])
    assert code == 2 and "test split" in capsys.readouterr().err


def test_quick_run(tiny_bundle, tmp_path, capsys):
    """Everything once; random pictures miss the targets, and --enforce says so."""
    pytest.importorskip("warp")
    pytest.importorskip("skimage")
    out = tmp_path / "out"
    command = ["quality", str(tiny_bundle), "--quick", "--frames", "6", "--steps", "2,1", "--threads", "1", "--enforce"]
    command += ["--stream", "200"]
    code = cli.main([*command, "--output", str(out)])
    printed, complaint = capsys.readouterr()
    assert code == cli.EXIT_MISSED, complaint
    assert sorted(path.name for path in out.iterdir()) == sorted(report.FILES)
    made = report.Report.from_json((out / "quality.json").read_text(), "quality.json")
    assert len(made.clips) == 2 and [clip["mode"] for clip in made.clips] == ["frontal", "novel"]
    assert made.primary == "steps_2" and len(made.cross) == 2 and len(made.disentanglement) == 2
    assert len(made.stream["psnr_by_hundred"]) == 2 and made.stream["seam_ratio"]["against_all"] > 0
    for clip in made.clips:
        found = clip["methods"]
        assert found["truth"]["psnr"] == metrics.MAX_PSNR and found["truth"]["expression_error"] == 0
        assert found["truth"]["sharpness"] == pytest.approx(1) and found["truth"]["ssim"] == pytest.approx(1)
        assert found["neutral"]["psnr"] > found["steps_2"]["psnr"]
        assert found["portrait_copied"]["flicker"] == 0 and found["steps_1"]["pose_error_deg"] > 0
        assert found["truth"]["expression_error"] == found["truth"]["pose_error_deg"] == 0
        assert found["truth"]["pose_error_known_deg"] > 0, "a fit that starts at the answer"
        assert found["portrait_copied"]["pose_error_known_deg"] is None, "only what is made is read"
    for case in made.cross:
        distances = {name: row["identity_error_driver"] for name, row in case["methods"].items()}
        assert set(distances) == {"steps_2", "neutral", "portrait_copied", "truth"} and min(distances.values()) > 0
    assert set(made.rulers["reader"]) == {"expression_explained", "expression_error_known", "pose_error_known_deg"}
    assert not made.rulers["reader_missing"]
    assert all("followed" in figures for case in made.actions for figures in case["actions"].values())
    assert report.matrix(made, "generated") and report.matrix(made, "truth")
    assert "missed" in printed


@pytest.mark.parametrize("expression", ["pictures", "arkit"])
def test_what_drives_the_expression(tiny_bundle, tmp_path, monkeypatch, expression):
    """Pictures reach the runtime, or the coefficients that they were rendered with."""
    pytest.importorskip("warp")
    pytest.importorskip("skimage")
    from factorportrait.runtime.session import Session

    shown, frames = [], Session.frames

    def recorded(self, driving):
        shown.extend(driving)
        return frames(self, shown[-6:])

    monkeypatch.setattr(Session, "frames", recorded)
    command = ["quality", str(tiny_bundle), "--self-only", "--identities", "1", "--frames", "6", "--steps", "1", "--threads", "1"]
    assert cli.main([*command, "--expression", expression, "--output", str(tmp_path / "out")]) == 0
    made = report.Report.from_json((tmp_path / "out" / "quality.json").read_text(), "quality.json")
    assert made.settings["expression"].startswith({"pictures": "pictures", "arkit": "true ARKit"}[expression]) and len(shown) >= 6
    if expression == "pictures":
        assert all(frame.image is not None and frame.coefficients is None for frame in shown)
    else:
        assert all(frame.image is None for frame in shown) and np.any([frame.coefficients for frame in shown[:6]])


def test_every_option_that_changes_pictures_is_told(tmp_path):
    """Another solver is another run: it reaches the sessions and stands in the report."""
    given = {"solver": "unipc", "shift": 3.0, "guidance": "1.5", "guidance_steps": 1, "commit": "last-step", "step_cache": 0.5}
    arguments = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    options = cli.parser().parse_args(["quality", str(tmp_path), *arguments])
    assert cli.settings_from(options).approximations == given
    assert cli.settings_from(cli.parser().parse_args(["quality", str(tmp_path)])).approximations == {}
