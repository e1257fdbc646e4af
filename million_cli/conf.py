"""Where the Hydra groups lie; without Hydra, so that what runs on machines without it can read them."""

from __future__ import annotations

from pathlib import Path

from million_cli.errors import UserError
from million_cli.results import CHECKOUT


def conf_folder() -> Path:
    """The folder of Hydra groups: the checkout's, else the one in the installed package.

    Raises:
        UserError: neither exists.
    """
    package = Path(__file__).resolve().parent
    # An editable install leaves a stale copy in site-packages, so the checkout comes first.
    for folder in (CHECKOUT / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"no conf/config.yaml in {CHECKOUT} or {package}; reinstall the package")
