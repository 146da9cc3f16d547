"""Generation with the GPT of `train_gpt`: attention over the whole text, or over a cache."""
