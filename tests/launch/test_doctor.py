"""`tulu doctor`: what it finds, what it says of what is missing, and its exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tulu_lightning import cli
from tulu_lightning.assets import compiled as assets_compiled
from tulu_lightning.assets.compiled import compiler
from tulu_lightning.errors import InputError
from tulu_lightning.launch import devices, doctor, packages, smoke
from tulu_lightning.launch.findings import Finding
from tulu_lightning.models.backends import Machine, lacks
from tulu_lightning.models.compiled import layer_kernels
from tulu_lightning.rollout import compiled as decoding

ROOT = Path(__file__).parents[2]


def test_tested_versions_are_those_of_the_constraints():
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements/cpu.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    assert {name: pins[name] for name in packages.TESTED} == packages.TESTED


def test_this_machine_runs_the_demo(capsys):
    assert cli.main(["doctor", "--json", "--no-smoke"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["can_run_demo"]
    assert found["reasons"] == []
    by_name = {finding["name"]: finding for finding in found["findings"]}
    assert by_name["torch"]["state"] == "ok"
    there = "compiled, if it passes its trial; else matmul"
    without = "matmul; compiled is off because no C++ compiler is installed ($CXX, g++ or clang++)"
    assert by_name["attention, cpu, float32, documents"]["text"] == (there if compiler() else without)
    assert all(finding["remedy"] for finding in found["findings"] if finding["state"] in ("warn", "fails"))
    assert by_name["SFT and GRPO"]["state"] == "off"


def test_what_is_not_compiled_is_told_with_what_would_do(monkeypatch):
    monkeypatch.setenv("TULU_COMPILE", "0")
    caches = (decoding.kernels, layer_kernels, assets_compiled.load_compiled)
    for cached in caches:
        cached.cache_clear()
    try:
        found = list(devices._compiled())
        assert lacks("compiled", torch.float32, Machine("cpu")) == "TULU_COMPILE is 0"
    finally:
        for cached in caches:
            cached.cache_clear()
    assert [each.name for each in found] == ["layers, cpu", "decoding, cpu"]
    for each in found:
        assert (each.state, each.text) == ("off", "because TULU_COMPILE is 0; PyTorch's operators are taken")
        assert "g++" in each.remedy


@pytest.mark.slow
def test_the_smoke_step_trains():
    found = list(smoke.look())
    assert [(finding.name, finding.state) for finding in found] == [("SFT", "ok"), ("GRPO", "ok")]


def test_a_package_without_what_its_extra_needs_is_told(monkeypatch):
    """Without it the command line ends in a traceback, and the package itself is there and in its range."""
    known = packages._version
    monkeypatch.setattr(packages, "_version", lambda name: None if name == "typeshed-client" else known(name))
    (found,) = [each for each in packages.look(()) if each.name == "jsonargparse"]
    assert found.state == "fails"
    assert found.text.endswith("without what its extra [signatures] needs: typeshed-client")


def test_a_reason_makes_the_status_1_and_stands_at_the_end(monkeypatch, capsys):
    broken = Finding("packages", "torch", "fails", "2.1.0, outside of >=2.11", "Run `make setup`.")
    monkeypatch.setattr(doctor, "examine", lambda *_: iter([("packages", [broken])]))
    assert doctor.main([]) == 1
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-2:] == ["This machine cannot run the demo:", "  - torch: 2.1.0, outside of >=2.11. Run `make setup`."]


def test_a_torch_that_does_not_import_is_reported_not_raised(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise ImportError('libtorch.so: cannot open shared object file')\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-m", "tulu_lightning", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    found = json.loads(run.stdout)
    assert not found["can_run_demo"]
    assert any("libtorch.so: cannot open shared object file" in reason for reason in found["reasons"])


@pytest.mark.parametrize(("printed", "state"), [("0.25.0 cuda", "ok"), ("0.25.0 none", "off")])
def test_a_vllm_without_a_device_is_not_usable(printed, state, monkeypatch):
    monkeypatch.setattr(packages, "_version", lambda name: "0.25.0" if name == "vllm" else None)
    monkeypatch.setattr(packages, "_try", lambda *_: (printed, ""))
    for finding in (packages._vllm({}), packages._vllm_elsewhere(Path("env/bin/python"))):
        assert finding.state == state
        assert ("sees no device" in finding.text) == (state == "off")


def test_an_unknown_option_is_refused():
    with pytest.raises(InputError, match="--jsn"):
        doctor.main(["--jsn"])
