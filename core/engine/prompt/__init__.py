"""Turn messages into prompt tokens with the model's chat template, in a sandbox with a budget."""
