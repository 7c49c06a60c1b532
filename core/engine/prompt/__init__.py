"""Prompts: from messages to tokens, by the model's chat template in a sandbox with a budget."""
