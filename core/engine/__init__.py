"""The engine: llama.cpp behind the types of `core.engine.interface`. The only package that imports llama_cpp."""
