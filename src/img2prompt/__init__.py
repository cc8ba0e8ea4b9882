"""img2prompt: from images to the sentence embeddings of the prompts behind them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from img2prompt.predict.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # Not at the top: stages and commands need not wait for the import of CLIP and torch.
    if name == "Predictor":
        from img2prompt.predict.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
