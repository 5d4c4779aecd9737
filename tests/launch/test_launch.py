"""The shell scripts: they parse, explain and print themselves, refuse wrong flags, and leave no process behind."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tests/*.sh"), ROOT / ".ci" / "run"])
SOURCED = {"env.sh", "lib_group.sh", "lib_supervised.sh", "venv.sh"}  # no programs
STARTERS = ["local.sh", "hostfile.sh", "slurm.sbatch", "kubernetes.sh", "pod.sh"]  # all with the words RECIPE [FLAGS]
PROGRAMS = [*STARTERS, "quickstart.sh", "node.sh"]


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    options = {"cwd": ROOT, "timeout": 60} | options
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def fake_command(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_parses(script: Path) -> None:
    assert run("bash", "-n", script).stderr == ""


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    result = run("shellcheck", "-x", *SCRIPTS)
    assert result.returncode == 0, result.stdout


def test_every_script_is_a_program_or_is_sourced() -> None:
    assert {path.name for path in ROOT.glob("launch/*.s*")} == {*PROGRAMS, *SOURCED}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name: str) -> None:
    result = run("bash", ROOT / "launch" / name, "--help")
    assert result.returncode == 0, result.stderr
    assert re.match(rf"usage: (bash|(\w+) \[FLAGS of \2\]( bash)?) launch/{name}", result.stdout)
    told = re.findall(
        r"--[a-z-]+(?=[ ),])", (ROOT / "launch" / name).read_text().split("own_flag()")[-1].partition("\ntake_words")[0]
    )
    for flag in {"--print", *(told if name in STARTERS else [])}:
        assert flag in result.stdout
    if name in STARTERS:
        for words in ("RECIPE [FLAGS of the recipe]", "--restarts N", "--no-preflight", "Exit: 0 trained to the end"):
            assert words in result.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_ends_though_its_reader_is_gone(name: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(["bash", ROOT / "launch" / name, "--help"], stdout=writing, stderr=subprocess.PIPE, timeout=30)
    os.close(writing)
    assert process.returncode == 0, process.stderr


def test_quickstart_prints_its_commands_from_any_folder(tmp_path: Path) -> None:
    result = run("bash", ROOT / "launch/quickstart.sh", "--print", "--steps", 7, "--processes", 4, "--out", "a b", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    out = str(tmp_path / "a b").replace(" ", "\\ ")
    assert lines[-3].endswith(f"--num_gpus 4 recipes/quickstart.py --out-dir {out} --max-steps 7 ")
    assert lines[-3].startswith("deepspeed ")
    assert lines[-2].split()[:4] == ["python", "-m", "tools.checkpoint", "to-hf"]
    assert lines[-1].split()[:3] == ["python", "-m", "tools.sample"]
    assert not (tmp_path / "a b").exists()


@pytest.mark.parametrize(
    ("gpus", "variables", "flags", "ranks"),
    [
        (8, {}, [], 8),
        (6, {}, [], 4),
        (1, {}, [], 1),
        (8, {"CUDA_VISIBLE_DEVICES": "2,5"}, [], 2),
        (4, {}, ["--processes", "2"], 2),
        (4, {"DS_ACCELERATOR": "cpu"}, [], None),
        (4, {"CUDA_VISIBLE_DEVICES": ""}, [], None),
        (0, {}, [], None),
    ],
)
def test_quickstart_takes_the_gpus_that_it_finds(tmp_path: Path, gpus, variables, flags, ranks) -> None:
    """ranks: on GPUs, or None for the CPU's 8."""
    environment = _with_gpus(tmp_path, gpus) | variables
    result = run("bash", ROOT / "launch/quickstart.sh", "--print", "--out", tmp_path / "out", *flags, env=environment)
    assert result.returncode == 0, result.stderr
    assert f"--num_gpus {ranks or 8} recipes/quickstart.py" in result.stdout
    said = "" if ranks is None else f"training on {ranks} of them; DS_ACCELERATOR=cpu trains on the CPU"
    assert said in result.stderr and bool(said) == bool(result.stderr)


def test_quickstart_refuses_more_ranks_than_gpus(tmp_path: Path) -> None:
    result = run("bash", ROOT / "launch/quickstart.sh", "--print", "--processes", 8, env=_with_gpus(tmp_path, 4))
    assert result.returncode == 2
    assert "--processes 8 needs as many GPUs, 4 were found; DS_ACCELERATOR=cpu uses none" in result.stderr


def _with_gpus(folder: Path, count: int) -> dict[str, str]:
    answer = "".join("echo NVIDIA H100\n" for _ in range(count)) or "echo 'NVIDIA-SMI has failed'; exit 9\n"
    fake_command(folder, "nvidia-smi", answer)
    kept = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
    return kept | {"PATH": f"{folder}:{os.environ['PATH']}"}


SUPERVISE = ["python", str(ROOT / "tools" / "supervise" / "__main__.py")]
DEEPSPEED = "deepspeed --log_level error"
POD = {"POD_JOB": "job", "POD_NODES": "2", "POD_SLOTS": "4"}


@pytest.mark.parametrize(
    ("name", "words", "variables", "supervisor", "launcher"),
    [
        ("local.sh", ["--processes", "2"], {}, ["--processes", "2"],
         "deepspeed --log_level error --hostfile /dev/null --master_port {port} --num_gpus 2"),
        ("local.sh", ["--restarts", "0"], {}, ["--restarts", "0"], f"{DEEPSPEED} --hostfile /dev/null --master_port {{port}}"),
        ("hostfile.sh", ["--spares", "1", "--hostfile", os.devnull], {},
         ["--spares", "1", "--hostfile", os.devnull, "--probe", "ssh -o BatchMode=yes -o ConnectTimeout=5 {host} true"],
         f"env --chdir=/ {DEEPSPEED} --hostfile {{hostfile}} --no_ssh_check {{force_multi}} --master_addr {{master}} "
         "--master_port {port} {packed}"),
        ("slurm.sbatch", ["--processes", "8", "--min-hosts", "3"], {},
         ["--min-hosts", "3", "--hostfile", "HOSTFILE", "--requeue", "--probe",
          "srun --overlap --immediate=10 --nodes=1 --ntasks=1 --nodelist={host} true"],
         "srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --nodelist={hosts} --overlap --cpu-bind=none --mpi=none "
         f"--unbuffered bash {ROOT}/launch/node.sh {{hosts}} 8 {{master}} {{port}}"),
        ("pod.sh", ["--no-preflight"], POD | {"JOB_COMPLETION_INDEX": "0", "POD_RESTART": "1"},
         ["--no-preflight", "--restarts", "0", "--continue", "--address", "job-node-0-0.job", "--report-port", "29501",
          "--master", "job-node-0-0.job", "--processes", "8"],
         f"bash {ROOT}/launch/node.sh job-node-0-0.job,job-node-0-1.job 4 {{master}} {{port}}"),
        ("pod.sh", [], POD | {"JOB_COMPLETION_INDEX": "1"},
         ["--restarts", "0", "--join", "job-node-0-0.job:29501", "--master", "job-node-0-0.job", "--processes", "8"],
         f"bash {ROOT}/launch/node.sh job-node-0-0.job,job-node-0-1.job 4 {{master}} {{port}}"),
    ],
    ids=["local", "local, all GPUs", "hostfile", "Slurm", "first pod, started again", "another pod"],
)  # fmt: skip
def test_prints_the_command(
    tmp_path: Path, name: str, words: list[str], variables: dict[str, str], supervisor: list[str], launcher: str
) -> None:
    """What it prints is what a shell would run, from any folder."""
    recipe = tmp_path / "it's.py"
    recipe.touch()
    command = ["bash", ROOT / "launch" / name, "--print", *words, recipe, "--out-dir", "a b", "--max-steps", 3]
    result = run(*command, env=os.environ | variables, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = [*SUPERVISE, *supervisor, "--launcher", launcher, str(recipe), "--out-dir", "a b", "--max-steps", "3"]
    assert shlex.split(result.stdout) == expected


def test_a_node_prints_its_command() -> None:
    words = ["launch/node.sh", "--print", "a,b,c", 8, "10.0.0.1", 29500, "recipes/quickstart.py", "--max-steps", 3]
    for place in ({"NODE_RANK": "1"}, {"SLURMD_NODENAME": "b"}):
        result = run("bash", *words, env=os.environ | place)
        *launcher, world, master, port, node, level, recipe, flag, steps = shlex.split(result.stdout)
        assert launcher == ["python", "-u", "-m", "deepspeed.launcher.launch"]
        ranks = json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info=")))
        assert list(ranks.items()) == [(host, [*range(8)]) for host in "abc"]
        assert (master, port) == ("--master_addr=10.0.0.1", "--master_port=29500")
        assert (node, level) == ("--node_rank=1", "--log_level=error")
        assert [recipe, flag, steps] == ["recipes/quickstart.py", "--max-steps", "3"]
    nowhere = run("bash", *words, env=os.environ | {"SLURMD_NODENAME": "d"})
    assert nowhere.returncode == 2
    assert "this machine is none of a b c: set NODE_RANK to its index" in nowhere.stderr
    octal = run("bash", *words, env=os.environ | {"NODE_RANK": "08"})
    message = "launch/node.sh: this machine is none of a b c: set NODE_RANK to its index (--help shows the usage)\n"
    assert (octal.returncode, octal.stderr) == (2, message)


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "launch" / "README.md").read_text(), flags=re.S)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("command", readme_commands())
def test_the_commands_of_the_readme_are_understood(tmp_path: Path, command: str) -> None:
    """Each as it stands, but that it only prints: its options and files are looked at all the same."""
    for name in ("launch", "recipes", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "hosts").write_text("a slots=8\n")
    words = shlex.split(command)
    if words[0] == "python":
        assert words[:4] == ["python", "-m", "tools.throughput", "goodput"]  # tests/tools/throughput/test_goodput.py runs it
        return
    script = next(index for index, word in enumerate(words) if word.startswith("launch/"))
    assert words[0] == ("sbatch" if words[script] == "launch/slurm.sbatch" and script > 1 else "bash"), command
    printed = run("bash", words[script], "--print", *words[script + 1 :], cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert words[-1] in printed.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quickstart.sh", ["--stepz", "3"], "unknown flag --stepz"),
        ("quickstart.sh", ["--steps", "0"], "--steps needs a number over 0, got '0'"),
        ("quickstart.sh", ["--processes"], "--processes needs a number over 0, got ''"),
        ("quickstart.sh", ["--out"], "--out needs a folder"),
        ("local.sh", [], "which recipe?"),
        ("local.sh", ["recipes/none.py"], "there is no file recipes/none.py"),
        ("local.sh", ["--out-dir", "x"], "unknown flag --out-dir before the recipe"),
        ("local.sh", ["--restarts", "many"], "--restarts needs a number, got 'many'"),
        ("hostfile.sh", ["--hostfile", "none", "recipes/quickstart.py"], "there is no hostfile none"),
        ("hostfile.sh", ["--spares", "-1"], "--spares needs a number, got '-1'"),
        ("slurm.sbatch", ["recipes/quickstart.py"], "start it with sbatch"),
        ("local.sh", ["recipes/quickstart.py", "--out-dir", "a\nb"], "a newline or another control character: $'a\\nb'"),
        ("node.sh", ["a", "%s", "h", "1", "r"], "SLOTS='%s' and PORT='1' must be numbers"),
        ("node.sh", ["a,-oProxyCommand=x", "8", "h", "1", "r"], "'-oProxyCommand=x' is no host's name or address"),
        ("pod.sh", ["recipes/quickstart.py"], "POD_NODES='', POD_SLOTS='' and JOB_COMPLETION_INDEX='' must be numbers"),
        (
            "quickstart.sh",
            ["--print", "--processes", "3"],
            "recipes/quickstart.py has layouts for 1, 2, 4 and 8 ranks",
        ),
        ("quickstart.sh", ["--print", "--out", "README.md"], "README.md is a file; give a folder"),
        ("node.sh", ["a", "8"], "needs HOSTS, SLOTS, MASTER, PORT and RECIPE, got 2 words"),
    ],
)
def test_wrong_flags_are_refused(name: str, arguments: list[str], message: str) -> None:
    result = run("bash", ROOT / "launch" / name, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


def environment(extra: dict[str, str]) -> dict[str, str]:
    """The variables after sourcing env.sh in a shell that has nothing but PATH and `extra`."""
    script = f"set -euo pipefail; source {ROOT}/launch/env.sh; env -0"
    result = run("bash", "-c", script, env={"PATH": os.environ["PATH"], **extra})
    assert result.returncode == 0, result.stderr
    return dict(line.split("=", 1) for line in result.stdout.split("\0") if line)


@pytest.mark.parametrize("name", ["local.sh", "quickstart.sh"])
def test_the_folders_that_cd_searches_do_not_matter(name: str) -> None:
    """With CDPATH, cd prints where it went, and may go to another repository."""
    words = ["bash", f"launch/{name}", "--print", *(["recipes/quickstart.py"] if name in STARTERS else [])]
    plain, searched = run(*words), run(*words, env=os.environ | {"CDPATH": f".:{ROOT}"})
    assert (searched.returncode, searched.stderr) == (0, plain.stderr)
    first = [re.sub(r"--master_port \d+", "", done.stdout) for done in (plain, searched)]
    assert first[0] == first[1] != ""


def test_quickstart_takes_the_ranks_that_its_recipe_has_layouts_for() -> None:
    facts = run(sys.executable, "-c", "from recipes.quickstart import recipe; print(*recipe.layouts)")
    for ranks in range(1, 17):
        printed = run("bash", "launch/quickstart.sh", "--print", "--processes", ranks, env=os.environ | {"DS_ACCELERATOR": "cpu"})
        assert (printed.returncode == 0) == (str(ranks) in facts.stdout.split()), printed.stderr


def test_env_keeps_what_the_user_set() -> None:
    found = environment(
        {"OMP_NUM_THREADS": "5", "NCCL_IB_HCA": "mlx5", "WANDB_API_KEY": "s", "HF_TOKEN": "s", "VIRTUAL_ENV": "/v"}
    )
    assert found["OMP_NUM_THREADS"] == "5"
    assert found["TORCH_EXTENSIONS_DIR"] == "/v/torch_extensions"
    exports = found["TRIFOLD_EXPORTS"].split()
    assert {"OMP_NUM_THREADS", "NCCL_IB_HCA", "TORCH_EXTENSIONS_DIR"} <= set(exports)
    assert not {"WANDB_API_KEY", "HF_TOKEN", "PATH", "VIRTUAL_ENV"} & set(exports)
    assert exports == environment({})["TRIFOLD_EXPORTS"].split()  # a list of names, whatever is set
    assert environment({})["OMP_NUM_THREADS"] == "1"


def test_slurm_finds_the_repository_whatever_its_path(tmp_path: Path) -> None:
    """sbatch runs a copy of the script elsewhere; Slurm tells where it was, followed by the words, without quotes."""
    folder = tmp_path / "my  code (1)"
    shutil.copytree(ROOT / "launch", folder / "launch")
    spool = shutil.copy(ROOT / "launch/slurm.sbatch", tmp_path / "slurm_script")
    recipe = tmp_path / "a recipe.py"
    recipe.touch()
    said = f"   Command={folder}/launch/slurm.sbatch --print {recipe}\n   WorkDir=/somewhere else"
    fake_command(tmp_path, "scontrol", f'[[ "$*" == "show job 7" ]] && echo "{said}" || echo " NodeAddr=10.0.0.1 "\n')
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    done = run("bash", spool, "--print", "--processes", 2, recipe, env=variables)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[1] == f"{folder}/tools/supervise/__main__.py"
    assert f"{folder}/launch/node.sh" in shlex.split(words[words.index("--launcher") + 1])
    (folder / "launch" / "lib_supervised.sh").unlink()
    assert "cannot find the folder that it was submitted from" in run("bash", spool, recipe, env=variables).stderr


@pytest.mark.parametrize(
    ("nodes", "address", "variables", "words", "message"),
    [
        ("", "10.0.0.1", {}, [], "scontrol names no node of SLURM_JOB_NODELIST=n[1-2]"),
        ("n1", "", {}, [], "scontrol tells no NodeAddr of the first node, n1"),
        ("n1", "10.0.0.1", {"SLURM_GPUS_ON_NODE": "0"}, [], "SLURM_GPUS_ON_NODE=0 must be a number over 0; give --processes"),
        ("n1", "10.0.0.1", {"SLURM_GPUS_ON_NODE": "0"}, ["--processes", "2"], None),
    ],
)
def test_slurm_says_what_it_was_not_told(tmp_path: Path, nodes: str, address: str, variables, words, message) -> None:
    script = ROOT / "launch/slurm.sbatch"
    answers = f"""case "$1 $2" in
        "show job") echo "Command={script} --print" ;;
        "show hostnames") [[ -z "{nodes}" ]] || echo "{nodes}" ;;
        *) echo " NodeAddr={address} " ;;
    esac
    """
    fake_command(tmp_path, "scontrol", answers)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run("bash", script, "--print", *words, "recipes/quickstart.py", env=os.environ | slurm | variables)
    if message:
        assert (done.returncode, done.stderr) == (2, f"launch/slurm.sbatch: {message} (--help shows the usage)\n")
    else:
        assert (done.returncode, done.stderr) == (0, "")


def group_script(command: str) -> str:
    return f"set -euo pipefail; export STOP_SECONDS=1; source {ROOT}/launch/lib_group.sh; run_in_group {command}"


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_group_keeps_the_exit_status() -> None:
    assert run("bash", "-c", group_script("bash -c 'exit 37'")).returncode == 37
    assert run("bash", "-c", group_script("true")).returncode == 0
    assert run("bash", "-c", group_script("bash -c 'sleep 0.3; exit 5'"), timeout=30).returncode == 5  # bash waits for it


def test_a_group_under_nohup_outlives_a_hangup() -> None:
    hang_up = "bash -c 'kill -HUP $PPID; sleep 1; exit 5'"
    assert run("bash", "-c", group_script(hang_up)).returncode == 143
    assert run("nohup", "bash", "-c", group_script(hang_up)).returncode == 5


@pytest.mark.parametrize(
    ("number", "status", "deaf"),
    [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, False), (signal.SIGHUP, 143, False), (signal.SIGTERM, 143, True)],
)
def test_a_signal_ends_the_whole_group(tmp_path: Path, number: int, status: int, deaf: bool) -> None:
    # a launcher whose worker has a session-less child of its own, as deepspeed -> launch.py -> rank
    trap = "trap '' TERM INT HUP;" if deaf else ""
    fake_command(tmp_path, "worker", f"{trap} echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done\n")
    fake_command(tmp_path, "launcher", f"{tmp_path}/worker &\nwait\n")
    shell = subprocess.Popen(["bash", "-c", group_script(str(tmp_path / "launcher"))], cwd=ROOT)
    pid_file = tmp_path / "pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text().strip())
    pid = int(pid_file.read_text())
    assert alive(pid)
    shell.send_signal(number)
    assert shell.wait(timeout=30) == status
    wait_until(lambda: not alive(pid), 5)


def test_workers_that_outlive_the_launcher_are_ended(tmp_path: Path) -> None:
    fake_command(tmp_path, "worker", f"echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done\n")
    fake_command(tmp_path, "launcher", f"{tmp_path}/worker &\nwhile [[ ! -s {tmp_path}/pid ]]; do sleep 0.05; done\n")
    assert run("bash", "-c", group_script(str(tmp_path / "launcher"))).returncode == 0
    assert not alive(int((tmp_path / "pid").read_text()))


def source_venv(folder: Path, extra: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Source a copy of venv.sh that stands in `folder`, then print which python is used."""
    (folder / "launch").mkdir(exist_ok=True)
    shutil.copy(ROOT / "launch/venv.sh", folder / "launch/venv.sh")
    script = f"set -euo pipefail; source {folder}/launch/venv.sh; command -v python"
    variables = {"PATH": os.environ["PATH"], "HOME": str(folder), **extra}
    return run("bash", "-c", script, env=variables, cwd=folder, timeout=120)


def test_venv_is_made_once_and_filled_again_when_requirements_change(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# nothing to install\n")
    bare = {"PATH": os.pathsep.join([str(Path(sys.base_prefix) / "bin"), "/usr/bin", "/bin"])}
    first = source_venv(tmp_path, bare)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == f"{tmp_path}/.venv/bin/python"
    assert "creating" in first.stderr
    assert "installing" in first.stderr
    assert source_venv(tmp_path, bare).stderr == ""
    requirements.write_text("# nothing again\n")
    third = source_venv(tmp_path, bare)
    assert "creating" not in third.stderr
    assert "installing" in third.stderr


def test_an_active_environment_is_used_as_it_is(tmp_path: Path) -> None:
    found = source_venv(tmp_path, {"VIRTUAL_ENV": "/somewhere", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(Path(sys.executable).parent / "python")
    assert not (tmp_path / ".venv").exists()


def test_an_active_environment_without_the_packages_is_named(tmp_path: Path) -> None:
    fake_command(tmp_path, "python", 'exec "' + sys.executable + '" -S -I "$@"\n')  # -S: without its site-packages
    found = source_venv(tmp_path, {"VIRTUAL_ENV": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert found.returncode != 0
    assert "torch, deepspeed, transformers" in found.stderr
    assert "pip install -r requirements.txt" in found.stderr


def test_an_active_environment_without_python_or_with_an_old_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    nothing = run("/bin/bash", "-c", f"source {ROOT}/launch/venv.sh", env={"VIRTUAL_ENV": "/gone", "PATH": str(tmp_path)})
    assert nothing.stderr == (
        "launch/venv.sh: the active environment /gone has no python on the PATH; activate it again, or `deactivate` to have "
        ".venv made for you\n"
    )
    old = "import sys; sys.version_info, sys.version = (3, 9, 1), '3.9.1 (old)'; exec(sys.stdin.read())"
    fake_command(tmp_path, "python", f'exec "{sys.executable}" -c "{old}"\n')
    found = source_venv(tmp_path, {"VIRTUAL_ENV": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert found.returncode != 0
    assert "has Python 3.9.1, and 3.11 or newer is needed: activate another environment" in found.stderr


def test_requirements_are_pinned_and_say_why() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    for line in lines:
        pin, _, why = line.partition("  # ")
        name, version = pin.split("==")
        assert name and version and why, f"{line!r}: write NAME==VERSION  # why it is there"
