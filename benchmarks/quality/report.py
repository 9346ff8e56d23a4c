"""quality.json, the contact sheets and quality.html. Figures of every clip are kept; tables and verdicts follow from them."""

from __future__ import annotations

import base64
import io
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from factorportrait.benchmarks.page import html_document, html_table, number
from factorportrait.errors import UserError
from factorportrait.files import whole_file

SCHEMA = 2
KIND = "factorportrait quality"
FACTORS = ("expression", "pose", "camera", "identity")
FILES = ("quality.json", "quality.html", "contact_sheet.png", "cross_sheet.png", "action_sheet.png")
METRICS = {  # name -> (heading, unit, digits, what it is)
    "psnr": ("PSNR", "dB", 2, "over all pixels of a clip"),
    "psnr_expression": ("PSNR, expression", "dB", 2, "inside the pixels that expression changes"),
    "ssim": ("SSIM", "", 4, "Gaussian window, mean over frames"),
    "lpips": ("LPIPS", "", 4, "AlexNet"),
    "sharpness": ("Sharpness", "of truth", 3, "high-frequency energy inside the head; 1 is as sharp as the truth"),
    "flicker": ("Flicker", "of truth", 3, "mean |second difference in time|; 1 is as much as the truth moves"),
    "expression_error": (
        "Expression error", "coefficient", 4, "mean |difference| of the coefficients read from the picture and from the truth",
    ),
    "expression_followed": (
        "Expression followed", "of truth", 3,
        "slope of the coefficients' changes over time, read from the picture over read from the truth",
    ),
    "pose_error_deg": (
        "Pose error", "degrees", 2, "angle between the head in the camera as read from the picture and from the truth",
    ),
    "expression_error_known": (
        "Expression error, known", "coefficient", 4,
        "reading of the picture against the known coefficients; the truth's row is the reader's own error",
    ),
    "pose_error_known_deg": (
        "Pose error, known", "degrees", 2,
        "reading of the picture against the known rotation; the truth's row is the reader's own error",
    ),
    "expression_explained": (
        "Expression explained", "of known", 3, "share of the squared known coefficients that the reading explains",
    ),
    "identity_error": (
        "Identity colours", "levels of 255", 2,
        "mean difference of the colours of iris, hair, skin and lips; colours only, the shape of a face is not judged",
    ),
    "identity_error_driver": (
        "Colours against the driver's", "levels of 255", 2,
        "the same against the person whose expression drives: the truth's row is how much the two differ",
    ),
    "iris_colour_error": ("Iris", "levels of 255", 2, "mean colour of the visible iris"),
    "hair_colour_error": ("Hair", "levels of 255", 2, "mean colour of hair, brows, lashes and beard"),
    "skin_colour_error": ("Skin", "levels of 255", 2, "mean colour of the skin without lips"),
    "lips_colour_error": ("Lips", "levels of 255", 2, "mean colour of the lips"),
}  # fmt: skip
MAIN_METRICS = (
    "psnr", "psnr_expression", "ssim", "lpips", "sharpness", "flicker", "expression_error", "expression_followed", "pose_error_deg",
    "identity_error", "identity_error_driver",
)  # fmt: skip
METHODS = {
    "zeroed": "expression zeroed",
    "vae": "autoencoder alone",
    "portrait_copied": "portrait copied",
    "portrait_copied_vae": "portrait copied, through the autoencoder",
    "neutral": "true render, neutral face",
    "neutral_vae": "true render, neutral face, through the autoencoder",
    "truth": "truth",
}


@dataclass(frozen=True)
class Report:
    """What quality.json holds, without what follows from it (summary and targets, which the file has too).

    Attributes:
        clips: self-reenactment, per clip: person, mode, changed_share, methods -> metric -> figure or None.
        cross: the same for mixed factors; disentanglement: per case generated/truth -> changed factor -> read factor -> change.
        actions: per person: action -> figures; stream: of one long stream, or None.
        rulers: how well expression and pose are read from true renders, why that is missing or in doubt, why LPIPS is missing.
    """

    schema: int
    bundle: Mapping[str, Any]
    settings: Mapping[str, Any]
    thresholds: Mapping[str, float]
    rulers: Mapping[str, Any]
    clips: list[dict[str, Any]]
    cross: list[dict[str, Any]]
    disentanglement: list[dict[str, Any]]
    actions: list[dict[str, Any]]
    stream: dict[str, Any] | None
    seconds: float

    def to_json(self) -> str:
        data = {"kind": KIND, **asdict(self), "summary": summarise(self), "targets": verdicts(self)}
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Report:
        """Read quality.json; summary and targets are computed anew.

        Raises:
            UserError: not a report, made by a newer program, or incomplete.
        """
        action = "make it again with fp-bench quality"
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UserError(where, expected="JSON", found=str(error), action=action) from error
        if not isinstance(data, dict) or data.get("kind") != KIND or not isinstance(data.get("schema"), int):
            raise UserError(where, expected="a quality report", found="something else", action=action)
        if data["schema"] > SCHEMA:
            raise UserError(
                where, expected=f"schema {SCHEMA} or older", found=str(data["schema"]), action="update factorportrait"
            )
        names = {entry.name for entry in fields(cls)}
        if missing := sorted(names - set(data)):
            raise UserError(where, expected="all keys of a report", found=f"no {missing[0]}", action=action)
        return cls(**{name: data[name] for name in names})

    @property
    def primary(self) -> str:
        """The method that the bundle is judged by."""
        return f"steps_{self.settings['primary_steps']}"


def method_title(name: str) -> str:
    steps = name.removeprefix("steps_")
    return METHODS.get(name) or f"generated, {steps} step{'' if steps == '1' else 's'}"


def statistics(values: Iterable[float | None]) -> dict[str, float | int] | None:
    """Mean, smallest, largest and number of the values that exist; None without any."""
    kept = [value for value in values if value is not None]
    if not kept:
        return None
    return {"mean": float(np.mean(kept)), "min": min(kept), "max": max(kept), "clips": len(kept)}


def table(cases: list[dict[str, Any]]) -> dict[str, dict[str, dict | None]]:
    """Cases -> method -> metric -> statistics."""
    if not cases:
        return {}
    return {
        method: {metric: statistics(case["methods"][method].get(metric) for case in cases) for metric in METRICS}
        for method in cases[0]["methods"]
    }


def mean_of(report: Report, method: str, metric: str) -> float | None:
    """Mean over the self-reenactment clips."""
    if not report.clips or method not in report.clips[0]["methods"]:
        return None
    found = statistics(clip["methods"][method].get(metric) for clip in report.clips)
    return found["mean"] if found else None


def matrix(report: Report, kind: str) -> dict[str, Any] | None:
    """Disentanglement of `kind` ("generated" or "truth"): changes, and entries that can be compared.

    Every column is divided by how much true renders change when that factor itself changes, because coefficients, degrees and
    levels have no common unit; then every row by its diagonal. None when something was not measured.
    """
    raw: dict[str, dict[str, dict[str, float]]] = {}
    for side in {kind, "truth"}:
        raw[side] = {}
        for changed in FACTORS:
            cells = {read: statistics(case[side][changed][read] for case in report.disentanglement) for read in FACTORS}
            if any(cell is None for cell in cells.values()):
                return None
            raw[side][changed] = {read: cell["mean"] for read, cell in cells.items()}
    scale = {factor: raw["truth"][factor][factor] for factor in FACTORS}
    shares = {
        changed: {read: raw[kind][changed][read] / max(scale[read], 1e-9) for read in FACTORS} for changed in FACTORS
    }
    rows = {
        changed: {read: shares[changed][read] / max(shares[changed][changed], 1e-9) for read in FACTORS}
        for changed in FACTORS
    }
    dominance = {
        changed: 1 / max(max(value for read, value in row.items() if read != changed), 1e-9)
        for changed, row in rows.items()
    }
    return {"changes": raw[kind], "shares_of_truth": shares, "rows": rows, "dominance": dominance}


def summarise(report: Report) -> dict[str, Any]:
    """Tables that follow from the clips."""
    modes = dict.fromkeys(clip["mode"] for clip in report.clips)
    return {
        "self": table(report.clips),
        "by_mode": {mode: table([clip for clip in report.clips if clip["mode"] == mode]) for mode in modes},
        "cross": table(report.cross),
        "disentanglement": {kind: matrix(report, kind) for kind in ("generated", "truth")},
    }


def target_values(report: Report) -> dict[str, float | None]:
    """Figure of every target in targets.toml; None where it was not measured."""

    def mean(metric: str, method: str = report.primary) -> float | None:
        return mean_of(report, method, metric)

    def less(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a - b

    def over(a: float | None, b: float | None) -> float | None:
        return None if a is None or not b else a / b

    found = matrix(report, "generated")
    sharper = over(mean("sharpness", "steps_4"), mean("sharpness", "steps_50"))
    stream = report.stream
    long_enough = stream is not None and stream["frames"] >= 1000
    return {
        "self_psnr": mean("psnr"),
        "self_below_vae": less(mean("psnr", "vae"), mean("psnr")),
        "self_above_copy": less(mean("psnr"), mean("psnr", "portrait_copied_vae")),
        "self_above_neutral": less(mean("psnr"), mean("psnr", "neutral_vae")),
        "expression_psnr": mean("psnr_expression"),
        "expression_above_neutral": less(mean("psnr_expression"), mean("psnr_expression", "neutral_vae")),
        "zeroed_expression": over(mean("expression_error", "zeroed"), mean("expression_error")),
        "disentanglement": min(found["dominance"].values()) if found else None,
        "few_steps_expression": over(mean("expression_error", "steps_4"), mean("expression_error", "steps_50")),
        "few_steps_pose": over(mean("pose_error_deg", "steps_4"), mean("pose_error_deg", "steps_50")),
        "few_steps_sharpness": None if sharper is None else abs(sharper - 1),
        "few_steps_psnr": less(mean("psnr", "steps_50"), mean("psnr", "steps_4")),
        "stream_drift": stream["loss_db"] if long_enough else None,
        "stream_seam": stream["seam_ratio"]["against_latent_borders"] if long_enough else None,
    }


def load_targets(path: Path | None = None) -> list[dict[str, Any]]:
    """The entries of targets.toml."""
    text = (path or Path(__file__).with_name("targets.toml")).read_text(encoding="utf-8")
    return tomllib.loads(text)["target"]


def verdicts(report: Report) -> list[dict[str, Any]]:
    """Targets with value and status: met, missed or not measured; `note` says when fewer people were shown than asked for."""
    values, people = target_values(report), report.settings["identities"]
    out = []
    for target in load_targets():
        value = values[target["id"]]
        if value is None:
            status = "not measured"
        elif target["compare"] == "at_least":
            status = "met" if value >= target["figure"] else "missed"
        else:
            status = "met" if value <= target["figure"] else "missed"
        few = value is not None and people < target["identities"]
        note = f"on {people} of {target['identities']} test identities" if few else ""
        out.append({**target, "value": value, "status": status, "note": note})
    return out


def contact_sheet(title: str, rows: list[tuple[str, dict[str, np.ndarray]]], min_cell_px: int = 128) -> Image.Image:
    """Rows of captioned pictures under column titles; small pictures are enlarged by a whole number."""
    columns = list(rows[0][1])
    height, width = rows[0][1][columns[0]].shape[:2]
    factor = max(1, -(-min_cell_px // width))
    cell_w, cell_h = width * factor, height * factor
    gap, top, caption = 4, 46, 18
    sheet = Image.new(
        "RGB", (gap + len(columns) * (cell_w + gap), top + len(rows) * (cell_h + caption + gap)), (250, 250, 248)
    )
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(12)
    draw.text((gap, 4), title, fill=(20, 20, 20), font=font)
    for x, name in enumerate(columns):
        draw.text((gap + x * (cell_w + gap), 27), name, fill=(60, 60, 60), font=small)
    for y, (text, pictures) in enumerate(rows):
        up = top + y * (cell_h + caption + gap)
        for x, name in enumerate(columns):
            picture = Image.fromarray(np.ascontiguousarray(pictures[name]))
            sheet.paste(
                picture.resize((cell_w, cell_h), Image.Resampling.NEAREST), (gap + x * (cell_w + gap), up)
            )  # fmt: skip
        draw.text((gap, up + cell_h + 1), text, fill=(60, 60, 60), font=small)
    return sheet


def write_report(folder: Path, report: Report, sheets) -> list[Path]:
    """Write quality.json, the sheets and quality.html into `folder`; each file appears when it is whole."""
    bundle = f"{report.bundle['name']} {report.bundle['precision']}"
    pictures = {
        "contact_sheet.png": ("Self-reenactment of test people", sheets.self_rows),
        "cross_sheet.png": ("Cross-reenactment: portrait A, expression B, pose C, camera D", sheets.cross_rows),
        "action_sheet.png": ("Single actions of another person", sheets.action_rows),
    }
    images = {
        name: contact_sheet(f"{title} ({bundle})", rows) for name, (title, rows) in pictures.items() if rows
    }  # fmt: skip
    encoded = {}
    for name, image in images.items():
        buffer = io.BytesIO()
        image.save(buffer, "png", optimize=True)
        encoded[name] = buffer.getvalue()
    page = html_page(report, {pictures[name][0]: data for name, data in encoded.items()})
    contents = {"quality.json": report.to_json().encode(), **encoded, "quality.html": page.encode()}
    for name in FILES:
        if name in contents:
            with whole_file(folder / name) as temporary:
                temporary.write_bytes(contents[name])
        else:
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name in FILES if name in contents]


def metric_heading(metric: str) -> str:
    heading, unit, _, what = METRICS[metric]
    small = f"<br><small>{escape(unit)}</small>" if unit else ""
    return f'<span title="{escape(what)}">{escape(heading)}</span>{small}'


def methods_table(summary: dict[str, Any], primary: str, metrics: Iterable[str]) -> str:
    """Methods down, metrics across; metrics that nobody measured are left out."""
    kept = [metric for metric in metrics if any(row[metric] for row in summary.values())]
    rows = []
    for method, row in summary.items():
        cells = [number(row[metric]["mean"] if row[metric] else None, METRICS[metric][2]) for metric in kept]
        rows.append(("main" if method == primary else "", [escape(method_title(method)), *cells]))
    return html_table(["", *map(metric_heading, kept)], rows)


def targets_table(report: Report) -> str:
    rows = []
    for target in verdicts(report):
        sign = "≥" if target["compare"] == "at_least" else "≤"
        status = target["status"]
        label = f'<span class="status {status.split()[0]}">{status}</span>'
        note = f"<br><small>{escape(target['note'])}</small>" if target["note"] else ""
        aim = f"{sign} {target['figure']:g} {escape(target['unit'])}"
        rows.append(("", [escape(target["sentence"]), aim, number(target["value"], 3), label + note]))
    return html_table(["Target", "Figure", "Measured", ""], rows)


def matrix_section(summary: dict[str, Any]) -> str:
    if summary["disentanglement"]["generated"] is None:
        return '<p class="note">Not measured: it needs at least two people.</p>'
    parts = []
    for kind, title in (("generated", "Generated pictures"), ("truth", "True renders (what the rulers themselves mix up)")):
        found = summary["disentanglement"][kind]
        rows = []
        for changed in FACTORS:
            cells = [
                f"{found['rows'][changed][read]:.2f}<br><small>{found['changes'][changed][read]:.3g}</small>"
                for read in FACTORS
            ]
            rows.append(("", [f"change {changed}", *cells, f"{found['dominance'][changed]:.1f}×"]))
        head = ["", *(f"read {read}" for read in FACTORS), "diagonal over the largest other"]
        parts.append(f"<h3>{title}</h3>" + html_table(head, rows))
    return "".join(parts) + (
        '<p class="note">Large: change as a share of what true renders change when that factor itself is changed, divided by the '
        "row's diagonal. Small: the change itself, in coefficients, degrees, degrees and 8-bit levels.</p>"
    )


def stream_section(report: Report) -> str:
    stream = report.stream
    if stream is None:
        return '<p class="note">Not measured: --stream 1000 measures it.</p>'
    rows = [
        ("", [f"{i * stream['period']} to {(i + 1) * stream['period'] - 1}", number(value, 2)])
        for i, value in enumerate(stream["psnr_by_hundred"])
    ]
    seam = stream["seam_ratio"]
    return (
        html_table(["Frames", "PSNR, dB"], rows)
        + f"<p>Lost between the first and the last hundred: {stream['loss_db']:.2f} dB. Error of the change from frame to frame at "
        f"chunk borders: {number(seam['against_latent_borders'], 2)} times that at latent-frame borders inside chunks, "
        f"{number(seam['against_all'], 2)} times that of all other frames.</p>"
        '<p class="note">The driving goes to and fro, so that every hundred frames shows the same motion.</p>'
    )


def actions_table(report: Report) -> str:
    if not report.actions:
        return '<p class="note">Not measured: it needs at least two people.</p>'
    rows = [
        ("", [escape(f"{case['person']}: {action}"), number(figures["psnr_expression"], 2),
              number(figures["neutral_psnr_expression"], 2), number(figures["followed"], 2)])
        for case in report.actions
        for action, figures in case["actions"].items()
    ]  # fmt: skip
    heads = ["Action", "PSNR inside the changed pixels, dB", "of the true render with a neutral face, dB", "followed, of truth"]
    return html_table(heads, rows)


def clips_table(report: Report) -> str:
    kept = tuple(metric for metric in MAIN_METRICS if mean_of(report, report.primary, metric) is not None)
    rows = []
    for clip in report.clips:
        figures = clip["methods"][report.primary]
        cells = [number(figures[metric], METRICS[metric][2]) for metric in kept]
        rows.append(("", [escape(clip["person"]), escape(clip["mode"]), f"{100 * clip['changed_share']:.1f} %", *cells]))
    return html_table(["Person", "Mode", "Expression pixels", *map(metric_heading, kept)], rows)


def html_page(report: Report, sheets: Mapping[str, bytes]) -> str:
    """One page that works offline: style and pictures are inside. sheets: title -> PNG."""
    summary, settings, rulers = summarise(report), report.settings, report.rulers
    bundle = report.bundle
    different = {**settings.get("approximations", {})}
    if settings.get("expression_gain", 1.0) != 1:
        different["expression_gain"] = settings["expression_gain"]
    reader = f"Expression and pose errors: not measured, {escape(rulers['reader_missing'])}."
    if rulers["reader"]:
        notes = ", ".join(f"{name} {value}" for name, value in rulers["reader"].items())
        reader = f"Expression and pose are read by fitting the true renderer to the pictures (true renders: {escape(notes)})."
    if rulers["reader_doubt"]:
        reader += f' <b class="missed">Do not trust these figures: {escape(rulers["reader_doubt"])}.</b>'
    lpips = f"LPIPS: not measured, {escape(rulers['lpips_missing'])}." if rulers["lpips_missing"] else ""
    lead = (
        f"{settings['identities']} test identities, {settings['frames']} frames each at {bundle['width']}×{bundle['height']}, "
        f"modes {', '.join(settings['modes'])} in turn; {settings['generation']} mode, "
        f"{settings['primary_steps']} steps unless said; expression by {settings['expression']}"
        + "".join(f", {name.replace('_', ' ')} {value}" for name, value in different.items()) + "; "
        f"seed {settings['seed']}; {report.seconds:.0f} s. "
        f"Every figure is taken on 8-bit pictures against the true render."
    )
    others = tuple(metric for metric in METRICS if metric not in MAIN_METRICS)
    modes = "".join(
        f"<h3>{escape(mode)}</h3>" + methods_table(found, report.primary, MAIN_METRICS)
        for mode, found in summary["by_mode"].items()
    )
    images = "".join(
        f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">\n'
        for title, data in sheets.items()
    )
    terms = "".join(f"<li><b>{escape(m[0])}</b>: {escape(m[3])}.</li>" for m in METRICS.values())
    cross = methods_table(summary["cross"], report.primary, METRICS) if report.cross else "<p>Needs two people.</p>"
    body = f"""<h1>Quality of {escape(bundle["name"])}, {escape(bundle["precision"])}</h1>
<p>{lead}</p><p class="note">{reader} {lpips}</p>
<h2>Targets</h2>{targets_table(report)}
{images}
<h2>Self-reenactment, all modes</h2>{methods_table(summary["self"], report.primary, MAIN_METRICS)}
{methods_table(summary["self"], report.primary, others)}
<h2>Cross-reenactment</h2>{cross}
<h2>Disentanglement</h2>{matrix_section(summary)}
<h2>Stream</h2>{stream_section(report)}
<h2>Single actions</h2>{actions_table(report)}
<h2>By mode</h2>{modes}
<h2>Every clip, {settings["primary_steps"]} steps</h2>{clips_table(report)}
<h2>What the figures are</h2><ul>{terms}</ul>
<p class="note">Thresholds: {escape(json.dumps(dict(report.thresholds)))}.
Bundle {escape(bundle["source_key"][:16])}, {bundle["bytes"]} bytes.</p>"""
    return html_document(f"Quality of {bundle['name']} {bundle['precision']}", body)
