"""docs/commands.md: `python -m backend.control.commands_page > docs/commands.md`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from backend.ioasid import Engine
from backend.ioasid.documentation import render_markdown

from .control import Control
from .events import TOPICS


def page() -> str:
    """The commands, and what the control socket has beside them; ends with a newline."""
    return render_markdown() + "\n".join(_more()) + "\n"


def _more() -> Iterator[str]:
    yield ""
    yield "## Over the control socket"
    yield ""
    yield "Each command is a method there ([control.md](control.md)) and takes one map of its fields: an access in"
    yield "letters (`r`, `w`, `rw`), a record as a map. These are methods, too; those that do DMA take `rid`, `iova`"
    yield "and [`pasid`], and answer with `fault`, nil or what a fault is, and with what they read:"
    yield ""
    yield "| method | |"
    yield "| --- | --- |"
    yield "| `hello` | What the server is: version, methods, notifications, limits. |"
    for name, text in sorted(_looks()):
        yield f"| `{name}` | {text} |"
    yield ""
    yield f"Notifications: {', '.join(f'`{topic}`' for topic in TOPICS)}; and whatever was subscribed to, `lost` and"
    yield "`closing`."


def _looks() -> Iterator[tuple[str, str]]:
    engine = Engine()
    try:
        for name, look in Control(engine, Path("none")).looks.items():
            yield name, re.sub(r"\s+", " ", inspect.getdoc(look) or "")
    finally:
        engine.close()


if __name__ == "__main__":
    sys.stdout.write(page())
