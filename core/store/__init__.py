"""Models on this machine: references, MODELS_DIR, verified downloads and atomic publishing."""
