"""report: the run as one page that opens from disk."""

from pathlib import Path

import numpy as np

from img2prompt.clip.params import ClipParams
from img2prompt.core.device import device
from img2prompt.core.storage import whole_folder
from img2prompt.ensemble.params import EnsembleParams
from img2prompt.prompts.params import DedupParams
from img2prompt.report import findings
from img2prompt.report.gallery import galleries
from img2prompt.report.page import render
from img2prompt.report.run import Run, data_of
from img2prompt.sources.params import PrepareParams
from img2prompt.words.words import Words
from pipelines import run

OUTPUTS = Path("outputs")


def main(prepare: PrepareParams, clip: ClipParams, dedup: DedupParams, ensemble: EnsembleParams) -> None:
    """Write index.html. Same inputs, same bytes: times and versions stand in outputs/run.js, which the page loads."""
    of, where = Run.read(OUTPUTS), device()
    page = render(
        "report.html",
        title=data_of(of.cosines),
        competition={"train": [source.path for source in prepare.train], "test": prepare.test.path},
        rows={
            "train": len(of.train),
            "texts": len(of.texts),
            "test": len(of.test),
            "known": len(of.on_test),
            "kept": int(of.kept.sum()),
            "scored": int(of.scored.sum()),
        },
        clips=findings.clips(of, clip),
        scores=findings.scores(of),
        alpha=ensemble.alpha,
        fold_count=len(np.unique(of.fold)),
        mixture=findings.mixture(of),
        training=findings.training(of),
        dedup=dedup,
        thresholds=findings.thresholds(of, dedup.threshold),
        pairs=findings.pairs(of, dedup, where),
        leakage=findings.leakage(of),
        folds=findings.folds(of),
        nearness=findings.by_nearness(of, where),
        quarantine=findings.quarantine(of),
        galleries=galleries(of, Words.load(OUTPUTS / "words", where), where),
        by_length=findings.by_length(of),
        by_cluster=findings.by_cluster(of),
    )
    with whole_folder(OUTPUTS / "report") as out:
        (out / "index.html").write_text(page, encoding="utf-8")
    print(f"outputs/report/index.html: {len(page.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
