"""launch/kubernetes.sh prints a JobSet that the API would take, and what its pods run trains as everywhere else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipes.common.recipe import ROOT
from recipes.common.runtime.network import free_port
from tests.support.small_runs import assert_same_state
from tests.support.supervised import EVERY, STEPS, environment, losses

WORDS = ["--nodes", 3, "--gpus", 8, "--image", "registry/trifold:1", "--claim", "disk"]

# The fields of the JobSet API (v1alpha2), and of the Job and Pod APIs in it, that the template uses: {field: type or fields},
# "?" marks one that may be missing. Any other field is an error: the API server drops or refuses what it does not know.
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "containers": [
        {
            "name": str,
            "image": str,
            "workingDir": str,
            "command": [str],
            "args": [str],
            "env": [
                {
                    "name": str,
                    "value?": str,
                    "valueFrom?": {"fieldRef?": {"fieldPath": str}, "secretKeyRef?": {"name": str, "key": str}},
                }
            ],
            "ports": [{"containerPort": int}],
            "resources": {"limits": dict},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [{"name": str, "persistentVolumeClaim?": {"claimName": str}, "emptyDir?": {"medium": str}}],
}
JOB = {
    "completionMode": str,
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [{"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}]},
    "template": {"spec": POD},
}
JOB_SET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [{"action": str, "onJobFailureReasons": [str]}]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def misfits(value: object, schema: object, where: str = "") -> list[str]:
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [text for index, item in enumerate(value) for text in misfits(item, schema[0], f"{where}[{index}]")]
    if not isinstance(value, dict):
        return [f"{where}: {value!r} has no fields"]
    fields = {name.removesuffix("?"): inner for name, inner in schema.items()}
    found = [f"{where}.{name} is unknown" for name in value if name not in fields]
    found += [f"{where}.{name} is missing" for name in schema if not name.endswith("?") and name not in value]
    return found + [text for name in value if name in fields for text in misfits(value[name], fields[name], f"{where}.{name}")]


def render(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = ["bash", ROOT / "launch/kubernetes.sh", *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60, env=env)


def test_the_job_set_fits_the_api_and_says_what_was_asked():
    flags = ["--out-dir", '/shared/a "b"\\c: {x} # - @NAME@ é', "--max-steps", 5]
    done = render(*WORDS, "--restarts", 7, "--hang-seconds", 20, "recipes/quickstart.py", *flags)
    assert done.returncode == 0, done.stderr
    job_set = yaml.safe_load(done.stdout)
    assert misfits(job_set, JOB_SET) == []
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job_set["metadata"]["name"] == "quickstart"
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == 7
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 3, 3)
    container = job["template"]["spec"]["containers"][0]
    assert container["args"] == ["--hang-seconds", "20", "recipes/quickstart.py", *map(str, flags)]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    variables = {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}
    assert variables["POD_NODES"] == "3"
    assert variables["TRIFOLD_SECRET"] == {"secretKeyRef": {"name": "quickstart-secret", "key": "secret"}}
    # restartPolicy Never is what podFailurePolicy demands; volumes and mounts name each other
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in job["template"]["spec"]["volumes"]}
    expanding = yaml.safe_load(render(*WORDS, "recipes/quickstart.py", "--out-dir", "/$(TRIFOLD_SECRET)/$$x").stdout)
    (job,) = expanding["spec"]["replicatedJobs"]
    words = job["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert words[-1] == "/$$(TRIFOLD_SECRET)/$$$$x"  # $$ is Kubernetes' way to write one $


def test_the_schema_finds_misfits():
    job_set = yaml.safe_load(render(*WORDS, "recipes/quickstart.py").stdout)
    job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 1
    job_set["spec"]["failurePolicy"]["maxRestarts"] = "7"
    del job_set["metadata"]
    assert [text.rpartition(".")[2] for text in misfits(job_set, JOB_SET)] == [
        "metadata is missing", "maxRestarts: '7' is no int", "backofLimit is unknown"]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes/quickstart.py"], "--nodes is needed"),
        ([*WORDS, "--gpus", 0, "recipes/quickstart.py"], "--gpus 0 needs --processes"),
        ([*WORDS, "--image", "a b", "recipes/quickstart.py"], "--image needs a name or a path without blanks"),
        ([*WORDS, "--name", "Upper", "recipes/quickstart.py"], "--name Upper must be a DNS name"),
        ([*WORDS, "recipes/none.py"], "there is no file recipes/none.py"),
        ([*WORDS, "recipes/quickstart.py", "--out-dir", "a\nb: c"], "a newline or another control character"),
        ([*WORDS, "recipes/quickstart.py", "--out-dir", "a\ue000b"], "holds a character that YAML cannot carry"),
    ],
)
def test_wrong_words_are_refused(words, message):
    done = render(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_apply_makes_a_new_secret_that_no_command_line_and_no_file_shows(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/words
if [ "$1" = create ]; then cat > {tmp_path}/secret; echo made from it; else cat >> {tmp_path}/applied; fi
""")
    kubectl.chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    secrets = []
    for _ in range(2):
        done = render("--apply", *WORDS, "recipes/quickstart.py", env=variables)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        secrets.append((tmp_path / "secret").read_text())
        assert len(secrets[-1]) == 64
        assert secrets[-1] not in (tmp_path / "words").read_text() + (tmp_path / "applied").read_text() + done.stderr
    assert secrets[0] != secrets[1]
    applied = (tmp_path / "applied").read_text()
    assert (applied.count("made from it\n"), applied.count("kind: JobSet")) == (2, 2)
    assert "create secret generic quickstart-secret --from-file=secret=/dev/stdin" in (tmp_path / "words").read_text()


def test_two_pods_train_as_one_machine_does(straight, warm, tmp_path):
    """The pods are processes here, each with a pod's variables, in the JobSet's second start."""
    recipe, uninterrupted = straight
    variables = environment() | {
        "POD_HOSTS": "localhost,127.0.0.1",
        "POD_NODES": "2",
        "POD_SLOTS": "1",
        "TRIFOLD_SECRET": "k" * 64,
        "VIRTUAL_ENV": sys.prefix,
    }
    variables["PATH"] = f"{warm.parent}{os.pathsep}{variables['PATH']}"
    shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True)  # the first start's last save is lost
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    ports = {"MASTER_PORT": str(free_port()), "REPORT_PORT": str(free_port()), "POD_RESTART": "1"}
    words = ["bash", ROOT / "launch/pod.sh", "--no-preflight", recipe, "--out-dir", tmp_path / "run"]
    pods = [start_pod(words, variables | ports | {"JOB_COMPLETION_INDEX": str(index)}, tmp_path) for index in range(2)]
    for index, pod in enumerate(pods):
        assert pod.wait(300) == 0, (tmp_path / f"pod_{index}.out").read_text()[-3000:]
    assert losses(tmp_path / "run") == losses(uninterrupted)
    assert_same_state(uninterrupted, tmp_path / "run", 0.0)
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["resumed_step"] for start in starts] == [None, STEPS - EVERY]


def start_pod(words: list, variables: dict[str, str], folder: Path) -> subprocess.Popen:
    with (folder / f"pod_{variables['JOB_COMPLETION_INDEX']}.out").open("ab") as output:
        return subprocess.Popen([str(word) for word in words], env=variables, stdout=output, stderr=output)
