"""Grammars: from JSON Schema to what llguidance compiles, within bounds."""
