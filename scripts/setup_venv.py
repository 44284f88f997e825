"""Build or refresh .venv for the Makefile: `python3 scripts/setup_venv.py run|dev|train`.

Standard library only, and for any Python >= 3.6 (RHEL 8's python3): it runs before the right interpreter is found.

What it does, in order, each step named on the terminal:
  1. check the platform (Linux x86_64, glibc >= 2.28) and find Python 3.11 or 3.12 (where pjsua2 wheels exist);
  2. create .venv, also where the venv or ensurepip module is missing, else stop with the exact line to run;
  3. install torch: without an NVIDIA GPU only a build that needs no CUDA package, so nothing of CUDA is downloaded;
  4. install the rest under constraints.txt plus the torch just installed, so that nothing replaces it;
  5. compile what is imported, on all cores: pip would compile everything on one, a third of its time.
A stamp in .venv holds the hash of what was asked for: a second run ends at once.
It knows nothing about the packages themselves: they stand in pyproject.toml and constraints.txt.
"""

import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
EXTRAS = {"run": "model,sip,webrtc", "dev": "model,sip,dev", "train": "model,sip,dev,train"}
SUPPORTED = ((3, 11), (3, 12))
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's public index of CPU builds
SELDOM_IMPORTED = r"/site-packages/(.+/)?(tests?|_inductor|networkx|mypy)/"
TRY_AGAIN = "make venv   # after checking the network and the pip sources above"
CUDA_PACKAGE = re.compile(r"^(nvidia|cuda|triton|pytorch-triton)", re.IGNORECASE)


def say(text):
    print("setup: " + text, flush=True)


def stop(reason, line):
    print(f"\nsetup: {reason}\nsetup: run this, then try again:\n\n    {line}\n", file=sys.stderr, flush=True)
    sys.exit(1)


def quiet(command, **kwargs):
    """Exit status and output of a command that may well fail."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", **kwargs)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stdout


# ------------------------------------------------------------------ 1. platform and interpreter


def check_platform():
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        stop(
            f"this is {platform.system()} on {platform.machine()}; supported: Linux on x86_64",
            "docker run -it --rm -v $PWD:/minmo -w /minmo --platform linux/amd64 python:3.12 make demo",
        )
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < (2, 28):
        stop(
            "C library is {} {}; supported: glibc >= 2.28 (Debian 10, Ubuntu 20.04, RHEL 8 or newer)".format(
                library or "not glibc", version
            ),
            "docker run -it --rm -v $PWD:/minmo -w /minmo python:3.12 make demo",
        )


def version_of(interpreter):
    """(3, 11) or None; pyenv's shims exist also for versions that do not run, so it is asked."""
    status, output = quiet([interpreter, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], timeout=3)
    match = re.match(r"(\d+)\.(\d+)\s*$", output)
    return (int(match.group(1)), int(match.group(2))) if status == 0 and match else None


def find_interpreter():
    """The chosen or running Python if it is supported, else the first supported one on PATH or under pyenv and uv."""
    home = os.path.expanduser("~")
    candidates = [os.environ.get("PYTHON", ""), sys.executable, "python3.12", "python3.11"]
    for pattern in (".pyenv/versions/3.1[12]*/bin/python", ".local/share/uv/python/cpython-3.1[12]*/bin/python3"):
        candidates += sorted(glob.glob(os.path.join(home, pattern)), reverse=True)
    for candidate in filter(None, candidates):
        path = shutil.which(candidate)
        if path and version_of(path) in SUPPORTED:
            return path
    stop(f"no Python 3.11 or 3.12 found (this is {platform.python_version()})", how_to_get_python())


def distribution():
    try:
        with open("/etc/os-release") as file:
            return file.read().lower()
    except OSError:
        return ""


def how_to_get_python():
    if shutil.which("uv"):
        return "uv python install 3.12"
    name = distribution()
    if "ubuntu" in name:
        return "sudo add-apt-repository -y ppa:deadsnakes/ppa && sudo apt-get install -y python3.12 python3.12-venv"
    if "fedora" in name or "rhel" in name:
        return "sudo dnf install -y python3.12"
    if "arch" in name:
        return "sudo pacman -S --needed uv && uv python install 3.12"
    if "debian" in name and "bookworm" in name:
        return "sudo apt-get install -y python3.11 python3.11-venv"
    return "python3 -m pip install --user uv && python3 -m uv python install 3.12"


# ------------------------------------------------------------------ 2. the environment


def has_pip(python):
    return os.path.exists(python) and quiet([python, "-m", "pip", "--version"])[0] == 0


def create_venv(interpreter):
    """Try each way to an environment with pip; Debian ships Python without ensurepip, minimal images without venv."""
    if has_pip(VENV_PYTHON) and version_of(VENV_PYTHON) in SUPPORTED:
        return
    say(f"creating .venv with {interpreter}")
    bootstrap = os.path.join(ROOT, ".venv-bootstrap")
    for build in (with_venv, with_uv, with_virtualenv, with_borrowed_pip, with_downloaded_virtualenv):
        shutil.rmtree(VENV, ignore_errors=True)
        build(interpreter, bootstrap)
        shutil.rmtree(bootstrap, ignore_errors=True)
        if has_pip(VENV_PYTHON):
            return
    shutil.rmtree(VENV, ignore_errors=True)
    version = ".".join(map(str, version_of(interpreter)))
    debian, fedora = f"sudo apt-get install -y python{version}-venv", f"sudo dnf install -y python{version} python3-pip"
    line = fedora if "fedora" in distribution() else debian
    stop(f"{interpreter} has no usable venv, virtualenv or pip module", line)


def with_venv(interpreter, _):
    quiet([interpreter, "-m", "venv", VENV])


def with_uv(interpreter, _):
    if shutil.which("uv"):
        quiet(["uv", "venv", "--seed", "--python", interpreter, VENV])


def with_virtualenv(interpreter, _):
    quiet([interpreter, "-m", "virtualenv", VENV])


def with_borrowed_pip(interpreter, _):
    """venv without ensurepip, then the interpreter's own pip installs pip into it (pip >= 22.3)."""
    if has_pip(interpreter) and quiet([interpreter, "-m", "venv", "--without-pip", VENV])[0] == 0:
        quiet([interpreter, "-m", "pip", "--python", VENV_PYTHON, "install", "pip"])


def with_downloaded_virtualenv(interpreter, bootstrap):
    """No venv module at all: virtualenv brings its own."""
    download = [interpreter, "-m", "pip", "install", "--target", bootstrap, "virtualenv"]
    if has_pip(interpreter) and quiet(download)[0] == 0:
        quiet([interpreter, "-m", "virtualenv", VENV], env=dict(os.environ, PYTHONPATH=bootstrap))


# ------------------------------------------------------------------ 3. torch


def has_nvidia_gpu():
    return bool(glob.glob("/proc/driver/nvidia/gpus/*")) or quiet(["nvidia-smi", "-L"], timeout=10)[0] == 0


def pinned(package):
    """`torch` -> "2.13.0", as pyproject.toml says."""
    with open(os.path.join(ROOT, "pyproject.toml")) as file:
        return re.search(rf'"{package}==([0-9.]+)"', file.read()).group(1)


def installed_version(package):
    status, output = quiet([VENV_PYTHON, "-c", f"from importlib.metadata import version; print(version({package!r}))"])
    return output.strip() if status == 0 else ""


def pip(*arguments, **kwargs):
    command = [VENV_PYTHON, "-m", "pip", "--disable-pip-version-check"] + list(arguments)
    return (quiet if kwargs.get("is_quiet") else lambda c: (subprocess.call(c), ""))(command)


def install_torch():
    version = pinned("torch")
    present = installed_version("torch")
    if present and present.split("+")[0] == version:
        return present
    if has_nvidia_gpu():
        say(f"NVIDIA GPU found: torch {version} as published")
        requirement, source = "torch==" + version, []
    else:
        requirement, source = find_cpu_torch(version)
    if pip("install", "--no-compile", "--no-deps", requirement, *source)[0] != 0:
        stop(f"torch {version} could not be installed", TRY_AGAIN)
    return installed_version("torch")


def find_cpu_torch(version):
    """Where a torch without CUDA is to be had: (requirement, pip arguments). Nothing is downloaded to find out."""
    for requirement in (f"torch=={version}+cpu", "torch==" + version):
        if resolves_without_cuda(requirement):
            say(f"no NVIDIA GPU: {requirement} from the configured sources (no CUDA package)")
            return requirement, []
    say(f"no NVIDIA GPU: torch {version} from PyTorch's CPU index")
    return f"torch=={version}+cpu", ["--index-url", TORCH_CPU_INDEX]


def resolves_without_cuda(requirement):
    """Read the metadata pip would install from: a CUDA build requires nvidia-*, cuda-* or triton."""
    arguments = ["install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:"]
    status, output = pip(*(arguments + ["--use-feature", "fast-deps", "--report", "-", requirement]), is_quiet=True)
    start = output.find("{")
    if status != 0 or start < 0:
        return False
    report, _ = json.JSONDecoder().raw_decode(output[start:])
    requires = report["install"][0]["metadata"].get("requires_dist", [])
    return not any(CUDA_PACKAGE.match(name) for name in requires)


# ------------------------------------------------------------------ 4. everything else


def install_rest(kind, torch_version):
    frozen = os.path.join(VENV, "constraints.txt")
    with open(os.path.join(ROOT, "constraints.txt")) as source, open(frozen, "w") as target:
        target.write(source.read() + f"torch=={torch_version}\n")
    say(f"installing the {kind} dependencies ({EXTRAS[kind]})")
    if pip("install", "--no-compile", "-c", frozen, "setuptools==" + pinned("setuptools"))[0] != 0:
        stop("setuptools could not be installed", TRY_AGAIN)
    arguments = ["install", "--no-compile", "-c", frozen, "--no-build-isolation"]
    if pip(*arguments, "--editable", f"{ROOT}[{EXTRAS[kind]}]")[0] != 0:
        stop("the dependencies could not be installed", TRY_AGAIN)


# ------------------------------------------------------------------ 5. bytecode


def compile_packages():
    """Not the packages' own tests and the parts of large ones that nothing here imports: those compile when used."""
    say("compiling")
    packages = glob.glob(os.path.join(VENV, "lib", "python3*", "site-packages"))
    status, output = quiet([VENV_PYTHON, "-m", "compileall", "-q", "-j", "0", "-x", SELDOM_IMPORTED] + packages)
    # 1 alone says that some file is not for this Python; there always is one.
    if status not in (0, 1) or "Traceback" in output:
        say("not all is compiled, the first start will take longer: " + (output.strip().splitlines() or ["?"])[-1])


def fingerprint(kind):
    digest = hashlib.sha256(EXTRAS[kind].encode())
    for name in ("pyproject.toml", "constraints.txt", os.path.join("scripts", "setup_venv.py")):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def is_current(kind):
    """The stamp of this kind, or of a larger one, matches."""
    larger = list(EXTRAS)[list(EXTRAS).index(kind) :]
    for name in larger:
        path = os.path.join(VENV, ".stamp-" + name)
        if os.path.exists(path) and os.path.exists(VENV_PYTHON):
            with open(path) as file:
                if file.read() == fingerprint(name):
                    return True
    return False


def main():
    kind = sys.argv[1] if len(sys.argv) > 1 else "dev"
    if kind not in EXTRAS:
        stop(f"unknown kind {kind!r}", "python3 scripts/setup_venv.py " + "|".join(EXTRAS))
    if is_current(kind):
        return
    started = time.time()
    check_platform()
    create_venv(find_interpreter())
    install_rest(kind, install_torch())
    compile_packages()
    with open(os.path.join(VENV, ".stamp-" + kind), "w") as file:
        file.write(fingerprint(kind))
    say(f".venv is ready after {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
