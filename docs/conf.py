"""How the documentation is built: `make docs`."""

import re
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import neuroplast
from neuroplast.study import StudyConfig

project = "neuroplast"
author = "The neuroplast authors"
project_copyright = author
release = version = neuroplast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sourcelink = False

# Types stand beside the parameters that they belong to, so that a signature can be read.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!neuroplast\.).*"),  # other packages: no inventory is fetched from the network
    ("py:class", r"neuroplast\..*\.(HasTokenizer|TraceMaps)"),  # anything that has what is asked of it
]

SETTINGS = "neuroplast.study.StudyConfig."
COLON = "\ue000"
"""Stands for a colon where napoleon would take what is before it for a type."""


def read_as_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: what reStructuredText would take for markup elsewhere is text."""
    if field := StudyConfig.model_fields.get(name.removeprefix(SETTINGS)):
        lines.append(f"Default: `{field.default!r}`.")
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line)
        shown = [f"`{part}`" if part.startswith("`") else re.sub(r"([|*])", r"\\\1", part) for part in parts]
        lines[number] = "".join(shown)
        if what in ("attribute", "property"):
            lines[number] = lines[number].replace(":", COLON)


def put_colons_back(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """After napoleon, a colon is one again."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def without_fields(app: Any, what: str, name: str, obj: Any, *_: Any) -> tuple[str, None] | None:
    """A class that is its fields needs no signature beside them."""
    return ("", None) if what == "class" and (is_dataclass(obj) or issubclass(obj, StudyConfig)) else None


def settings_only(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Of a config, the settings are shown, and not what the library asks of it."""
    method = getattr(obj, "fget", obj)
    owner = getattr(method, "__qualname__", "").rpartition(".")[0]
    return True if callable(method) and owner.endswith(("Config", "Subject")) else None


def setup(app: Any) -> None:
    """Registers what is done to docstrings and signatures; napoleon works at priority 500."""
    StudyConfig.__annotations__ = get_type_hints(StudyConfig)  # without the bounds that pydantic checks
    app.connect("autodoc-process-docstring", read_as_text, priority=400)
    app.connect("autodoc-process-docstring", put_colons_back, priority=600)
    app.connect("autodoc-process-signature", without_fields)
    app.connect("autodoc-skip-member", settings_only)
