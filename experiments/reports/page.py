"""The comparison as one HTML page that asks the network for nothing."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from callbacks.samples import Samples
from callbacks.tables import percent
from experiments.reports.charts import colour, histogram, roc_chart
from experiments.reports.comparison import Comparison, Entry
from experiments.reports.examples import Images, examples, threshold
from experiments.reports.published import Beside
from experiments.reports.runs import Run
from experiments.reports.sheets import LEGEND, costs, notes, number
from experiments.reports.story import glossary, question, readings, winners

HERE = Path(__file__).parent
STANDARD = ("roc", "histogram_", "thresholds_")  # figures of every run: the page has its own, or leaves them out
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def to_html(
    comparisons: Sequence[Comparison], beside: Sequence[Beside], problems: Mapping[Path, str], pictured: bool = True
) -> str:
    """Write the page; ``pictured``: with what comes from scores, images and figures."""
    images = Images() if pictured else None
    return ENVIRONMENT.get_template("page.html").render(
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        readings=readings(comparisons),
        glossary=glossary(comparisons),
        legend=LEGEND.format(tied="underlined"),
        tables=[_table(comparison, images) for comparison in comparisons],
        beside=beside,
        problems=problems,
    )


def _table(comparison: Comparison, images: Images | None) -> dict[str, Any]:
    pictures, classes = [], []
    if images is not None:
        classes = images.classes(comparison.entries[0].runs[0])
        pictures = [_picture(entries, comparison, images) for entries in comparison.settings.values()]
    return {
        "question": question(comparison, classes),
        "columns": comparison.columns,
        "rows": _rows(comparison),
        "notes": notes(comparison),
        "apart": comparison.apart,
        "winners": winners(comparison),
        "charts": _charts(comparison, pictures),
        "pictures": pictures,
        "runs": [_run(run) for entries in comparison.settings.values() for run in entries[0].runs],
    }


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    marks = {
        (column, metric): comparison.marks(column, metric)
        for column in comparison.columns
        for metric in ("auroc", "fpr95")
    }
    return [
        {
            "method": entry.label,
            "experiment": entry.runs[0].results["experiment"],
            "seeds": len(entry.runs),
            "score": entry.score,
            "numbers": [
                _cell(number(entry, *key), entry.numbers.get(key[0], {}).get(key[1]), mark[i])
                for key, mark in marks.items()
            ],
            "costs": _costs(entry),
        }
        for i, entry in enumerate(comparison.entries)
    ]


def _costs(entry: Entry) -> list[dict[str, Any]]:
    outliers, _, accuracy, parameters, trained, seconds, milliseconds = costs(entry)
    cost = entry.cost
    return [
        {"text": outliers, "value": outliers},
        _cell(accuracy, entry.accuracy.get("id_accuracy")),
        _cell(parameters, cost.parameters) | {"small": f"{trained} trained"},
        _cell(seconds, cost.seconds),
        _cell(milliseconds, cost.milliseconds),
    ]


def _cell(text: str, value: Any, mark: str = "") -> dict[str, Any]:
    """Split a number from its interval, which is set below it."""
    figure, sign, rest = text.partition(" ±") if "±" in text else text.partition(" [")
    return {"text": figure, "small": (sign + rest).strip(), "value": "" if value is None else value, "mark": mark}


def _picture(entries: Sequence[Entry], comparison: Comparison, images: Images) -> dict[str, Any]:
    """Gather what is to be seen of a method: by its first seed, and of its scores the one of largest mean AUROC.

    What fails is ``missing``, with the reason.
    """
    run = entries[0].runs[0]
    best = max(entries, key=lambda entry: entry.overall["auroc"])
    missing: list[str] = []
    picture: dict[str, Any] = {
        "name": entries[0].label,
        "score": best.score,
        "of": len(entries),
        "run": run.results["name"],
        "figures": figures(run.folder, missing),
        "scores": {},
        "histograms": {},
        "missing": missing,
    }
    try:
        samples = Samples.load(run.folder / "scores.npz")
        if best.score not in samples.scores:
            raise ValueError(f"scores.npz has no {best.score}")
        tau = threshold(run, samples, best.score)
        for ood_set in (name for name in comparison.sets if name in samples.ood_sets):
            known, unknown = (samples.of(name).scores[best.score] for name in ("id", ood_set))
            roc_chart([(known, unknown)])
            picture["histograms"][ood_set] = histogram(known, unknown, tau)
            picture["scores"][ood_set] = known, unknown
        picture["tau"] = tau
        picture["examples"] = examples(samples, images.of(run), best.score, tau)
    except (ValueError, OSError) as error:
        missing.append(str(error))
    except Exception as error:  # of damaged files, or of a user's own data: the report goes on without pictures
        missing.append(f"scores.npz does not go with the run or its data: {type(error).__name__}: {error}")
    return picture


def figures(folder: Path, missing: list[str]) -> dict[str, str]:
    """Return the pictures that a method or the embedding left in a run folder: name -> address that holds it.

    Those that cannot be read join what is ``missing``.
    """
    found = {}
    for path in sorted((folder / "figures").glob("*.png")):
        if not path.stem.startswith(STANDARD):
            try:
                found[path.stem] = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            except OSError as error:
                missing.append(str(error))
    return found


def _charts(comparison: Comparison, pictures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Show, for each OOD set, the ROC curves of all methods together, and a histogram of each."""
    return [
        {
            "set": ood_set,
            "group": group,
            "roc": roc_chart([p["scores"][ood_set] for p in drawn]),
            "colours": [colour(i) for i in range(len(drawn))],
            "histograms": [(p["name"], p["score"], p["histograms"][ood_set]) for p in drawn],
        }
        for ood_set, group in comparison.sets.items()
        if (drawn := [p for p in pictures if ood_set in p["scores"]])
    ]


def _run(run: Run) -> dict[str, Any]:
    """Say what was run: facts by name, and the configuration as YAML."""
    results, record = run.results, run.record
    facts = {
        "seed": results["seed"],
        "checkpoint": f"{results.get('checkpoint')}, epoch {results.get('epoch')}",
        "trained": ", ".join(record.get("starts", [])) or "not by a run",
        "code": results.get("git_revision"),
        "computed by": f"{results.get('hardware')}, {results.get('processes')} process(es)",
        "packages": ", ".join(f"{name} {version}" for name, version in (results.get("packages") or {}).items()),
        "SHA-256 of the evaluated weights": results.get("weights_sha256"),
    }
    for part, file in (record.get("weights") or results.get("weights") or {}).items():
        facts[f"weights of {part}"] = f"{file.get('source')} ({file.get('file')}, SHA-256 {file.get('sha256')})"
    facts |= {
        f"images of {name}": f"{split['size']:,}, {split['fingerprint']}" for name, split in results["splits"].items()
    }
    for key, words in (("duplicates", "outliers also in"), ("removed", "outliers left out, which are also in")):
        for name, count in ((results["outliers"] or {}).get(key) or {}).items():
            facts[f"{words} {name}"] = count
    facts |= results.get("notes") or {}
    if results["id_accuracy"] is not None:
        facts["ID accuracy"] = f"{percent(results, 'id_accuracy')}%"
    return {
        "name": f"{results['experiment']}/{results['name']}",
        "facts": {name: value for name, value in facts.items() if value is not None},
        "config": yaml.safe_dump(results["configuration"], sort_keys=False),
    }
