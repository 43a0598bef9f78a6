"""Measurements: speed and memory, each a script that prints what it measured."""
