"""How the command line's arguments look in its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Choice = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="NUMBER", help_behavior_hint="")]
Whole = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
