"""Ctrl-C ends a command with exit code 3, wherever it comes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parents[1]

CODE = """
import sys

from sparsebench import cli
from sparsebench.__main__ import main

INTERRUPT = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
cli.VERBS["doctor"] = lambda arguments: exec(INTERRUPT)  # as dataclasses and namedtuples do when they are imported
sys.argv[1:] = ["doctor"]
sys.exit(main())
"""


def test_an_interrupt_while_code_is_executed_from_text_is_still_exit_code_3(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(CODE)
    ended = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(TOP)},
    )
    assert ended.returncode == 3, ended.stderr
    assert "interrupted; what was finished is in the store" in ended.stderr
