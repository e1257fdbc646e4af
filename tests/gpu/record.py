"""Writes the record of a run of the GPU suite: record.py WORK_DIR OUT_DIR (scripts/gpu_suite.sh)."""

from __future__ import annotations

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from million_cli.ops.build import compiler, suite_digest
from million_cli.results import git_commit


def sanitizer(log: Path) -> str:
    """ "clean", or the summary of the errors, or why there is none."""
    if not log.is_file():
        return "not run"
    text = log.read_text()
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", text)
    if "exit code 0" in text and "done" in text and found and re.match(r"0 (errors|hazards)", found[-1]):
        return "clean"
    return found[-1] if found else "failed: " + text.strip().splitlines()[-1]


def main(work: Path, out: Path) -> None:
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        for suite in ElementTree.parse(work / f"{file.stem}.xml").getroot().iter("testsuite"):
            for name in counts:
                counts[name] += int(suite.get(name, 0))
    gpu = torch.cuda.get_device_name()
    record = {
        "gpu": gpu,
        "capability": torch.cuda.get_device_capability(),
        **counts,
        "memcheck": sanitizer(work / "memcheck.log"),
        "racecheck": sanitizer(work / "racecheck.log"),
        "torch": torch.__version__,
        "compiler": compiler()[1],
        "commit": git_commit(),
        "sha256": suite_digest(),
    }
    folder = out / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.json").write_text(json.dumps(record, indent=2) + "\n")
    if (work / "kernel.csv").is_file():
        shutil.copy(work / "kernel.csv", folder / "kernel.csv")
    print(json.dumps(record, indent=2))
    bad = counts["failures"] + counts["errors"]
    sys.exit(1 if bad or record["memcheck"] != "clean" or record["racecheck"] != "clean" else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
