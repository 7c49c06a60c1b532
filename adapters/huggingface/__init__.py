"""The Hugging Face Hub as a source of models. Speaks to it through huggingface_hub."""
