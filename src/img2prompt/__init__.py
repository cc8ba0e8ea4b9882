"""img2prompt: from images to the sentence embeddings of the prompts behind them."""
