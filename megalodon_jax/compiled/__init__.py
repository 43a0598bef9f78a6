"""Compiled programs: devices to compile for without having them, and readers of the result."""
