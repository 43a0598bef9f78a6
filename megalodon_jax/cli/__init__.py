"""The `megalodon` command."""
