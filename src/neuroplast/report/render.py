"""Templates into HTML: everything that comes from a run is escaped, and a name that is missing is an error."""

import json
from collections.abc import Callable
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined

from neuroplast.report import style


def render(template: str, **values: Any) -> str:
    """Fills a template of the folder `templates`."""
    environment = Environment(
        loader=PackageLoader("neuroplast.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # scripts cannot read it
    filters = cast(dict[str, Callable[..., str]], environment.filters)  # pyright: ignore[reportUnknownMemberType]
    filters |= {"signed": signed, "percent": percent, "words": words, "plain": plain}
    return environment.get_template(template).render(colours=style.KIND_COLOURS, **values)


def signed(value: float, digits: int = 2) -> str:
    """A number with a typographic minus, and no minus before a zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def percent(value: float, digits: int = 1) -> str:
    """A share as per cent."""
    return signed(100 * value, digits) + "\u202f%"


def words(name: str) -> str:
    """A name as words."""
    return name.replace("_", " ")


def plain(value: object) -> str:
    """A saved value as text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
