import platform
import subprocess
import sys
from importlib.metadata import version

from qlora_trainer.runtime import environment
from qlora_trainer.runtime.environment import PACKAGES, changed_versions, describe_environment


def test_versions_are_those_of_the_installed_packages():
    told = describe_environment()
    assert told["torch"] == version("torch")
    assert told["python"] == platform.python_version()
    assert told.keys() >= set(PACKAGES) | {"processor", "cores", "memory", "gpu", "system"}
    assert all(told.values())


def test_telling_versions_imports_none_of_the_packages():
    code = (
        "import sys\n"
        "from qlora_trainer.runtime.environment import describe_environment\n"
        "describe_environment()\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_package_that_is_not_installed_is_told_as_such(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package-here",))
    assert describe_environment()["no-such-package-here"] == "not installed"


def test_processor_and_gpus_are_read_from_the_kernel(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast: 9000\nmodel name\t: Fast: 9000\n")
    for number in ("0", "1"):
        (tmp_path / "gpus" / number).mkdir(parents=True)
        (tmp_path / "gpus" / number / "information").write_text(f"Model: \t\t GPU {number}\nIRQ: 7\n")
    monkeypatch.setattr(environment, "PROCESSOR_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(environment, "NVIDIA_DEVICES", tmp_path / "gpus")
    assert describe_environment()["processor"] == "Fast: 9000"
    assert describe_environment()["gpu"] == "GPU 0, GPU 1"


def test_a_machine_that_tells_nothing_still_has_a_processor_and_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "PROCESSOR_INFO", tmp_path / "absent")
    monkeypatch.setattr(environment, "NVIDIA_DEVICES", tmp_path / "absent")
    assert describe_environment()["processor"]
    assert describe_environment()["gpu"] == "none"


def test_only_values_that_both_have_can_change():
    before = {"torch": "1", "python": "3.11", "gone": "x"}
    assert changed_versions(before, {"torch": "2", "python": "3.11", "new": "y"}) == ("torch: 1 -> 2",)
