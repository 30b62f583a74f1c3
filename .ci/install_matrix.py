"""Installs the package in every supported way, each in a fresh virtual environment, and checks what came out.

    python .ci/install_matrix.py                 # all of them; 5 to 30 minutes, depending on what pip has cached
    python .ci/install_matrix.py --only fresh    # some of them: --list names them
    python .ci/install_matrix.py --torch torch==2.13.0

What is checked: torch that was there is still there, and is what the build used; _cuda.so is there exactly where it
should be; the installed package imports from another folder and runs an op; files of the build are not left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ["setuptools>=77", "pybind11", "cmake", "ninja"]  # as in pyproject.toml

PROBE = """
import json, torch, cerberus_ext
from cerberus_ext import _host
from cerberus_ext.ops import libraries
record = libraries.build_record()
entropy = torch.ops.cerberus_ext.hidden_entropy(torch.zeros(1, 8)).item()
assert abs(entropy - 2.0794415) < 1e-5, entropy
assert _host.depths([-1, 0]).tolist() == [0, 1]
package = libraries.PACKAGE
print(json.dumps({
    "package": str(package), "torch": torch.__version__, "torch_folder": torch.__path__[0],
    "built_with": record["torch"], "cuda": record["cuda"], "cuda_library": (package / "_cuda.so").is_file(),
    "pretrained": sorted(f.name for f in (package / "pretrained").rglob("*") if f.is_file()),
}))
"""


class Failed(Exception):
    """A way of installing did not do what it has to."""


@dataclass
class Sandbox:
    """A virtual environment and a copy of the source, made for one way of installing."""

    folder: Path
    torch: str
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / "log.txt"
        venv.create(self.folder / "venv", with_pip=True)
        self.python = self.folder / "venv" / "bin" / "python"
        self.source = self.folder / "source"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (self.source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.source / name)

    def run(self, *command: str | Path, **environment: str) -> str:
        """Runs a command in the source folder; its output goes to the log and comes back."""
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        variables = {**os.environ, "PATH": path, **environment}
        variables.pop("PYTHONPATH", None)
        result = subprocess.run(
            [str(part) for part in command],
            cwd=self.source,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with self.log.open("a") as log:
            print("+", *command, environment, result.stdout, sep=" ", file=log)
        if result.returncode:
            raise Failed(f"{' '.join(map(str, command))} exited with {result.returncode}; {self.log}")
        return result.stdout

    def pip(self, *arguments: str | Path, **environment: str) -> str:
        return self.run(self.python, "-m", "pip", "install", *arguments, **environment)

    def probe(self) -> dict:
        """What the installed package says of itself, asked from a folder that is not the source."""
        result = subprocess.run([self.python, "-c", PROBE], cwd=self.folder, capture_output=True, text=True)
        if result.returncode:
            raise Failed(f"the installed package does not work: {result.stderr.strip().splitlines()[-1]}")
        return json.loads(result.stdout.splitlines()[-1])

    def torch_files(self) -> dict[str, int]:
        """What identifies an installed torch: the files of its metadata and when each was written."""
        pattern = "lib/python*/site-packages/torch-*.dist-info/*"
        return {str(f): f.stat().st_mtime_ns for f in (self.folder / "venv").glob(pattern) if f.is_file()}


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Failed(what)


def check_cuda(found: dict, wanted: bool) -> None:
    expect(
        found["cuda_library"] == wanted,
        f"_cuda.so there: {found['cuda_library']}, expected: {wanted} ({found['cuda']})",
    )


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").is_file()


def fresh(box: Sandbox) -> None:
    """(a) Nothing there but the pip that venv brings: torch is fetched, within the tried versions."""
    box.pip(".")
    found = box.probe()
    major, minor = map(int, found["torch"].split(".")[:2])
    expect((2, 10) <= (major, minor) < (2, 14), f"torch {found['torch']} was installed, expected >= 2.10, < 2.14")
    check_cuda(found, has_nvcc())


def fresh_with_new_pip(box: Sandbox) -> None:
    """(a) The same with the newest pip; without CUDA, to be quick."""
    box.pip("--upgrade", "pip")
    box.pip(".", CERBERUS_CUDA="off")
    check_cuda(box.probe(), False)


def torch_there(box: Sandbox) -> None:
    """(b) torch is there, build isolation on: it is kept, and its headers are used where they lie."""
    box.pip(box.torch)
    before = box.torch_files()
    output = box.pip("-v", ".", CERBERUS_CUDA="off")
    found = box.probe()
    expect(bool(before) and box.torch_files() == before, "torch was replaced or installed again")
    used = f"torch {found['torch']} in {found['torch_folder']}"
    expect(used in output, f"the build did not say that it used {used}")
    expect("Collecting torch" not in output.split("Successfully built")[0], "the build fetched a torch of its own")


def torch_too_old(box: Sandbox) -> None:
    """(b) A torch below 2.10 cannot be built against: without isolation that is a clear error."""
    site = Path(box.run(box.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"))
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("")
    (site / "torch" / "version.py").write_text("__version__ = '2.9.1+cu128'\n")
    box.pip(*BUILD_TOOLS)
    try:
        box.pip(".", "--no-build-isolation", "--no-deps")
    except Failed:
        expect("needs torch >= 2.10, found 2.9.1+cu128 in" in box.log.read_text(), f"no clear error in {box.log}")
    else:
        raise Failed("torch 2.9.1 was accepted")


def cuda_off(box: Sandbox) -> None:
    """(c) CERBERUS_CUDA=off: no CUDA library, whatever is there."""
    box.pip(".", CERBERUS_CUDA="off")
    found = box.probe()
    check_cuda(found, False)
    expect(found["cuda"] == "CERBERUS_CUDA=off", f"the record says {found['cuda']}")


def cuda_on(box: Sandbox) -> None:
    """(c) CERBERUS_CUDA=on with the architectures named: built for just these, without a GPU. Then off again."""
    expect(has_nvcc(), "needs nvcc")
    box.pip(".", CERBERUS_CUDA="on", TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX")
    check_cuda(box.probe(), True)
    record = json.loads((Path(box.probe()["package"]) / "build.json").read_text())
    expect(record["cuda_architectures"] == "80-real 90-real 90-virtual", f"built for {record['cuda_architectures']}")
    box.pip("--force-reinstall", "--no-deps", ".", CERBERUS_CUDA="off")  # again, from the same source folder
    check_cuda(box.probe(), False)


def cuda_without_nvcc(box: Sandbox) -> None:
    """(c) An nvcc that does not work: a CPU build with a warning, and an error where CUDA was asked for."""
    box.pip(box.torch)
    box.pip(*BUILD_TOOLS)
    output = box.pip("-v", ".", "--no-build-isolation", CUDACXX="/usr/bin/false")
    expect("building for the CPU only" in output, "no warning that CUDA is left out")
    check_cuda(box.probe(), False)
    try:
        box.pip(".", "--no-build-isolation", CERBERUS_CUDA="on", CUDACXX="/usr/bin/false")
    except Failed:
        expect("CERBERUS_CUDA=on, but '/usr/bin/false" in box.log.read_text(), f"no clear error in {box.log}")
    else:
        raise Failed("CERBERUS_CUDA=on built without CUDA")


def editable(box: Sandbox) -> None:
    """(d) Editable, without isolation: the libraries lie in the source folder."""
    box.pip(box.torch)
    box.pip(*BUILD_TOOLS)
    before = box.torch_files()
    box.pip("-e", ".", "--no-build-isolation", CERBERUS_CUDA="off")
    found = box.probe()
    expect(Path(found["package"]) == box.source / "cerberus_ext", f"imported from {found['package']}")
    expect(box.torch_files() == before, "torch was replaced or installed again")


def sdist(box: Sandbox) -> None:
    """(d) From the sdist: it holds everything that the build and the package need."""
    box.pip(box.torch)
    box.pip("build")
    box.run(box.python, "-m", "build", "--sdist", "--outdir", box.folder / "dist")
    (archive,) = (box.folder / "dist").glob("*.tar.gz")
    shutil.rmtree(box.source)
    box.source.mkdir()
    before = box.torch_files()
    box.pip(archive, CERBERUS_CUDA="off")
    found = box.probe()
    shipped = sorted(f.name for f in (ROOT / "cerberus_ext" / "pretrained").rglob("*") if f.is_file())
    expect(found["pretrained"] == shipped, f"pretrained: {found['pretrained']}, expected {shipped}")
    expect(box.torch_files() == before, "torch was replaced or installed again")


ALL = (fresh, fresh_with_new_pip, torch_there, torch_too_old, cuda_off, cuda_on, cuda_without_nvcc, editable, sdist)
WAYS: dict[str, Callable[[Sandbox], None]] = {way.__name__: way for way in ALL}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument(
        "--torch", default="torch>=2.10,<2.14", help="what to install first where a torch is to be there"
    )
    parser.add_argument("--keep", action="store_true", help="leave the environments and logs behind")
    parser.add_argument("--list", action="store_true", help="name the ways and stop")
    options = parser.parse_args()
    if options.list:
        for name, way in WAYS.items():
            print(f"{name:20} {way.__doc__}")
        return 0
    failures = 0
    parent = Path(tempfile.mkdtemp(prefix="install-matrix-"))
    for name in options.only:
        start = time.monotonic()
        (parent / name).mkdir()
        try:
            WAYS[name](Sandbox(parent / name, options.torch))
            outcome = "ok"
        except Failed as failure:
            failures += 1
            outcome = f"FAILED: {failure}"
        print(f"{name:20} {time.monotonic() - start:6.0f} s  {outcome}", flush=True)
        if not options.keep and outcome == "ok":
            shutil.rmtree(parent / name)
    if not options.keep and not failures:
        shutil.rmtree(parent)
    else:
        print(f"logs: {parent}/*/log.txt")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
