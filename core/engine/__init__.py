"""The engine: the only package that knows llama.cpp. See `generation` for what goes in and what comes out."""
