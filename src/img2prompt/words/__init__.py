"""Words for an embedding: the nearest prompts, the words that it says, and a prompt composed for it."""
