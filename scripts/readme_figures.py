"""The README's picture and table, from a run of today: make readme-figures"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dtrain.compare.markdown import readme
from dtrain.compare.results import read
from dtrain.report.tables import put_between

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- comparison -->\n", "<!-- /comparison -->\n"
COMMAND = [
    sys.executable,
    "scripts/compare.py",
    "repeats=3",
    "hydra.run.dir=outputs/readme",
    "overwrite=true",
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def photograph(page: Path, picture: Path) -> None:
    """The top of the page, as a browser shows it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        sys.exit(f"dtrain: a picture of the page needs one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--virtual-time-budget=10000",
                "--disable-background-networking",
                "--disable-sync",
                f"--user-data-dir={profile}",
                "--window-size=1120,1720",
                f"--screenshot={picture}",
                page.as_uri(),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )


if __name__ == "__main__":
    if "--again" not in sys.argv:  # the last run's
        subprocess.run(COMMAND, cwd=ROOT, check=True)
    folder = ROOT / "outputs/readme"
    photograph(folder / "report.html", ROOT / "docs/comparison.png")
    put_between(ROOT / "README.md", BEGIN, END, readme(read(folder)))
