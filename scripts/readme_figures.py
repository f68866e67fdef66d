"""Write the figures of README and docs, from runs of today: make readme-figures

With --again of the last comparison; with --tables which strategies go together, and no more.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dtrain.compare import capabilities
from dtrain.compare.markdown import block
from dtrain.compare.results import read
from dtrain.report.tables import put_between

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
COMPARISON = "<!-- comparison -->\n", "<!-- /comparison -->\n"
RUN = "<!-- run -->\n", "<!-- /run -->\n"
SIX = ("single", "ddp", "zero1", "fsdp", "tensor", "pipeline schedule=1f1b")
FOLDER = ROOT / "outputs/readme"
DTRAIN = [sys.executable, "-m", "dtrain"]
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


def tables() -> None:
    """Which strategies go together."""
    marks = capabilities.BEGIN, capabilities.END
    put_between(ROOT / "docs/strategies.md", *marks, capabilities.markdown())


def figures(again: bool) -> None:
    """A comparison, its picture, and what one run prints."""
    if not again:
        where = [f"hydra.run.dir={FOLDER.relative_to(ROOT)}", "overwrite=true"]
        subprocess.run([*DTRAIN, "compare", "repeats=3", *where], cwd=ROOT, check=True)
    results = read(FOLDER)
    photograph(FOLDER / "report.html", ROOT / "docs/comparison.png")
    put_between(ROOT / "docs/comparison.md", *COMPARISON, block(results))
    command = [*DTRAIN, "train", "launch.nproc=2", "strategy=fsdp"]
    run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    printed = run.stdout.replace(f"{ROOT}/", "")
    for readme in READMES:
        put_between(readme, *COMPARISON, block(results, SIX))
        put_between(readme, *RUN, f"```text\n{printed}```\n")


if __name__ == "__main__":
    if "--tables" in sys.argv:
        tables()
    else:
        figures("--again" in sys.argv)
