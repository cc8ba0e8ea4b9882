"""The sample's images as rows of a competition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from joblib import Parallel, delayed

from img2prompt.core.images import pack
from img2prompt.core.process import threads
from img2prompt.core.progress import progress
from img2prompt.core.rows import Row
from img2prompt.core.storage import digest
from img2prompt.sample.render import jpeg
from img2prompt.sample.scenes import Scene
from img2prompt.sources.reading import Batch


def drawn(prompts: Sequence[tuple[str, Scene]], tar: Path, home: Path) -> Batch:
    """Draw scenes into a tar; the rows, named 000000 and so on, with references to where the tar will be, in `home`."""
    jobs = Parallel(n_jobs=threads(), return_as="generator")(delayed(jpeg)(scene) for _, scene in prompts)
    ids = [f"{number:06d}" for number in range(len(prompts))]
    images = progress(jobs, f"drawing {tar.stem} images", len(prompts), "image")
    spans = pack(tar, [f"{name}.jpg" for name in ids], images)
    rows = [
        Row(name, "sample", f"{home / tar.name}{span}", prompt)
        for name, span, (prompt, _) in zip(ids, spans, prompts, strict=True)
    ]
    return Batch(rows, [], digest(tar).encode())
