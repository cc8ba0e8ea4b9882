"""submit: the test predictions as the competition takes them."""

from pathlib import Path

import numpy as np

from img2prompt.core.rows import read_rows
from img2prompt.core.storage import whole
from img2prompt.predict.submission import check_submission, write_submission
from pipelines import run


def main() -> None:
    """Write outputs/submission.csv (imgId_eId,val), checked before it takes its name."""
    ids = read_rows(Path("outputs/prepare_test/test.parquet")).id
    predictions = np.load("outputs/scores/test.npy")
    with whole(Path("outputs/submission.csv")) as path:
        write_submission(path, ids, predictions)
        check_submission(path, ids, predictions.shape[1])
    print(f"outputs/submission.csv: {len(ids)} images")


if __name__ == "__main__":
    run(main)
