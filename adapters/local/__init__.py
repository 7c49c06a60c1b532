"""The local server: `python -m adapters.local` runs uvicorn and prints the loading progress on a terminal."""
