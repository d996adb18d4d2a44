"""maturin as the build backend, fed with the project's own C header.

maturin makes the cffi module from `header.h` in cargo's target folder. What is written there is include/rewardrt.h
without its preprocessor lines, which cffi does not read: the header stays the one description of the ABI.
"""

import json
import pathlib
import subprocess

import maturin
from maturin import *  # noqa: F403  the hooks that need no header

FFI = pathlib.Path(__file__).resolve().parents[2]


def declarations(header: str) -> str:
    """The C declarations of a header: no directives, nothing that is for C++ alone."""
    lines = []
    cplusplus = directive = False
    for line in header.splitlines():
        starts = line.lstrip().startswith("#")
        if starts and "__cplusplus" in line:
            cplusplus = True
        elif cplusplus:
            cplusplus = not line.lstrip().startswith("#endif")
        elif not (starts or directive):
            lines.append(line)
        # A backslash at its end continues a directive, not a declaration.
        directive = (starts or directive) and line.endswith("\\")
    return "\n".join(lines) + "\n"


def _write_declarations() -> None:
    command = ["cargo", "metadata", "--format-version", "1", "--no-deps", "--manifest-path", str(FFI / "Cargo.toml")]
    metadata = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    target = pathlib.Path(metadata["target_directory"])
    target.mkdir(parents=True, exist_ok=True)
    header = (FFI / "include" / "rewardrt.h").read_text(encoding="utf-8")
    (target / "header.h").write_text(declarations(header), encoding="utf-8")


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _write_declarations()
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _write_declarations()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)
