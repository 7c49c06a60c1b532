"""Translate JSON Schemas to grammars and compile them with llguidance, within bounds."""
