"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build/html` (extra `docs`)."""

import os
import sys
from pathlib import Path

# The notebooks and autodoc run on the CPU, whatever the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
sys.path.insert(0, str(DOCS))

import generate_pages  # noqa: E402

from megalodon_jax.version import __version__  # noqa: E402

project = "megalodon-flax"
author = "the authors of megalodon-flax"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "generated/*_tables.md"]
html_theme = "furo"
html_title = f"megalodon-flax {__version__}"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
# A failed cell fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def _skip_named_tuple_fields(app, what, name, value, skip, options):
    """Fields of a NamedTuple stand in its docstring; their own one is "Alias for field number 0"."""
    return True if type(value).__name__ == "_tuplegetter" else skip


def _make_examples_literal(app, what, name, value, options, lines):
    """`Example:` and the indented code below it become a literal block; runs before napoleon."""
    for index, line in reversed(list(enumerate(lines))):
        if line.strip() == "Example:":
            lines[index : index + 1] = [f"{line.rstrip()}:", ""]


def _escape_stars_of_types(app, what, name, value, options, lines):
    """Stars of shapes such as `"*B G"` in the types of fields; runs after napoleon."""
    for index, line in enumerate(lines):
        if line.lstrip().startswith(":vartype"):
            lines[index] = line.replace("*", "\\*")


def _prefer_repository_pages(app, docname, source):
    """Links to files outside docs/ become links to their page, or names of files."""
    source[0] = generate_pages.rewrite_links(source[0], Path(app.srcdir, docname).parent)


def setup(app):
    """Generates pages, then registers the hooks."""
    generate_pages.write_all()
    app.connect("autodoc-skip-member", _skip_named_tuple_fields)
    app.connect("autodoc-process-docstring", _make_examples_literal, priority=100)
    app.connect("autodoc-process-docstring", _escape_stars_of_types, priority=900)
    app.connect("source-read", _prefer_repository_pages)
