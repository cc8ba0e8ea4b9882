"""img2prompt: from pictures to the sentence embeddings of the prompts behind them."""
