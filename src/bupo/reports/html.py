"""Shared parts of the HTML pages: templates, styles, scripts, and escaped data."""

import json
import math
import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from bupo.utils.files import atomic_write

STATIC_DIR = Path(__file__).parent / "static"


def escape_inline(text: str) -> Markup:
    """Escape a script or style for its element, where `</script>` or `<!--` in a string would break the page."""
    text = re.sub("<(?=/(script|style))", r"<\\", text, flags=re.IGNORECASE)
    return Markup(text.replace("<!--", r"\x3c!--"))


def _read_static(name: str) -> Markup:
    return escape_inline((STATIC_DIR / name).read_text(encoding="utf-8"))


_TEMPLATES = jinja2.Environment(loader=jinja2.PackageLoader("bupo", "reports"), autoescape=True)
_TEMPLATES.globals["static"] = _read_static
# allow inline scripts and styles and the images that they make; load and send nothing
_TEMPLATES.globals["policy"] = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; "
    "base-uri 'none'"
)


def write_html(path: str | Path, template: str, **names) -> None:
    """Render a template of this folder into one file.

    Args:
        path (`str`): HTML file to write.
        template (`str`): file name of the template, which escapes every value not marked `safe`.
        names: variables of the template.
    """
    with atomic_write(Path(path)) as part:
        part.write_text(_TEMPLATES.get_template(template).render(**names), encoding="utf-8", errors="replace")


def dump_script_json(data: dict) -> str:
    """Return JSON escaped for a script element, because texts may contain `</script>`. NaN becomes null."""

    def clean(value):
        if isinstance(value, float):
            return None if math.isnan(value) else value
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return [clean(item) for item in value] if isinstance(value, list | tuple) else value

    text = json.dumps(clean(data), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
