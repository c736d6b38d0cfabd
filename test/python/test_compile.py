"""moec.compile: the compiler as a child process, its words, its end."""

import os
import subprocess
import sys
import threading

import moec
import pytest


@pytest.fixture
def fake_driver(tmp_path, monkeypatch):
    """fake_driver(python code): what `moec.compile` will run as the compiler."""

    def make(code):
        path = tmp_path / "driver"
        path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{code}\n")
        path.chmod(0o755)
        monkeypatch.setenv("MOEC_COMPILER", str(path))
        return path

    return make


SAY = "def say(**event): print(json.dumps(event), file=sys.stderr, flush=True)\n"


def test_compile_runs_the_driver(fake_driver, mock, tmp_path, monkeypatch):
    import io

    fake_driver(
        SAY
        + "args = sys.argv[1:]\n"
        + "assert args[:2] == ['compile', '-o'], args\n"
        + "assert args[3:-1] == ['--layers', '0,3', '--force', '--log', 'json', '--'], args\n"
        + "assert json.load(open(args[-1])) == {'schema': 1}\n"
        + "say(event='progress', phase='pack', done=1, total=4, unit='bytes')\n"
        + "say(event='note', text='two layers share code')\n"
        + "say(event='progress', phase='pack', done=4, total=4, unit='bytes')\n"
        + f"os.symlink({str(mock)!r}, args[2])\n"
        + "open('spec', 'w').write(args[-1])\n"
    )
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    library = moec.compile(
        {"schema": 1},
        out=tmp_path / "out.moec",
        options={"layers": "0,3", "force": True, "dry_run": False},
        progress=stream,
        load={"load": "none"},
    )
    assert len(library) == 4
    assert "two layers share code" in stream.getvalue() and "100 %" in stream.getvalue()
    assert not os.path.exists((tmp_path / "spec").read_text())  # the spec's own file


def test_compile_fails_in_the_compilers_words(fake_driver, tmp_path):
    fake_driver(
        SAY
        + "say(event='error', code=201, name='E-UNKNOWN-MODEL', where='config.json', "
        + "expected='a known model_type', got='mixtrall', hint='did you mean mixtral?')\n"
        + "sys.exit(3)"
    )
    with pytest.raises(ValueError) as caught:
        moec.compile(tmp_path, out=tmp_path / "out.moec")
    e = caught.value
    assert (e.code, e.name, e.where) == (201, "E-UNKNOWN-MODEL", "config.json")
    assert (e.expected, e.got) == ("a known model_type", "mixtrall")
    assert e.hint == "did you mean mixtral?"


def test_compile_reports_a_crash(fake_driver, tmp_path):
    fake_driver("print('stack dump', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)")
    with pytest.raises(moec.Error, match="signal 11\nstack dump") as caught:
        moec.compile(tmp_path, out=tmp_path / "out.moec")
    assert caught.value.name == "E-INTERNAL"


def test_a_model_whose_name_begins_with_a_dash(tmp_path, monkeypatch):
    from conftest import driver

    driver()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(moec.Error, match="E-CONFIG: -model: expected a model folder"):
        moec.compile("-model", out="-out")


def test_ctrl_c_ends_the_compiler(fake_driver, tmp_path):
    pid = tmp_path / "pid"
    fake_driver(f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    code = f"import moec; moec.compile({str(tmp_path)!r}, out={str(tmp_path / 'out')!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    for _ in range(200):
        if pid.exists() and pid.read_text():
            break
        threading.Event().wait(0.05)
    parent.send_signal(2)
    _, text = parent.communicate(timeout=30)
    assert "KeyboardInterrupt" in text.splitlines()[-1]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_no_compiler_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEC_COMPILER", str(tmp_path / "nothing"))
    with pytest.raises(OSError, match="MOEC_COMPILER: expected the path of the compiler") as caught:
        moec.compile(tmp_path, out=tmp_path / "out.moec")
    assert caught.value.name == "E-IO"
    monkeypatch.delenv("MOEC_COMPILER")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(moec._driver, "driver_path", lambda: None)
    with pytest.raises(OSError, match="installed without the compiler") as caught:
        moec.compile(tmp_path, out=tmp_path / "out.moec")
    assert "\n" not in str(caught.value)
