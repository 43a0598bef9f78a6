"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build/html` (extra `docs`)."""

import inspect
import os
import re
import sys
from pathlib import Path

from sphinx.util.inspect import stringify_signature

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
html_show_copyright = False
html_show_sphinx = False
html_title = f"megalodon-flax {__version__}"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
# A failed cell fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900

# The docstring of a module's __call__ says what the module computes.
autodoc_default_options = {"special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
# Docstrings write code in single backticks.
default_role = "literal"
napoleon_use_ivar = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def _constructor_signature(app, what, name, value, options, signature, return_annotation):
    """The constructor of a module: the metaclass of `nnx.Module` has (*args, **kwargs)."""
    if what != "class" or not (signature or "").startswith("(*args"):
        return None
    full = inspect.signature(value.__init__)
    own = full.replace(parameters=list(full.parameters.values())[1:])
    return stringify_signature(own, unqualified_typehints=True), None


def _skip_named_tuple_fields(app, what, name, value, skip, options):
    """A NamedTuple's docstring has its fields; their own is "Alias for field number 0"."""
    return True if type(value).__name__ == "_tuplegetter" else skip


_FIELD_DOCS: dict[str, list[str]] = {}


def _to_rst(app, what, name, value, options, lines):
    """Docstrings are not reStructuredText: bars and examples; runs before napoleon.

    `|q|` is not a substitution; `Example:` and the indented code below it are a literal block.
    """
    lines[:] = [re.sub(r"(?<![`\\])\|(\w+)\|", r"\|\1\|", line) for line in lines]
    if what == "attribute":
        _FIELD_DOCS[name] = list(lines)
    for index, line in reversed(list(enumerate(lines))):
        if line.strip() == "Example:":
            lines[index : index + 1] = [f"{line.rstrip()}:", ""]


def _after_napoleon(app, what, name, value, options, lines):
    """Restores docstrings of fields, and escapes stars of shapes in types, such as "*B G".

    Napoleon reads "Steps between evaluations; 0: only at the end" as a type and a description.
    """
    if what == "attribute":
        lines[:] = _FIELD_DOCS.pop(name, lines)
    for index, line in enumerate(lines):
        if line.lstrip().startswith(":vartype"):
            lines[index] = line.replace("*", "\\*")


def _prefer_repository_pages(app, docname, source):
    """Links to files outside docs/ become links to their page, or names of files."""
    source[0] = generate_pages.rewrite_links(source[0], Path(app.srcdir, docname).parent)


def setup(app):
    """Generates pages, then registers the hooks."""
    generate_pages.write_all()
    app.connect("autodoc-process-signature", _constructor_signature)
    app.connect("autodoc-skip-member", _skip_named_tuple_fields)
    app.connect("autodoc-process-docstring", _to_rst, priority=100)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=900)
    app.connect("source-read", _prefer_repository_pages)
