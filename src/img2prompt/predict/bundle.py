"""A bundle: the trained model as one flat folder, of which nothing is used before all of it is checked."""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import Any

import numpy as np

from img2prompt.core.metric import cosine
from img2prompt.core.storage import digest, read_json, whole, write_json

FORMAT = 1
MANIFEST = "manifest.json"
LEAST = 0.999  # cosine of a canary's prediction with its known vector: mixed precision on a GPU has 0.99999


@dataclass(frozen=True)
class Bundle:
    """A folder of files and its manifest, which says of each the place that it has in a run's outputs.

    manifest: `files` by place, such as clip/0/open_clip_config.json, each with its `file` in the folder and `sha256`;
    `members` by name with their weights; `canaries`: the `images` and their `vectors`, by place; and what a reader may
    want to know.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Bundle:
        """Read the manifest and check every file against it.

        Raises:
            OSError: the manifest cannot be read.
            ValueError: the bundle is of a newer format, or names every file that is missing or damaged.
        """
        path = folder / MANIFEST
        again = "copy the bundle again, or export it anew"
        try:
            manifest = read_json(path)
            wanted = manifest["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({type(error).__name__}: {error}): {again}") from None
        if wanted != FORMAT:
            raise ValueError(f"{path}: format {wanted}, and this img2prompt reads {FORMAT}: install the one it is from")
        if manifest.get("sha256") != _seal(manifest):
            raise ValueError(f"{path}: damaged: {again}")
        wrong = []
        for place, entry in manifest["files"].items():
            file = folder / entry["file"]
            if ".." in PurePosixPath(place).parts or PurePosixPath(place).is_absolute() or file.parent != folder:
                wrong.append(f"{entry['file']} ({place}) leads out of the bundle")
            elif not file.is_file():
                wrong.append(f"{entry['file']} is missing")
            elif digest_of(file) != entry["sha256"]:
                wrong.append(f"{entry['file']} is damaged")
        if wrong:
            raise ValueError(f"{folder}: {', '.join(wrong)}: {again}")
        return cls(folder, manifest)

    def write(self) -> None:
        """Write the manifest."""
        with whole(self.folder / MANIFEST) as path:
            write_json(path, {**self.manifest, "sha256": _seal(self.manifest)})

    @property
    def files(self) -> dict[str, Path]:
        """The files by their places."""
        return {place: self.folder / entry["file"] for place, entry in self.manifest["files"].items()}

    @property
    def canaries(self) -> list[Path]:
        """The images whose vectors are known."""
        return [self.files[place] for place in self.manifest["canaries"]["images"]]

    def check(self, vectors: np.ndarray) -> None:
        """Compare what was predicted for the canaries, (c, 384), with what is known.

        Raises:
            ValueError: names the canary that is farthest off.
        """
        cosines = cosine(vectors, np.load(self.files[self.manifest["canaries"]["vectors"]]))
        worst = int(cosines.argmin())
        if cosines[worst] < LEAST:
            versions = ", ".join(f"{name} {version}" for name, version in self.manifest["versions"].items())
            raise ValueError(
                f"{self.folder}: what is predicted of {self.canaries[worst].name} has cosine {cosines[worst]:.4f} with "
                f"what was predicted where the bundle was written, and {LEAST} is the least: some library computes "
                f"something else here; there it was {versions}"
            )


class Links:
    """A folder of links in the layout of a run's outputs, `folder`; it goes when the object does.

    Args:
        files: by place.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.folder = Path(mkdtemp(prefix="img2prompt-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        for place, file in files.items():
            link = self.folder / place
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())


def is_bundle(folder: Path) -> bool:
    """Whether a folder has a bundle's manifest."""
    return (folder / MANIFEST).is_file()


def file_of(place: str) -> str:
    """The name in the flat folder of what has this place in a run's outputs."""
    return place.replace("/", ".")


def digest_of(file: Path) -> str:
    """SHA-256 of a file, in hex, as `sha256sum` prints it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    """A digest of the manifest itself, but for this digest."""
    return digest(json.dumps({name: value for name, value in manifest.items() if name != "sha256"}, sort_keys=True))
