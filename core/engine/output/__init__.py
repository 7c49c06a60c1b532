"""What a sequence's tokens say: text, reasoning and tool calls, in the form of the model's family."""
