"""Runs on several machines: the shipped launch scripts, and two "machines" made of one.

Machines are two torchruns that meet at one address: on one network, or each in a network of its own (namespaces joined by
a virtual cable, which can be cut).
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from tulu_lightning import cli
from tulu_lightning.launch.compose import compose, merge

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
LAUNCH = CONFIGS / "launch"
SCRIPTS = sorted(LAUNCH.iterdir())
OWN = "tulu_lightning.callbacks."
STEPS = 6
ENOUGH = 200
"""Seconds after which a run that should have ended is called a hang; a start alone takes some on a busy machine."""

# The scripts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_a_script_is_bash_and_names_what_there_is(path):
    text = path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)
    if (lint := shutil.which("shellcheck")) is not None and path.name != "slurm.sh":
        subprocess.run([lint, "-x", "-P", str(ROOT), "-e", "SC2016", str(path)], check=True)
    for name in re.findall(r"configs/[\w./]+\w", text):
        assert (ROOT / name).exists(), name
    assert "set -euo pipefail" in text or "source configs/launch/slurm.sh" in text
    unexplained = [line for line in text.splitlines() if line.startswith("#SBATCH") and line.count("#") < 2]
    known = ("job-name", "ntasks-per-node", "gpus-per-node", "output", "exclusive", "time", "requeue", "open-mode")
    assert all(line.split("--")[1].split("=")[0] in known for line in unexplained), unexplained


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """SLURM's commands and vLLM's as far as the scripts ask: a step runs its command once, in place of each machine."""
    folder = tmp_path_factory.mktemp("stubs")
    for name, text in {
        "srun": 'echo "srun $*"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": '[[ $1 == show ]] && for i in $(seq 0 39); do echo "node$i"; done; true',
        "vllm": 'echo "vllm $*"; touch "$STARTED"; exec sleep 60',
        "curl": "while [[ ! -e $STARTED ]]; do sleep 0.05; done",  # healthy once it has started, as a server is
    }.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def said(stubs, script, *arguments, **environment):
    """What a script would run: `PYTHON=echo` prints torchrun's command line."""
    path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
    own = {"PYTHON": "echo", "PATH": path, "SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node[0-39]"}
    own["STARTED"] = str(stubs / f"started-{uuid4()}")
    found = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **own, **environment},
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    (launch,) = (line for line in lines if line.startswith("-m torch.distributed.run"))
    torchrun, _, argv = launch.partition(" -m tulu_lightning ")
    return shlex.split(torchrun), shlex.split(argv), lines


def option(words, name):
    return words[words.index(name) + 1]


def printed(capsys, argv):
    """The config that a command line asks for."""
    capsys.readouterr()
    with suppress(SystemExit):
        assert cli.main([*argv, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


STAGES = [
    *(("8b", stage) for stage in ("sft", "reward", "dpo", "ppo", "grpo")),
    *((size, stage) for size in ("70b", "405b") for stage in ("sft", "dpo")),
]


@pytest.mark.parametrize(("size", "stage"), STAGES)
def test_torchrun_starts_the_ranks_that_the_config_counts(size, stage, stubs, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    torchrun, argv, _ = said(stubs, f"torchrun_{size}.sh", stage, "--seed_everything", "5", HEAD="node0")
    trainer = merge(compose(CONFIGS / f"{stage}_{size}.yaml"))["trainer"]
    assert option(torchrun, "--nnodes") == str(trainer["num_nodes"])
    assert option(torchrun, "--nproc-per-node") == str(trainer["devices"])
    assert option(torchrun, "--rdzv-endpoint") == "node0:29500"
    config = printed(capsys, argv)
    assert config["seed_everything"] == 5
    assert config["trainer"]["num_nodes"] == trainer["num_nodes"]
    assert int(config["trainer"]["devices"]) == 8
    strategy = config["trainer"]["strategy"]
    assert (strategy if isinstance(strategy, str) else strategy["class_path"]).lower().endswith("fsdp2")
    _, argv, _ = said(stubs, f"torchrun_{size}.sh", stage, HEAD="node0", NODES="3", GPUS="4")
    assert argv[-4:] == ["--trainer.num_nodes", "3", "--trainer.devices", "4"]


@pytest.mark.parametrize(("size", "stage"), STAGES)
def test_slurm_starts_one_torchrun_on_each_machine_of_the_job(size, stage, stubs, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = f"slurm_{size}.sbatch"
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (LAUNCH / script).read_text(), re.MULTILINE))
    if stage == "sft":
        assert settings["nodes"] == str(merge(compose(CONFIGS / f"sft_{size}.yaml"))["trainer"]["num_nodes"])
    torchrun, argv, lines = said(stubs, script, stage, SLURM_NNODES="3", SLURM_CPUS_ON_NODE="96")
    assert option(torchrun, "--nnodes") == "3"
    assert option(torchrun, "--rdzv-endpoint") == "node0:24242"
    assert option(torchrun, "--rdzv-id") == "4242"
    assert "--nodes=3 --ntasks=3 --ntasks-per-node=1 --nodelist=node0,node1,node2 --cpus-per-task=96" in lines[0]
    # What the ranks have to save in fits between SLURM's signal and the end.
    before = int(settings["signal"].rpartition("@")[2])
    assert settings["signal"].startswith("B:USR1@")
    assert int(option(torchrun, "--shutdown-timeout")) < before
    assert printed(capsys, argv)["trainer"]["num_nodes"] == 3


@pytest.mark.parametrize(("size", "learn", "workers", "serve"), [("70b", 5, 4, 1), ("405b", 30, 16, 2)])
def test_rlvr_trains_beside_a_server_on_machines_of_its_own(size, learn, workers, serve, stubs, capsys, monkeypatch):
    """Section 6.3 of the paper: 40 GPUs learn and 4 sample; 240 and 16."""
    monkeypatch.chdir(ROOT)
    script = f"slurm_rlvr_{size}.sbatch"
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (LAUNCH / script).read_text(), re.MULTILINE))
    shipped = merge(compose(CONFIGS / f"ppo_{size}.yaml"))
    assert int(settings["nodes"]) == learn + serve == shipped["trainer"]["num_nodes"]
    torchrun, argv, lines = said(stubs, script, SLURM_PROCID="0")
    assert option(torchrun, "--nnodes") == str(learn)
    assert int(option(torchrun, "--shutdown-timeout")) < int(settings["signal"].rpartition("@")[2])
    rollout = printed(capsys, argv)["model"]["init_args"]["rollout"]
    engine = rollout["engine"]
    assert rollout["engines"] == "one"
    assert (engine["kind"], engine["url"]) == ("server", f"http://node{learn}:8000")
    assert engine["broadcast_workers"] == workers
    (server,) = (shlex.split(line) for line in lines if line.startswith("vllm serve"))
    assert server[2] == shipped["model"]["init_args"]["backbone"]["path"]
    assert option(server, "--tensor-parallel-size") == str(workers)
    assert option(server, "--max-model-len") == str(engine["max_model_len"])
    assert option(server, "--dtype") == engine["dtype"]
    if serve > 1:
        assert option(server, "--nnodes") == str(serve)
        assert option(server, "--master-addr") == f"node{learn}"
        assert "--headless" not in server


# Two machines -------------------------------------------------------------------------------------------------------


def config(folder, *callbacks, strategy="fsdp2", every=STEPS):
    """The shipped tiny SFT in six steps."""
    folder.mkdir(exist_ok=True)
    settings = {
        "include": [str(CONFIGS / "sft_tiny.yaml")],
        "data": {"init_args": {"examples_per_step": 12, "micro_tokens": 200, "max_steps": STEPS}},
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "accelerator": "cpu",
            "logger": False,
            "strategy": strategy if "." not in strategy else {"class_path": strategy, "init_args": {}},
            "callbacks": [
                {"class_path": OWN + "records.Records"},
                *callbacks,
                {"class_path": OWN + "checkpoints.Checkpoints", "init_args": {"every_n_steps": every}},
                {"class_path": OWN + "promote.Promote"},
            ],
        },
    }
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more):
    python_path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHON": sys.executable, "GPUS": "1", "NODES": "2", "PYTHONPATH": os.pathsep.join(python_path)}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "JOIN": "120", "SAVE": "100", **more}


class Machines:
    """Two of them, and what each says."""

    def __init__(self, folder, path, prefixes=((), ()), **more):
        self.logs = [folder / f"machine-{place}.log" for place in (0, 1)]
        command = ["bash", str(LAUNCH / "node.sh"), str(path)]
        self.running = []
        for prefix, log in zip(prefixes, self.logs, strict=True):
            with log.open("w") as out:
                start = [*prefix, *command]
                env = environment(**more)
                self.running.append(
                    subprocess.Popen(start, stdout=out, stderr=out, env=env, cwd=ROOT, start_new_session=True)
                )

    def ended(self, seconds=ENOUGH):
        """Their statuses and texts, once both have ended."""
        deadline = time.monotonic() + seconds
        try:
            statuses = [machine.wait(max(0.1, deadline - time.monotonic())) for machine in self.running]
        finally:
            self.kill()
        return statuses, [log.read_text() for log in self.logs]

    def kill(self):
        for machine in self.running:
            with suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGKILL)


def wait_for(*paths, seconds=ENOUGH):
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{[str(path) for path in paths if not path.exists()]} did not appear"
        time.sleep(0.1)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, two):
    assert [row["step"] for row in metrics(two)] == list(range(1, STEPS + 1))
    for single, apart in zip(metrics(one), metrics(two), strict=True):
        for key in ("loss", "grad_norm", "lr", "tokens", "trained_tokens"):
            assert apart[key] == pytest.approx(single[key], rel=1e-5), (single["step"], key)
    weights, others = (load_file(run / "promoted" / "model.safetensors") for run in (one, two))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert_close(others[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert cli.main(["fit", "--config", str(config(folder, strategy="auto"))]) == 0
    return folder / "run"


def test_two_machines_on_one_network_are_one_process(alone, tmp_path):
    statuses, texts = Machines(tmp_path, config(tmp_path), HEAD="127.0.0.1", PORT=free_port()).ended()
    assert statuses == [0, 0], texts
    assert sum(text.count("starting fresh") for text in texts) == 1
    assert all("1 of 2 ranks; waits 120 s at most for 2 machines to come to 127.0.0.1" in text for text in texts)
    assert_same(alone, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_machines_whose_torchrun_is_killed_end_and_say_so(rank, tmp_path):
    """Its rank would train on, with nobody to end it. The first machine's holds the store by which the ranks talk."""
    path = config(tmp_path, {"class_path": "node_faults.TorchrunKilled", "init_args": {"rank": rank}})
    statuses, texts = Machines(tmp_path, path, HEAD="127.0.0.1", PORT=free_port()).ended()
    assert all(status != 0 for status in statuses)
    told = next(line for line in texts[rank].splitlines() if line.startswith("tulu: "))
    gone = rf"rank {rank} failed: its torchrun \(process \d+ on .+\) is gone"
    assert re.match(rf"tulu: rank {rank} of 2 ends: {gone}", told)
    if rank == 1:
        told = next(line for line in texts[0].splitlines() if line.startswith("tulu: "))
        assert re.match(rf"tulu: rank 0 of 2 ends: {gone}", told)


@pytest.mark.slow
def test_a_machine_that_does_not_come_is_waited_for_so_long(tmp_path):
    path = config(tmp_path)
    found = subprocess.run(
        ["bash", str(LAUNCH / "node.sh"), str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(HEAD="127.0.0.1", PORT=free_port(), JOIN="4"),
        timeout=ENOUGH,
        check=False,
    )
    assert found.returncode != 0
    assert "waits 4 s at most for 2 machines" in found.stderr
    assert "Timeout" in found.stderr


HOSTS = "127.0.0.1 localhost\n10.77.0.1 machine0\n10.77.0.2 machine1\n"


def in_a_network_of_its_own(place, hosts):
    """A command's beginning: its own network, name and process numbers, as on another machine."""
    own = 'mount -t proc proc /proc; mount --bind "$1" /etc/hosts; hostname "$0"; shift; exec "$@"'
    start = ("ip", "netns", "exec", f"tulu{place}", "unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child")
    return (*start, "bash", "-c", own, f"machine{place}", str(hosts))


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def networks(tmp_path):
    """Two networks, 10.77.0.1 and 10.77.0.2, joined by a cable; its second end is `far` in the second one."""
    remove_networks()
    try:
        for place in (0, 1):
            ip("netns", "add", f"tulu{place}")
        ip("link", "add", "near", "netns", "tulu0", "type", "veth", "peer", "name", "far", "netns", "tulu1")
    except (OSError, subprocess.CalledProcessError) as error:
        remove_networks()
        pytest.skip(f"networks of one's own are not permitted here: {error}")
    for place, end in enumerate(("near", "far")):
        inside = ("-n", f"tulu{place}")
        ip(*inside, "addr", "add", f"10.77.0.{place + 1}/24", "dev", end)
        ip(*inside, "link", "set", end, "up")
        ip(*inside, "link", "set", "lo", "up")
    (tmp_path / "hosts").write_text(HOSTS)
    yield tuple(in_a_network_of_its_own(place, tmp_path / "hosts") for place in (0, 1))
    remove_networks()


def remove_networks():
    for place in (0, 1):
        with suppress(OSError):
            subprocess.run(["ip", "netns", "del", f"tulu{place}"], capture_output=True, check=False)


def across(folder, path, networks):
    cable = 'if [[ -e /sys/class/net/near ]]; then export IFACE=near; else export IFACE=far; fi; exec "$@"'
    prefixes = tuple((*prefix, "bash", "-c", cable, "-") for prefix in networks)
    return Machines(folder, path, prefixes, HEAD="10.77.0.1", PORT="29511")


@pytest.mark.slow
def test_two_machines_on_two_networks_are_one_process(alone, tmp_path, networks):
    statuses, texts = across(tmp_path, config(tmp_path), networks).ended()
    assert statuses == [0, 0], texts
    assert texts[0].startswith("machine0: 1 of 2 ranks")
    assert_same(alone, tmp_path / "run")


@pytest.mark.slow
def test_a_machine_that_is_cut_off_ends_the_other_within_the_silence(tmp_path, networks):
    marks = {"class_path": "node_faults.Marks", "init_args": {"path": str(tmp_path / "mark"), "seconds": 3}}
    path = config(tmp_path, marks, strategy="node_faults.Watchful")
    machines = across(tmp_path, path, networks)
    wait_for(tmp_path / "mark-0", tmp_path / "mark-1")
    ip("-n", "tulu1", "link", "set", "far", "down")
    cut = time.monotonic()
    try:
        assert machines.running[0].wait(120) != 0
    finally:
        machines.kill()
    assert time.monotonic() - cut < 60, "6 s of silence, 10 s of grace, and torchrun's end"
    told = [line for line in machines.logs[0].read_text().splitlines() if line.startswith("tulu: ")]
    silence = "has given no sign of life for 6 s: its machine is gone, or it hangs"
    assert told[0] == f"tulu: rank 0 of 2 ends: rank 1 on machine1 {silence}"


# Under SLURM, played by two short scripts ---------------------------------------------------------------------------

SRUN = """#!/usr/bin/env bash
# Two tasks, and signals passed on, as srun does.
while [[ $1 == --* ]]; do shift; done
for place in 0 1; do "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task" || status=$?; done
done
exit "$status"
"""


@pytest.mark.slow
def test_time_is_up_saves_queues_again_and_goes_on(alone, tmp_path):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    show = "echo 127.0.0.1; echo 127.0.0.1"
    (stubs / "srun").write_text(SRUN)
    (stubs / "scontrol").write_text(
        f'#!/usr/bin/env bash\n[[ $1 == show ]] && {{ {show}; }} || echo "$*" >> {tmp_path}/queue\n'
    )
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    job = tmp_path / "job.sbatch"
    job.write_text('source configs/launch/slurm.sh\ntrain 2 "$@"\n')
    marks = {"class_path": "node_faults.Marks", "init_args": {"path": str(tmp_path / "mark"), "seconds": 3}}
    path = config(tmp_path, marks)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "2"}
    env = environment(**slurm, PATH=f"{stubs}{os.pathsep}{os.environ['PATH']}")
    first = subprocess.Popen(
        ["bash", str(job), str(path)], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(tmp_path / "mark-0", tmp_path / "mark-1")
    first.send_signal(signal.SIGUSR1)
    out, _ = first.communicate(timeout=ENOUGH)
    assert first.returncode != 0
    assert (tmp_path / "queue").read_text().splitlines() == [f"requeue {os.getpid()}"], out
    assert len(metrics(tmp_path / "run")) < STEPS
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert "tulu: stopped by a signal; run the same command again to go on" in out
    again = subprocess.run(
        ["bash", str(job), str(path)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=ENOUGH
    )
    assert again.returncode == 0, again.stderr
    assert f"resuming from {saved}" in again.stdout
    assert len((tmp_path / "queue").read_text().splitlines()) == 1, "it is finished: nothing to queue again"
    assert_same(alone, tmp_path / "run")
